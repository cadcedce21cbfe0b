"""The console is open to those who may look, and to no page of another origin."""

from base64 import b64encode
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pgbackend import Backend, ConfigError
from pgbackend.console import app
from pgbackend.console.access import Local
from pgbackend.console.application import Console
from tests.support.console import PAGE, Client, served

OPS = {"Authorization": f"Basic {b64encode('öps:pass:word'.encode()).decode()}"}
FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


class TestWithoutCredentials:
    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "a.localhost.", "127.0.0.9:1", "[::1]:8080"])
    async def test_this_machine_may_look(self, gate: Client, host: str) -> None:
        assert (await gate.ask("GET", "api/overview", headers={"Host": host})).status == 503

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "10.0.0.1:80", "[::2]", "127.0.0.1@evil", "localhost:x", ""]
    )
    async def test_another_host_may_not_as_after_dns_rebinding(self, gate: Client, host: str) -> None:
        answer = await gate.ask("GET", "api/overview", headers={"Host": host})

        assert answer.status == 403
        assert "Host" in answer.detail
        assert "`user` and `password`" in answer.detail

    async def test_a_second_host_header_is_refused(self, idle: Backend) -> None:
        async with served(_changed(app(idle), headers=[(b"host", b"localhost"), (b"host", b"localhost")])) as client:
            assert (await client.ask("GET", "")).status == 403

    @pytest.mark.parametrize("header", FORWARDED)
    async def test_a_request_through_a_proxy_is_refused(self, gate: Client, header: str) -> None:
        answer = await gate.ask("GET", "api/overview", headers={header: "127.0.0.1"})
        assert (answer.status, "proxy" in answer.detail) == (403, True)

    async def test_a_proxy_that_speaks_http_1_0_is_noticed_without_a_header(self, idle: Backend) -> None:
        async with served(_changed(app(idle), http_version="1.0")) as client:
            assert "proxy" in (await client.ask("GET", "api/overview")).detail

    async def test_a_client_of_another_machine_is_refused(self, idle: Backend) -> None:
        async with served(_changed(app(idle), client=("10.0.0.7", 5000))) as client:
            assert "loopback" in (await client.ask("GET", "api/overview")).detail

    async def test_a_client_without_an_address_as_over_a_unix_socket_is_refused(self, idle: Backend) -> None:
        async with served(_changed(app(idle), client=None)) as client:
            assert (await client.ask("GET", "")).status == 403

    async def test_a_browser_reads_the_reason_as_text(self, gate: Client) -> None:
        answer = await gate.ask("GET", "", headers={"Host": "evil.example", "Accept": "text/html,*/*"})

        assert answer.status == 403
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert b"`authorize`" in answer.body


class TestWithCredentials:
    @pytest.fixture
    def closed(self, idle: Backend) -> Console:
        return app(idle, user="öps", password="pass:word")

    async def test_they_open_it_to_everybody(self, closed: Console) -> None:
        async with served(closed) as client:
            answer = await client.ask(
                "GET", "api/overview", headers={**OPS, "Host": "queue.example", "X-Forwarded-For": "1.2.3.4"}
            )
        assert answer.status == 503

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [("Authorization", "")],
            [("Authorization", "Basic")],
            [("Authorization", "Basic !!!")],
            [("Authorization", f"Basic {b64encode(b'ops:password').decode()}")],
            [("Authorization", f"Bearer {OPS['Authorization'].split()[1]}")],
            [("Authorization", OPS["Authorization"]), ("Authorization", OPS["Authorization"])],
        ],
    )
    async def test_wrong_or_missing_or_duplicate_ones_do_not(
        self, closed: Console, headers: list[tuple[str, str]]
    ) -> None:
        async with served(closed) as client:
            for path in ("", "api/overview", "app.js"):
                answer = await client.ask("GET", path, headers=headers)

                assert answer.status == 401
                assert answer.headers["www-authenticate"].startswith("Basic realm=")
                assert answer.headers["content-security-policy"] == POLICY

    @pytest.mark.parametrize(
        "options",
        [
            {"user": "a"},
            {"password": "b"},
            {"user": "a:b", "password": "c"},
            {"user": "", "password": ""},
            {"user": "a", "password": "b", "authorize": lambda _: True},
        ],
    )
    def test_half_of_them_are_refused(self, options: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="console"):
            app(Backend("postgresql://nobody@localhost/nowhere"), **options)  # type: ignore[arg-type]


class TestWithAFunction:
    async def test_it_decides_by_the_request(self, idle: Backend) -> None:
        async with served(app(idle, authorize=lambda request: request.headers.get("X-User") == "ops")) as client:
            allowed = await client.ask("GET", "api/overview", headers={"X-User": "ops", "Host": "queue.example"})
            refused = await client.ask("GET", "api/overview", headers={"X-User": "eve"})

        assert (allowed.status, refused.status) == (503, 403)

    async def test_it_may_be_async_and_only_true_is_a_yes(self, idle: Backend) -> None:
        async def authorize(request: Request) -> bool:
            return request.query_params.get("key")  # type: ignore[return-value]

        async with served(app(idle, authorize=authorize)) as client:
            assert (await client.ask("GET", "api/overview?key=yes")).status == 403

    async def test_its_error_opens_nothing(self, idle: Backend) -> None:
        def authorize(_: Request) -> bool:
            raise ZeroDivisionError("secret")

        async with served(app(idle, authorize=authorize)) as client:
            answer = await client.ask("GET", "api/overview")

        assert answer.status == 500
        assert b"secret" not in answer.body


class TestActions:
    """What a page of another origin can send is refused before anything reads it."""

    @pytest.mark.parametrize(
        "changed",
        [
            {"X-Pgbackend-Console": None},
            {"X-Pgbackend-Console": "0"},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": "multipart/form-data"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "http://127.0.0.1:99999"},
            {"Origin": "ftp://127.0.0.1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "none"},
        ],
    )
    async def test_a_post_of_another_origin_is_refused(self, gate: Client, changed: dict[str, str | None]) -> None:
        headers = {name: value for name, value in {**PAGE, **changed}.items() if value is not None}
        for path in ("api/subscriptions/billing/pause", "api/preview/seek"):
            assert (await gate.ask("POST", path, headers=headers, data=b"{}")).status == 403

    @pytest.mark.parametrize("origins", [1, 2])
    async def test_a_post_of_the_same_origin_is_obeyed_unless_it_names_two(self, gate: Client, origins: int) -> None:
        headers = [*PAGE.items(), ("Sec-Fetch-Site", "same-origin"), *[("Origin", gate.url[:-1])] * origins]
        answer = await gate.ask("POST", "api/subscriptions/billing/pause", headers=headers, data=b"{}")
        assert answer.status == (503 if origins == 1 else 403)

    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            ("localhost", "http://localhost"),
            ("localhost:443", "https://localhost"),
            ("[::1]:8080", "http://[::1]:8080"),
        ],
    )
    async def test_default_ports_and_ipv6_are_understood(self, gate: Client, host: str, origin: str) -> None:
        headers = {**PAGE, "Host": host, "Origin": origin}
        answer = await gate.ask("POST", "api/subscriptions/billing/pause", headers=headers, data=b"{}")
        assert answer.status == 503

    @pytest.mark.parametrize(
        ("site", "status"), [("same-origin", 503), ("none", 503), ("same-site", 403), ("cross-site", 403)]
    )
    async def test_another_site_cannot_make_postgresql_search(self, gate: Client, site: str, status: int) -> None:
        answer = await gate.ask("GET", "api/events?search=x", headers={"Sec-Fetch-Site": site})
        assert answer.status == status
        # A link to the page itself may be anywhere.
        assert (await gate.ask("GET", "no/such/file", headers={"Sec-Fetch-Site": site})).status == 404

    async def test_a_preflight_is_given_no_leave(self, gate: Client) -> None:
        answer = await gate.ask(
            "OPTIONS",
            "api/subscriptions/billing/pause",
            headers={
                "Origin": "http://evil.example",
                "Access-Control-Request-Method": "POST",
                "WebHook-Request-Origin": "evil.example",
            },
        )

        assert answer.status == 405
        assert not [name for name in answer.headers if name.lower().startswith(("access-control", "webhook"))]

    async def test_no_action_is_obeyed_while_they_are_switched_off(self, backend: Backend) -> None:
        await backend.subscribe("billing", print)
        actions = {f"subscriptions/billing/{verb}" for verb in ("pause", "resume", "retry", "seek", "skip")}
        async with served(app(backend, actions=False)) as client:
            for path in (*actions, "dead-letters/redeliver", "dead-letters/purge"):
                answer = await client.post(path, {})
                assert (answer.status, "switched off" in answer.detail) == (403, True)
            assert (await client.get("overview"))["actions"] is False
            assert await client.act("preview/dead-letters", {"subscription": "billing"}) == {"letters": 0, "due": 0}

        (status,) = (await backend.status()).subscriptions
        assert status.paused is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "api/overview", 503),
        ("GET", "no/such/file", 404),
        ("POST", "api/overview", 405),
        ("HEAD", "api/events", 503),
    ],
)
async def test_every_answer_keeps_the_page_harmless(gate: Client, method: str, path: str, status: int) -> None:
    answer = await gate.ask(method, path, headers=PAGE)

    assert answer.status == status
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert (answer.body == b"") is (method == "HEAD")


class TestFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        (tmp_path / "static" / "vendor").mkdir(parents=True)
        (tmp_path / "secret.txt").write_text("secret")
        (tmp_path / "static" / "index.html").write_text("<!doctype html>" + "<p>hello</p>" * 100)
        (tmp_path / "static" / "vendor" / "a.js").write_text("1")
        return tmp_path / "static"

    @pytest.fixture
    def console_of_files(self, idle: Backend, directory: Path) -> Console:
        return Console(idle, access=Local("Nothing does."), actions=True, directory=directory)

    async def test_a_file_is_sent_compressed_once_and_then_known(self, console_of_files: Console) -> None:
        async with served(console_of_files) as client:
            first = await client.ask("GET", "", headers={"Accept-Encoding": "gzip"})
            plain = await client.ask("GET", "index.html", headers={"Accept-Encoding": "identity"})
            again = await client.ask(
                "GET", "", headers={"If-None-Match": first.headers["etag"], "Accept-Encoding": "gzip"}
            )

        assert first.headers["content-encoding"] == "gzip"
        assert int(first.headers["content-length"]) < len(plain.body)
        assert first.body == plain.body  # the client has decompressed it
        assert first.headers["etag"] != plain.headers["etag"]
        assert (first.headers["cache-control"], first.headers["vary"]) == ("no-cache", "accept-encoding")
        assert first.headers["content-type"] == "text/html; charset=utf-8"
        assert (again.status, again.body) == (304, b"")

    async def test_scripts_have_a_type_that_browsers_run(self, console_of_files: Console) -> None:
        async with served(console_of_files) as client:
            answer = await client.ask("GET", "vendor/a.js")
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"

    @pytest.mark.parametrize(
        "path", ["../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "vendor/../../secret.txt", "vendor/", "%00"]
    )
    async def test_nothing_outside_can_be_asked_for(self, console_of_files: Console, path: str) -> None:
        async with served(console_of_files) as client:
            answer = await client.ask("GET", path)
        assert answer.status == 404
        assert b"secret" not in answer.body


def _changed(application: ASGIApp, **members: object) -> ASGIApp:
    """The application, which gets requests with these members of the scope."""

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await application({**scope, **members}, receive, send)

    return around
