"""Dispatching to real HTTP targets: the request on the wire, and the outcome of each answer."""

import asyncio
import json
import socket
import ssl
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from functools import partial
from time import monotonic

import pytest
import trustme
from aiohttp import web

from pgbackend.backend import Backend
from pgbackend.codec import wire
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import Pause, Reject, RetryAfter
from pgbackend.model import Failure
from pgbackend.serve.config.load import load
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.dispatcher import DeadLetterDispatcher, TargetDispatcher, reject_without_target
from pgbackend.serve.egress.outcomes import TargetError
from tests.serve.support.broker import envelope
from tests.serve.support.dispatchers import dispatcher_to
from tests.serve.support.target import Request, Target, raw_server, read_request

ORDER = wire.parse_structured(
    b'{"specversion":"1.0","id":"1","source":"/shop","type":"order","subject":"100% \xc3\xa9","time":'
    b'"2026-01-01T00:00:00.123456789Z","datacontenttype":"application/json","count":3,"data": {"b": 1.00, "a":[ ]} }'
)

Maker = Callable[..., TargetDispatcher]


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with Pool() as opened:
        yield opened


@pytest.fixture
def dispatcher(pool: Pool) -> Maker:
    return partial(dispatcher_to, pool)


def answering(target: Target, status: int, body: bytes = b"", **headers: str) -> None:
    target.answer = lambda request: web.Response(
        status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


class TestOnTheWire:
    async def test_binary_mode_carries_attributes_as_headers_and_the_bytes_untouched(
        self, target: Target, dispatcher: Maker
    ) -> None:
        await dispatcher(target.url + "orders?x=%2F1")(ORDER)

        [request] = target.requests
        assert request.path == "/orders?x=%2F1"
        assert request.body == b'{"b": 1.00, "a":[ ]}'
        assert request.header("content-type") == "application/json"
        assert request.header("ce-subject") == "100%25%20%C3%A9"
        assert request.header("ce-time") == "2026-01-01T00:00:00.123456789Z"
        assert request.header("ce-count") == "3"
        assert request.header("ce-datacontenttype") is None
        assert request.event().attributes_text == ORDER.attributes_text

    async def test_header_coding_none_sends_attributes_as_they_are(self, target: Target, dispatcher: Maker) -> None:
        send = dispatcher(target.url, header_coding="none")
        await send(ORDER)
        await send(attributes_with(ORDER, {"note": "é "}))

        plain, padded = target.requests
        assert plain.header("ce-subject") == "100% é"
        assert padded.event().attribute("note") == "é "  # in structured mode: no header can carry the space

    async def test_structured_mode_keeps_the_text_of_json_data(self, target: Target, dispatcher: Maker) -> None:
        await dispatcher(target.url, mode="structured")(ORDER)

        [request] = target.requests
        assert (request.header("content-type") or "").startswith("application/cloudevents+json")
        assert request.header("ce-id") is None
        assert b'"data":{"b": 1.00, "a":[ ]}' in request.body
        assert request.event().attributes_text == ORDER.attributes_text

    async def test_an_event_without_data_has_no_body_and_no_content_type(
        self, target: Target, dispatcher: Maker
    ) -> None:
        await dispatcher(target.url)(wire.parse_structured(b'{"specversion":"1.0","id":"1","source":"/","type":"t"}'))

        [request] = target.requests
        assert request.body == b""
        assert request.header("content-type") is None
        assert request.header("content-length") == "0"

    async def test_data_without_a_content_type_is_sent_without_one(self, target: Target, dispatcher: Maker) -> None:
        text = b'{"specversion":"1.0","id":"1","source":"/","type":"t","data_base64":"AP8="}'
        await dispatcher(target.url)(wire.parse_structured(text))

        [request] = target.requests
        assert (request.body, request.header("content-type")) == (b"\x00\xff", None)

    async def test_configured_headers_are_sent(self, target: Target, dispatcher: Maker) -> None:
        await dispatcher(target.url, headers={"Authorization": "Bearer b", "X-Tenant": "é"})(ORDER)

        [request] = target.requests
        assert request.header("authorization") == "Bearer b"
        assert request.header("x-tenant") == "é"

    @pytest.mark.parametrize(
        ("user", "credentials"),
        [("ü:пароль", "ü:пароль"), ("%C3%BC:p%40ss%3A", "ü:p@ss:"), ("me", "me:"), (":token", ":token")],
    )
    async def test_credentials_in_the_url_are_basic_authorization_in_utf_8(
        self, user: str, credentials: str, target: Target, dispatcher: Maker
    ) -> None:
        url = target.url.replace("://", f"://{user}@")
        configuration = load(f"triggers: {{a: {{target: {{url: '{url}'}}}}}}", origin="broker.yaml")
        configured = configuration.triggers["a"].target.url
        assert configured is not None
        await dispatcher(str(configured))(ORDER)

        [request] = target.requests
        scheme, _, value = (request.header("authorization") or "").partition(" ")
        assert (scheme, b64decode(value).decode()) == ("Basic", credentials)

    @pytest.mark.parametrize("mode", ["binary", "structured"])
    async def test_a_header_has_the_number_of_the_attempt(self, mode: str, target: Target, dispatcher: Maker) -> None:
        billing = dispatcher(target.url, mode=mode)
        await billing(ORDER)
        await billing(ORDER.with_delivery(attempt=3))
        assert [request.header("pgbackend-attempt") for request in target.requests] == ["1", "3"]

    async def test_no_proxy_of_the_environment_is_used(
        self, target: Target, other_target: Target, dispatcher: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, other_target.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        await dispatcher(target.url)(ORDER)
        assert (len(target.requests), len(other_target.requests)) == (1, 0)

    async def test_an_event_that_binary_mode_cannot_carry_is_sent_in_structured_mode(
        self, target: Target, dispatcher: Maker
    ) -> None:
        row = ("1.0", "1", "/", "t", None, None, "application/cloudevents+json", None, None, "{}", b"[1]", "json")
        await dispatcher(target.url)(Event(row))
        await dispatcher(target.url)(Event((*row[:6], None, None, None, '{"no name": "x"}', b"1", None)))

        assert target.requests[0].event().row == row
        assert json.loads(target.requests[1].body)["no name"] == "x"

    async def test_no_attribute_breaks_out_of_its_header(self, target: Target, dispatcher: Maker) -> None:
        """Plain SQL can store attributes that the API refuses."""
        broken = "t\r\nX-Injected: yes"
        for row in (
            ("1.0", broken, "/", "t", broken, None, None, None, broken, "{}", b"1", None),
            ("1.0", "2", "/", "t", None, broken, broken, broken, None, "{}", b"1", None),
        ):
            await dispatcher(target.url)(Event(row))

        for request in await target.wait(2):
            assert request.header("x-injected") is None

    async def test_no_cookie_is_kept(self, target: Target, dispatcher: Maker) -> None:
        answering(target, 204, Set_Cookie="session=1; Path=/")
        await dispatcher(target.url)(ORDER)
        await dispatcher(target.url)(ORDER)
        assert target.requests[1].header("cookie") is None


@pytest.mark.parametrize(
    ("status", "retry_after", "expected"),
    [
        (204, None, type(None)),
        (299, "7", type(None)),
        (302, None, Reject),
        (403, "7", Reject),
        (410, None, Pause),
        (429, "7", RetryAfter),
        (503, None, TargetError),
    ],
)
async def test_the_answer_decides_what_becomes_of_the_event(
    status: int, retry_after: str | None, expected: type[Exception], target: Target, dispatcher: Maker
) -> None:
    headers = {"Location": "/elsewhere"} | ({"Retry_After": retry_after} if retry_after else {})
    answering(target, status, b"" if status == 204 else b"said", **headers)
    [outcome] = await asyncio.gather(dispatcher(target.url)(ORDER), return_exceptions=True)
    assert type(outcome) is expected
    assert len(target.requests) == 1, "a redirect was followed"
    if isinstance(outcome, TargetError | RetryAfter | Reject | Pause):
        assert str(outcome).startswith(f"{target.url} answered {status}")
        assert b64decode(outcome.details["knativeerrordata"]) == b"said"
    if isinstance(outcome, RetryAfter):
        assert outcome.delay == 7


class TestTroubleOnTheWay:
    async def test_a_refused_connection_is_retried(self, dispatcher: Maker) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))  # without listening
            port = free.getsockname()[1]
            with pytest.raises(TargetError, match=f"http://127.0.0.1:{port}/: .*onnect") as caught:
                await dispatcher(f"http://127.0.0.1:{port}/")(ORDER)
        # Knative reports this code when no status arrived.
        assert caught.value.details["knativeerrorcode"] == "500"
        assert b64decode(caught.value.details["knativeerrordata"]).startswith(b"dispatch error: ")

    async def test_a_name_that_does_not_resolve_is_retried(self, dispatcher: Maker) -> None:
        with pytest.raises(TargetError):
            await dispatcher("http://no-such-host.invalid/")(ORDER)

    async def test_a_silent_target_fails_at_the_timeout(self, dispatcher: Maker) -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with raw_server(silent) as url:
            began = monotonic()
            with pytest.raises(TargetError, match=r"no response within 0\.2 s"):
                await dispatcher(url, timeout=0.2)(ORDER)
        assert 0.2 <= monotonic() - began < 20

    async def test_a_target_that_trickles_a_header_fails_at_the_timeout(self, dispatcher: Maker) -> None:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)

        async with raw_server(trickle) as url:
            with pytest.raises(TargetError, match="no response within"):
                await dispatcher(url, timeout=0.3)(ORDER)

    @pytest.mark.parametrize(("status", "is_delivered"), [(b"200 OK", True), (b"503 Busy", False)])
    async def test_an_endless_body_ends_at_the_timeout_and_the_status_counts(
        self, status: bytes, *, is_delivered: bool, dispatcher: Maker
    ) -> None:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 1000000\r\n\r\n" % status)
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)

        async with raw_server(trickle) as url:
            began = monotonic()
            if is_delivered:
                await dispatcher(url, timeout=2.0)(ORDER)
            else:
                with pytest.raises(TargetError, match="answered 503"):
                    await dispatcher(url, timeout=2.0)(ORDER)
        assert monotonic() - began < 20

    async def test_only_a_bounded_part_of_a_huge_body_is_read(self, dispatcher: Maker) -> None:
        written = 0

        async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await read_request(reader)
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 1000000000\r\n\r\n")
            while written < 1_000_000_000:
                writer.write(b"x" * 65_536)
                await writer.drain()
                written += 65_536

        async with raw_server(pour) as url:
            with pytest.raises(TargetError) as caught:
                await dispatcher(url)(ORDER)
        assert written < 32 << 20
        assert b64decode(caught.value.details["knativeerrordata"]) == b"x" * 768

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            b"HTTP/1.1 99999 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        ],
    )
    async def test_an_answer_that_is_not_http_is_retried(self, answer: bytes, dispatcher: Maker) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(answer)
            await writer.drain()

        async with raw_server(talk) as url:
            with pytest.raises(TargetError):
                await dispatcher(url, timeout=30.0)(ORDER)

    @pytest.mark.parametrize(("status", "outcome"), [(b"413 Too Large", TargetError), (b"204 No Content", type(None))])
    @pytest.mark.parametrize("size", [900_000, 8_000_000])
    async def test_an_answer_counts_even_if_the_target_never_reads_the_request(
        self, status: bytes, outcome: type[Exception], size: int, dispatcher: Maker
    ) -> None:
        done = asyncio.Event()

        async def answer_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
            await done.wait()

        large = Event((*ORDER.row[:10], b"x" * size, None))
        async with raw_server(answer_early) as url:
            billing = dispatcher(url, timeout=60.0)
            [said] = await asyncio.wait_for(asyncio.gather(billing(large), return_exceptions=True), 30)
            done.set()
        assert type(said) is outcome

    async def test_a_tls_handshake_that_never_ends_fails_at_the_timeout(self, dispatcher: Maker) -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(-1)

        async with raw_server(silent) as url:
            with pytest.raises(TargetError, match="no response within"):
                await dispatcher(url.replace("http:", "https:"), timeout=0.3)(ORDER)

    async def test_an_untrusted_certificate_is_retried(self, dispatcher: Maker) -> None:
        certificate = trustme.CA().issue_cert("127.0.0.1")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)

        async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise AssertionError("an event was sent")

        async with await asyncio.start_server(nobody, "127.0.0.1", 0, ssl=context) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(TargetError, match="certificate"):
                await dispatcher(f"https://127.0.0.1:{port}/", timeout=30.0)(ORDER)

    async def test_a_stale_connection_costs_no_attempt(self, dispatcher: Maker) -> None:
        """The target closes its connection after the answer, without notice, and the next request uses it."""
        connections = 0

        async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await read_request(reader)
            writer.write(b"HTTP/1.1 204 No\r\n\r\n")
            await writer.drain()
            await read_request(reader)
            writer.close()

        async with raw_server(answer_once) as url:
            billing = dispatcher(url)
            await billing(ORDER)
            await billing(ORDER)
        assert connections == 2

    async def test_several_stale_connections_cost_no_attempt(self, dispatcher: Maker) -> None:
        """The target was restarted behind a load balancer, so all idle connections are stale."""
        connections = closed = 0
        meeting = asyncio.Barrier(8)

        async def answer_together(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections, closed
            connections += 1
            await read_request(reader)
            if connections <= 8:
                await meeting.wait()
            writer.write(b"HTTP/1.1 204 No\r\n\r\n")
            await read_request(reader)
            closed += 1
            writer.transport.abort()

        async with raw_server(answer_together) as url:
            billing = dispatcher(url)
            await asyncio.gather(*(billing(ORDER) for _ in range(8)))
            await billing(ORDER)
        assert (connections, closed) == (9, 1)

    async def test_an_event_that_kills_its_target_is_sent_twice_at_most(self, dispatcher: Maker) -> None:
        """Behind each connection is another process of the target."""
        deaths = 0
        meeting = asyncio.Barrier(8)
        poison = wire.parse_structured(envelope("poison"))

        async def die_of_poison(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal deaths
            while b"poison" not in await read_request(reader):
                await meeting.wait()
                writer.write(b"HTTP/1.1 204 No\r\n\r\n")
            deaths += 1
            writer.transport.abort()

        async with raw_server(die_of_poison) as url:
            billing = dispatcher(url)
            await asyncio.gather(*(billing(ORDER) for _ in range(8)))
            with pytest.raises(TargetError):
                await billing(poison)
        assert deaths == 2

    async def test_a_new_connection_that_the_target_closes_is_a_failed_attempt(self, dispatcher: Maker) -> None:
        connections = 0

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await read_request(reader)

        async with raw_server(hang_up) as url:
            with pytest.raises(TargetError):
                await dispatcher(url)(ORDER)
        assert connections == 1


class TestDeadLetters:
    async def test_a_failure_carries_no_secret_of_the_url(self, target: Target, dispatcher: Maker) -> None:
        answering(target, 500, b"no \x00 \xff thanks")
        with pytest.raises(TargetError) as caught:
            await dispatcher(target.url.replace("http://", "http://me:secret@") + "orders?token=secret")(ORDER)
        assert caught.value.details == {
            "knativeerrordest": target.url + "orders",
            "knativeerrorcode": "500",
            "knativeerrordata": "bm8gACD/IHRoYW5rcw==",
        }
        assert "secret" not in str(caught.value)

    async def test_a_dead_letter_carries_the_attributes_of_its_failure(self, target: Target, dispatcher: Maker) -> None:
        details = {"knativeerrordest": "http://h/", "knativeerrorcode": "500", "knativeerrordata": "eA==", "other": "x"}
        failed = ORDER.with_delivery(failure=Failure(error="TargetError: no", attempts=6, details=details))

        await DeadLetterDispatcher(dispatcher(target.url))(failed)

        [request] = target.requests
        assert request.body == ORDER.data_bytes
        expected = ORDER.attributes_text | {name: details[name] for name in details if name != "other"}
        assert request.event().attributes_text == expected

    async def test_a_dead_letter_has_its_own_attempts_and_the_mode_of_its_trigger(
        self, target: Target, dispatcher: Maker
    ) -> None:
        failure = Failure(error="Reject: no", attempts=6, details={"knativeerrorcode": "403"})
        failed = ORDER.with_delivery(attempt=2, failure=failure)

        await DeadLetterDispatcher(dispatcher(target.url, mode="structured"))(failed)

        [request] = target.requests
        assert request.header("pgbackend-attempt") == "2"
        assert (request.header("content-type") or "").startswith("application/cloudevents+json")
        assert request.event().attributes_text == ORDER.attributes_text | {"knativeerrorcode": "403"}

    async def test_410_from_a_dead_letter_target_pauses_nothing(self, target: Target, dispatcher: Maker) -> None:
        answering(target, 410)
        with pytest.raises(Reject, match="answered 410") as caught:
            await DeadLetterDispatcher(dispatcher(target.url))(ORDER)
        assert caught.value.details["knativeerrorcode"] == "410"

    async def test_an_event_with_invalid_names_is_not_sent_as_a_dead_letter(
        self, target: Target, dispatcher: Maker
    ) -> None:
        """Plain SQL can store such names; `dead_letters` keeps the event as it is."""
        event = Event((*ORDER.row[:9], '{"no name": "x"}', b"1", None))
        failure = Failure(error="Reject: no", attempts=1, details={"knativeerrorcode": "403"})
        with pytest.raises(Reject, match="no name"):
            await DeadLetterDispatcher(dispatcher(target.url))(event.with_delivery(failure=failure))

    async def test_without_a_url_an_event_is_given_up_at_once(self) -> None:
        with pytest.raises(Reject, match="no target URL"):
            await reject_without_target(ORDER)


class TestSlots:
    async def test_open_requests_are_limited_and_waiting_uses_up_no_timeout(
        self, target: Target, dispatcher: Maker
    ) -> None:
        most = opened = 0

        async def slow(request: object) -> web.Response:
            nonlocal most, opened
            opened += 1
            most = max(most, opened)
            await asyncio.sleep(0.15)
            opened -= 1
            return web.Response(status=204)

        target.answer = slow
        billing = dispatcher(target.url, connections=2, timeout=2.5)
        # All requests together take 3 s, longer than the timeout.
        await asyncio.gather(*(billing(ORDER) for _ in range(40)))
        assert most == 2

    async def test_all_shards_share_the_limit(self, backend: Backend, target: Target, dispatcher: Maker) -> None:
        most = opened = 0

        async def slow(request: object) -> web.Response:
            nonlocal most, opened
            opened += 1
            most = max(most, opened)
            await asyncio.sleep(0.01)
            opened -= 1
            return web.Response(status=204)

        target.answer = slow
        await backend.subscribe("billing", dispatcher(target.url, connections=3), start="earliest", shards=4)
        await backend.produce_many([wire.parse_structured(envelope(n)) for n in range(200)])
        running = asyncio.create_task(backend.start())
        await target.wait(200)
        await backend.stop()
        await running
        assert most == 3

    async def test_triggers_do_not_share_the_limit(self, target: Target, dispatcher: Maker) -> None:
        hang = asyncio.Event()

        async def answer(request: Request) -> web.Response:
            if request.path == "/hang":
                await hang.wait()
            return web.Response(status=204)

        target.answer = answer
        hanging = dispatcher(target.url + "hang", connections=1)
        waiting = [asyncio.create_task(hanging(ORDER)) for _ in range(3)]
        await target.wait(1)
        await asyncio.wait_for(dispatcher(target.url, connections=1)(ORDER), 20)
        assert [request.path for request in target.requests] == ["/hang", "/"]
        hang.set()
        await asyncio.gather(*waiting)

    async def test_a_cancelled_request_frees_its_slot(self, target: Target, dispatcher: Maker) -> None:
        release = asyncio.Event()

        async def hang(request: object) -> web.Response:
            await release.wait()
            return web.Response(status=204)

        target.answer = hang
        billing = dispatcher(target.url, connections=1)
        first, second = asyncio.create_task(billing(ORDER)), asyncio.create_task(billing(ORDER))
        await target.wait(1)
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        release.set()
        await asyncio.wait_for(billing(ORDER), 20)
