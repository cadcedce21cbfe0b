"""The console of `pgbackend serve`: at `/console`, on the port for events, as the configuration says."""

from base64 import b64encode
from pathlib import Path

import aiohttp
import pytest

from pgbackend.console.access import Basic, Closed, Local
from pgbackend.serve.config.load import load
from pgbackend.serve.console import access_of
from tests.serve.support.broker import HEADERS
from tests.serve.support.process import post, running
from tests.support.console import Client, asking
from tests.support.databases import query_value
from tests.support.polling import eventually

COUNT = "select count(*) from pgbackend.events"


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.mark.parametrize(
    ("bound", "config", "expected"),
    [
        ("127.0.0.1", "{}", Local),
        ("::1", "{console: {actions: false}}", Local),
        ("0.0.0.0", "{}", Closed),  # noqa: S104 - that is what is tested
        ("192.168.1.2", "{}", Closed),
        ("127.0.0.1", "ingest: {token: t}", Closed),
        ("127.0.0.1", "ingest: {user: u, password: p}", Closed),
        ("0.0.0.0", "console: {user: u, password: p}", Basic),  # noqa: S104 - as above
        ("127.0.0.1", "{ingest: {token: t}, console: {user: u, password: p}}", Basic),
        ("127.0.0.1", "console: {user: '', password: ''}", Local),
    ],
)
def test_who_may_look_follows_from_the_port_and_the_configuration(bound: str, config: str, expected: type) -> None:
    assert isinstance(access_of(load(config, origin="test"), bound=bound), expected)


@pytest.mark.slow
async def test_it_is_at_its_path_and_takes_no_events(database: str) -> None:
    async with running("--dsn", database, "--port", "0", "--config-inline", "{}") as serve:
        url = await serve.listening()
        assert f"console: {url}console/ (open to this machine only)" in serve.said
        async with asking(f"{url}console/") as console:
            assert (await console.get("overview"))["log"]["head"] == "0"
            head = await console.ask("HEAD", "api/overview")
            assert (head.status, head.body) == (200, b"")

            # The console takes no event, in one piece or in two, and does not answer the handshake.
            for path in ("", "api/overview", "api/subscriptions/x/pause", "no/such/file"):
                for headers in (HEADERS, HEADERS | {"expect": "100-continue"}):
                    assert (await console.ask("POST", path, headers=headers, data=b"x")).status == 403
            options = await console.ask("OPTIONS", "api/events", headers={"WebHook-Request-Origin": "evil.example"})
            assert options.status == 405
            assert not [name for name in options.headers if name.lower().startswith(("webhook", "access-control"))]

        async with asking(url) as broker:
            redirect = await broker.ask("GET", "console")
            assert (redirect.status, redirect.headers["location"]) == (307, "console/")
            assert (await broker.ask("POST", "console", headers=HEADERS, data=b"x")).status == 403
            assert (await broker.ask("GET", "console/api/overview", headers={"Host": "evil.example"})).status == 421
            assert await query_value(database, COUNT) == 0

            # Other paths take events as before, also those that only begin so.
            for path in ("consoles", "consol", "%63onsole", "a/console"):
                assert (await broker.ask("POST", path, headers=HEADERS, data=b"x")).status == 202
            assert await query_value(database, COUNT) == 4


@pytest.mark.slow
async def test_its_section_applies_when_the_file_changes(database: str, tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text("ingest: {user: shop, password: s}\n")
    async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
        url = await serve.listening()
        assert "closed, because senders need credentials" in serve.said
        async with asking(f"{url}console/") as console:
            for headers in ({}, basic("shop", "s")):
                answer = await console.ask("GET", "api/overview", headers=headers)
                assert (answer.status, "`console` section" in answer.detail) == (403, True)

            (tmp_path / "password").write_text("first\n")
            file.write_text("console: {user: ops, password: {file: password}}\ningest: {user: shop, password: s}\n")
            await eventually("the credentials open it", lambda: _is(console, 200, basic("ops", "first")))
            assert (await console.ask("GET", "api/overview", headers=basic("shop", "s"))).status == 401

            (tmp_path / "password").write_text("second\n")
            await eventually("a new password applies", lambda: _is(console, 401, basic("ops", "first")))
            assert await _is(console, 200, basic("ops", "second"))

            file.write_text("console: {actions: false}\n")
            await eventually("it is open to this machine", lambda: _is(console, 200, {}))
            answer = await console.post("dead-letters/purge", {"ids": ["1"]})
            assert (answer.status, "switched off" in answer.detail) == (403, True)
            assert (await console.get("overview"))["actions"] is False

            file.write_text("console: {enabled: false}\n")
            await eventually("it is gone", lambda: _is(console, 404, {}))
            assert await post(f"{url}console/api/overview") == 202


async def _is(console: Client, status: int, headers: dict[str, str]) -> bool:
    return (await console.ask("GET", "api/overview", headers=headers)).status == status


@pytest.mark.slow
async def test_a_port_for_others_has_a_closed_console(database: str) -> None:
    async with running("--dsn", database, "--port", "0", "--host", "0.0.0.0") as serve:  # noqa: S104 - as above
        url = await serve.listening()
        assert "closed, because the broker can be reached from other machines" in serve.said
        async with asking(f"{url}console/") as console:
            assert (await console.ask("GET", "api/overview")).status == 403


@pytest.mark.slow
async def test_each_process_of_a_broker_has_it(database: str) -> None:
    async with running("--dsn", database, "--port", "0", "--workers", "2") as serve:
        url = await serve.listening()
        assert await post(url) == 202
        # Each on a connection of its own, which any process may accept.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            for _ in range(20):
                async with session.get(f"{url}console/api/overview") as answer:
                    overview = await answer.json()
                assert overview["log"]["head"] == "1"

        async def both() -> bool:
            async with asking(f"{url}console/") as console:
                return [worker["is_alive"] for worker in (await console.get("overview"))["workers"]] == [True] * 2

        await eventually("both processes are among the workers", both)
