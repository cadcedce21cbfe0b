"""Events over HTTP into the log: three content modes, limits, refusals, and 202 only after the commit."""

import asyncio
import base64
import json
import re
import timeit
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import pairwise
from time import monotonic
from typing import ClassVar

import asyncpg
import pytest

from pgbackend.backend import Backend
from pgbackend.codec import wire
from pgbackend.codec.event import Event
from pgbackend.errors import (
    ConnectionLostError,
    DatabaseError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.serve.config.load import load
from pgbackend.serve.ingest import handler, probes
from pgbackend.serve.ingest.authorization import authorizer
from pgbackend.serve.ingest.limits import Limits
from pgbackend.serve.ingest.responses import Problem
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.torture.proxy import Proxy
from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, Broker, envelope, serving
from tests.support.polling import eventually


class TestBinaryMode:
    async def test_headers_are_attributes_and_the_body_is_the_data(self, broker: Broker) -> None:
        body = b' {"n": 1.00,\xe2\x80\xa8 "a": [ ]}\n'
        answer = await broker.send(
            HEADERS | {"CE-Subject": "caf%C3%A9", "ce-priority": "5", "content-type": "application/json"}, body
        )
        assert (answer.status, answer.body) == (202, b"")

        [event] = await broker.stored()
        assert event.data_bytes == body
        assert event.attributes_text == {
            "specversion": "1.0",
            "id": "1",
            "source": "/shop",
            "type": "order",
            "subject": "café",
            "priority": "5",
            "datacontenttype": "application/json",
        }

    async def test_any_path_takes_events(self, broker: Broker) -> None:
        for path in ("/", "/a/b?c=d", "/healthz", "/%ff"):
            assert (await broker.send(HEADERS, path=path)).status == 202
        assert len(await broker.stored()) == 4

    async def test_no_body_is_no_data(self, broker: Broker) -> None:
        assert (await broker.send(HEADERS)).status == 202
        assert (await broker.stored())[0].data_bytes is None

    async def test_binary_data_is_stored_unchanged(self, broker: Broker) -> None:
        body = bytes(range(256)) * 100
        assert (await broker.send(HEADERS | {"content-type": "image/png"}, body)).status == 202
        assert (await broker.stored())[0].data_bytes == body

    async def test_a_chunked_body_is_stored_as_one_with_a_length(self, broker: Broker) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for number in range(20):
                yield bytes([number]) * 10_000

        assert (await broker.send(HEADERS, chunks())).status == 202
        assert (await broker.stored())[0].data_bytes == b"".join([bytes([n]) * 10_000 for n in range(20)])

    async def test_a_missing_attribute_is_named(self, broker: Broker) -> None:
        for missing in HEADERS:
            answer = await broker.send({name: value for name, value in HEADERS.items() if name != missing})
            assert answer.status == 400
            assert repr(missing.removeprefix("ce-")) in answer.detail
        assert await broker.stored() == []

    async def test_a_request_without_an_event_is_415(self, broker: Broker) -> None:
        answer = await broker.send({"content-type": "application/json"}, b"{}")
        assert answer.status == 415
        assert "Not a CloudEvent" in answer.detail


class TestStructuredMode:
    async def test_json_data_keeps_its_exact_text(self, broker: Broker) -> None:
        body = (
            b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":  {"n":1.00, "long":12345678901234567890} }'
        )
        assert (await broker.send(STRUCTURED, body)).status == 202
        assert (await broker.stored())[0].data_bytes == b'{"n":1.00, "long":12345678901234567890}'

    async def test_the_content_type_alone_chooses_the_mode(self, broker: Broker) -> None:
        for content_type in (
            "Application/CloudEvents+JSON; charset=utf-8",
            "application/cloudevents",
            "application/cloudevents+json",
        ):
            headers = HEADERS | {"ce-id": "from a header", "content-type": content_type}
            assert (await broker.send(headers, envelope("from the envelope"))).status == 202
        assert {event.id for event in await broker.stored()} == {"from the envelope"}

    NO_EVENTS: ClassVar = [
        (b"", "The event is not a JSON object"),
        (b"[]", "The event is not a JSON object"),
        (b"{", "Not JSON"),
        (b'{"specversion":"1.0"', "Not JSON"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":NaN}', "NaN"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":1,"data_base64":"AA=="}', "data_base64"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","data_base64":"e!!A=="}', "not base64"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","subject":""}', "'subject' is empty"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","x":1.5}', "'x'"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","x":"\\u0000"}', "'x' has a control character"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","x":"\xff"}', "Not UTF-8 at byte 59"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","x":"\\ud800"}', "'x' has a control"),
        (b"[" * 100_000, "object"),
        (b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":' + b"[" * 100_000, "nested too deeply"),
        (b'{"id":' + b"9" * 10_000 + b"}", "integer"),
        *(
            (envelope("bom").decode().encode(encoding), "byte order mark (BOM)")
            for encoding in ("utf-8-sig", "utf-16", "utf-32")
        ),
    ]

    async def test_an_invalid_event_is_400_and_the_detail_says_why(self, broker: Broker) -> None:
        for body, said in self.NO_EVENTS:
            answer = await broker.send(STRUCTURED, body)
            assert answer.status == 400, body[:100]
            assert said in answer.detail
        assert await broker.stored() == []

    async def test_a_batch_with_a_byte_order_mark_is_400_and_the_detail_says_so(self, broker: Broker) -> None:
        answer = await broker.send({"content-type": "application/cloudevents-batch+json"}, b"\xef\xbb\xbf[]")
        assert (answer.status, "byte order mark (BOM)" in answer.detail) == (400, True)

    async def test_an_event_format_other_than_json_is_415(self, broker: Broker) -> None:
        for name in (
            "application/cloudevents+xml",
            "application/cloudevents+protobuf",
            "application/cloudevents-batch",
        ):
            answer = await broker.send({"content-type": name}, b"<event/>")
            assert answer.status == 415
            assert name in answer.detail


class TestBatchMode:
    async def test_all_events_are_stored_in_their_order(self, broker: Broker) -> None:
        body = b"[%b]" % b",".join(envelope(number) for number in range(100))
        assert (await broker.send(BATCH, body)).status == 202
        assert [event.id for event in await broker.stored()] == [str(number) for number in range(100)]

    async def test_an_empty_batch_is_accepted(self, broker: Broker) -> None:
        assert (await broker.send(BATCH, b" [ ] ")).status == 202
        assert await broker.stored() == []

    async def test_one_bad_event_refuses_the_batch_and_is_named_by_its_index(self, broker: Broker) -> None:
        answer = await broker.send(BATCH, b'[%b, %b, {"specversion":"1.0","id":"bad"}]' % (envelope(1), envelope(2)))
        assert answer.status == 400
        assert "index 2" in answer.detail
        assert "'bad'" in answer.detail
        assert await broker.stored() == []

    async def test_an_invalid_batch_is_400(self, broker: Broker) -> None:
        for body in (b"", b"{}", b"[", b"[{}]", b"[1]", b'[""]', b"[] x", b"[,]"):
            assert (await broker.send(BATCH, body)).status == 400, body


class TestLimits:
    async def test_an_event_at_the_size_limit_passes_in_every_mode_and_a_larger_one_is_413(self, database: str) -> None:
        async with serving(database) as broker:
            fits = b"\xff" * ((1 << 20) - 1000)
            large = b"\xff" * ((1 << 20) + 1)
            octets = [base64.b64encode(data).decode() for data in (fits, large)]
            assert (await broker.send(HEADERS, fits)).status == 202
            assert (await broker.send(STRUCTURED, envelope(data_base64=octets[0]))).status == 202
            assert (await broker.send(BATCH, b"[%b]" % envelope(data_base64=octets[0]))).status == 202
            assert {event.data_bytes for event in await broker.stored()} == {fits}

            assert (await broker.send(HEADERS, large)).status == 413
            answer = await broker.send(STRUCTURED, envelope("big", data_base64=octets[1]))
            assert answer.status == 413
            assert "'big' of '/shop'" in answer.detail
            answer = await broker.send(BATCH, b"[%b,%b]" % (envelope(1), envelope("big", data_base64=octets[1])))
            assert answer.status == 413
            assert "index 1" in answer.detail
            assert len(await broker.stored()) == 3

    async def test_attributes_beyond_64_kib_are_413(self, broker: Broker) -> None:
        for members in ({"subject": "x" * 70_000}, {"subject": "é" * 33_000}, {f"n{n}": "x" * 700 for n in range(100)}):
            large = envelope("big", **members)
            for headers, body in ((STRUCTURED, large), (BATCH, b"[%b,%b]" % (envelope(1), large))):
                answer = await broker.send(headers, body)
                assert (answer.status, "bytes of attributes" in answer.detail) == (413, True)
                assert "'big' of '/shop'" in answer.detail
        assert (await broker.send(STRUCTURED, envelope(subject="x" * 60_000))).status == 202
        assert len(await broker.stored()) == 1

    async def test_a_content_length_beyond_the_limit_is_refused_before_the_body_is_sent(self, broker: Broker) -> None:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
        head += b"Content-Length: 99999999\r\n\r\n"
        assert (await broker.talk(head)).startswith(b"HTTP/1.1 413 ")

    async def test_an_endless_body_is_refused_while_it_arrives(self, broker: Broker) -> None:
        reader, writer = await asyncio.open_connection(broker.host, broker.port)
        headers = b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items())
        writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n")
        async with asyncio.timeout(60):
            answered = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            sent = 0
            while not answered.done():
                writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                await writer.drain()
                sent += 65_536
        assert answered.result().startswith(b"HTTP/1.1 413 ")
        assert sent < 16 << 20
        # The rest of the body is dropped, and the connection can be used for another request.
        writer.write(b"0\r\n\r\n" + b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n" + headers + b"\r\n")
        await reader.readuntil(b"}")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.close()

    async def test_a_batch_has_its_own_limits(self, database: str) -> None:
        async with serving(database, limits=Limits(batch_bytes=1000, batch_events=3)) as broker:
            three = b"[%b]" % b",".join([envelope()] * 3)
            assert (await broker.send(BATCH, three)).status == 202
            answer = await broker.send(BATCH, b"[%b]" % b",".join([envelope()] * 4))
            assert (answer.status, "too many events" in answer.detail) == (413, True)
            # The rest of the batch is not even parsed.
            assert (await broker.send(BATCH, b"[%b" % b",".join([envelope()] * 4 + [b"]"]))).status == 413
            assert (await broker.send(BATCH, three + b" " * 1000)).status == 413
            assert len(await broker.stored()) == 3

    async def test_parsing_stops_at_an_event_of_a_batch_that_is_too_large(self, broker: Broker) -> None:
        """Each `[]` takes twenty times its bytes of memory."""
        start = b'[%b,{"specversion":"1.0","id":"big","source":"/shop","type":"order","data":[%b' % (
            envelope(1), b"[]," * 1_000_000,
        )  # fmt: skip
        for body in (start + b"[]]}]", start + b"no JSON at all"):
            answer = await broker.send(BATCH, body)
            assert (answer.status, "index 1" in answer.detail) == (413, True)
            assert "'big' of '/shop' is too large" in answer.detail
        answer = await broker.send(BATCH, b"[%b," % envelope(1) + b" " * 10_000 + start[1:200] + b"no JSON" * 500_000)
        assert (answer.status, "Not JSON" in answer.detail) == (400, True)
        assert await broker.stored() == []

    async def test_a_batch_holds_the_memory_of_its_parsed_events(self, database: str) -> None:
        async with serving(database, limits=Limits(held_bytes=1_000_000)) as broker:
            for count, status in ((2000, 503), (500, 202), (2000, 503), (500, 202)):
                answer = await broker.send(BATCH, b"[%b]" % b",".join([envelope()] * count))
                assert answer.status == status
            assert len(await broker.stored()) == 1000

    async def test_other_requests_get_turns_while_a_large_batch_is_parsed(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others: list[str] = []
        seen: list[int] = []
        read = wire.parse_batch

        def reading(body: bytes, *, max_characters: int) -> Iterator[Event]:
            for event in read(body, max_characters=max_characters):
                seen.append(len(others))
                asyncio.get_running_loop().call_soon(others.append, event.id)
                yield event

        monkeypatch.setattr(wire, "parse_batch", reading)
        monkeypatch.setattr(handler, "BREATH", 0.0)
        assert (await broker.send(BATCH, b"[%b]" % b",".join([envelope()] * 3))).status == 202
        assert seen == [0, 1, 2]

    async def test_all_bodies_together_are_bounded(self, database: str) -> None:
        """Slow clients that each stay below the limit of one request cannot exhaust memory together."""
        async with serving(database, limits=Limits(held_bytes=2_000_000)) as broker:
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000\r\n"
            head += b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items()) + b"\r\n"
            slow = [await asyncio.open_connection(broker.host, broker.port) for _ in range(2)]
            for _, writer in slow:
                writer.write(head + b"x" * 399_999)
                await writer.drain()
            answer = await broker.send(HEADERS, b"x" * 400_000)
            while answer.status == 202:  # the slow ones have not all been read yet
                answer = await broker.send(HEADERS, b"x" * 400_000)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"

            for reader, writer in slow:
                writer.write(b"x")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
                writer.close()
            assert (await broker.send(HEADERS, b"x" * 400_000)).status == 202


class TestOtherRequests:
    async def test_only_the_exact_paths_are_answered(self, database: str) -> None:
        """A proxy that keeps strangers from /metrics may compare what they ask for as it stands."""
        with Metrics() as metrics:
            async with serving(database, metrics=metrics) as broker:
                for target, status in (
                    (b"/metrics", 200),
                    (b"/metrics?x=y", 200),
                    (b"http://localhost/metrics", 200),
                    (b"/%6detrics", 404),
                    (b"/metric%73", 404),
                    (b"/%2fmetrics", 404),
                    (b"//metrics", 404),
                    (b"/./metrics", 404),
                    (b"/x/../metrics", 404),
                    (b"/metrics/", 404),
                    (b"/metrics;x", 404),
                    (b"/METRICS", 404),
                    (b"/metrics#x", 400),
                    (b"/%72eadyz", 404),
                ):
                    answer = await broker.talk(
                        b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    )
                    assert answer.startswith(b"HTTP/1.1 %d " % status), (target, answer)

    async def test_only_the_beginning_of_a_long_accept_header_is_read(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        async def exposition(_: Metrics, accept: str) -> tuple[bytes, str]:
            asked.append(accept)
            return b"", "text/plain"

        monkeypatch.setattr(Metrics, "exposition", exposition)
        with Metrics() as metrics:
            async with serving(database, metrics=metrics) as broker:
                head = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: "
                assert (await broker.talk(head + b"a," * 30_000 + b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert [len(accept) for accept in asked] == [4096]

    async def test_healthz_and_readyz_are_ok(self, broker: Broker) -> None:
        for path in ("/healthz", "/readyz"):
            answer = await broker.request("GET", path)
            assert (answer.status, json.loads(answer.body)) == (200, {"ok": "true"})
            answer = await broker.request("HEAD", path)
            assert (answer.status, answer.body) == (200, b"")

    async def test_metrics_count_events_and_refused_requests(self, broker: Broker) -> None:
        assert (await broker.send(HEADERS, b"x")).status == 202
        assert (await broker.send(BATCH, b"[%b,%b]" % (envelope(1), envelope(2)))).status == 202
        assert (await broker.send(HEADERS, b"x" * 990_000)).status == 202
        assert (await broker.send(HEADERS | {"ce-id": ""})).status == 400
        assert (await broker.talk(b"GARBAGE\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert (await broker.request("PUT", "/")).status == 405  # it brought no event
        answer = await broker.request("GET", "/metrics", headers={"accept": "text/plain"})
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain")
        text = answer.body.decode()
        assert re.search(r"^messaging_client_sent_messages_total\{.*\} 4.0$", text, re.MULTILINE)
        assert re.search(r"^pgbackend_ingest_refused_requests_total\{.*400.*\} 2.0$", text, re.MULTILINE)
        assert '"405"' not in text
        assert (await broker.request("HEAD", "/metrics")).body == b""

    async def test_other_paths_are_404(self, broker: Broker) -> None:
        for path in ("/", "/healthz/x", "/metrics/"):
            assert (await broker.request("GET", path)).status == 404

    async def test_other_methods_are_405_with_the_allowed_ones(self, broker: Broker) -> None:
        for path, allowed in (("/", "OPTIONS, POST"), ("/readyz", "GET, HEAD, OPTIONS, POST")):
            for method in ("PUT", "DELETE", "PATCH", "TRACE"):
                answer = await broker.request(method, path)
                assert (answer.status, answer.headers["allow"]) == (405, allowed)
                assert method in answer.detail
            answer = await broker.request("OPTIONS", path)
            assert (answer.status, answer.headers["allow"], answer.body) == (200, allowed, b"")
            assert "webhook-allowed-origin" not in answer.headers

    async def test_an_encoded_body_is_refused(self, broker: Broker) -> None:
        answer = await broker.send(HEADERS | {"content-encoding": "gzip"}, b"\x1f\x8b")
        assert answer.status == 415
        assert (await broker.send(HEADERS | {"content-encoding": "identity"}, b"x")).status == 202


class TestAuthorization:
    CONFIG = "ingest: {user: shöp, password: 'p:w', token: tök}"

    @staticmethod
    def basic(text: str) -> dict[str, str]:
        return HEADERS | {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    async def test_a_client_with_a_secret_may_send(self, database: str) -> None:
        async with serving(database, config=self.CONFIG) as broker:
            assert (await broker.send(self.basic("shöp:p:w"))).status == 202
            for scheme in ("Bearer", "bearer", "BEARER "):
                assert (await broker.send(HEADERS | {"authorization": f"{scheme} tök"})).status == 202
            assert (await broker.send(HEADERS, path="/?access_token=t%C3%B6k")).status == 202

    async def test_a_client_without_the_secret_may_not_send(self, database: str) -> None:
        async with serving(database, config=self.CONFIG) as broker:
            tries = [HEADERS] + [self.basic(text) for text in ("shöp:", "shöp:p", "shöp", ":p:w", "", "x:p:w", "tök")]
            tries += [
                HEADERS | {"authorization": value}
                for value in ("Basic", "Basic !!", "Bearer", "Bearer ", "Bearer x", "tök", "Digest tök", "Basic tök")
            ]
            for headers in tries:
                answer = await broker.send(headers)
                assert answer.status == 401, headers
                assert "tök" not in answer.detail
                assert answer.headers.getall("www-authenticate") == [  # type: ignore[attr-defined]
                    'Basic realm="pgbackend", charset="UTF-8"',
                    'Bearer realm="pgbackend"',
                ]
            for query in ("x", "", "x&access_token=t%C3%B6k", "t%C3%B6k&access_token=t%C3%B6k", "t%C3%B6k;a=b"):
                assert (await broker.send(HEADERS, path="/?access_token=" + query)).status == 401
            assert (await broker.send(HEADERS, path="/?my_access_token=t%C3%B6k")).status == 401
            assert await broker.stored() == []

    def test_refusing_a_long_query_costs_little(self) -> None:
        authorize = authorizer(load("ingest: {token: t}", origin="test").ingest)
        assert authorize is not None

        def ask(query: bytes) -> None:
            with pytest.raises(Problem):
                authorize([], query)

        for query in (
            b"a=b&" * 15_000 + b"access_token=x",
            b"access_token=&" * 4_500,
            b"access_token=" + b"%41" * 20_000,
        ):
            # The quickest of many, for the machine may be busy: parsing all of it took 26 ms.
            assert min(timeit.repeat(partial(ask, query), number=1, repeat=20)) < 0.004

    async def test_only_the_configured_scheme_counts(self, database: str) -> None:
        async with serving(database, config="ingest: {token: t}") as broker:
            assert (await broker.send(self.basic("t"))).status == 401
            assert (await broker.send(self.basic(":"))).status == 401
            assert (await broker.send(HEADERS | {"authorization": "Bearer t"})).status == 202
        async with serving(database, config="ingest: {user: u, password: p}") as broker:
            assert (await broker.send(HEADERS, path="/?access_token=p")).status == 401
            assert (await broker.send(HEADERS | {"authorization": "Bearer "})).status == 401

    async def test_a_reloaded_secret_counts_from_the_next_request_on(self, database: str) -> None:
        async with serving(database, config="ingest: {token: old}") as broker:
            old, new = ({"authorization": f"Bearer {token}"} | HEADERS for token in ("old", "new"))
            assert [(await broker.send(headers)).status for headers in (old, new, HEADERS)] == [202, 401, 401]
            broker.ingest.authorize_by(load("ingest: {token: new}", origin="test").ingest)
            assert [(await broker.send(headers)).status for headers in (old, new, HEADERS)] == [401, 202, 401]
            broker.ingest.authorize_by(load("{}", origin="test").ingest)
            assert (await broker.send(HEADERS)).status == 202

    async def test_health_needs_no_secret(self, database: str) -> None:
        async with serving(database, config=self.CONFIG) as broker:
            assert (await broker.request("GET", "/healthz")).status == 200
            assert (await broker.request("GET", "/readyz")).status == 200


class TestOutages:
    async def test_202_comes_only_after_the_commit(self, broker: Broker) -> None:
        blocker = await asyncpg.connect(broker.dsn)
        try:
            transaction = blocker.transaction()
            await transaction.start()
            await blocker.execute("lock table pgbackend.events in share row exclusive mode")
            sending = asyncio.create_task(broker.send(HEADERS))
            while not await blocker.fetchval("select count(*) from pg_locks where not granted"):
                await asyncio.sleep(0.01)
            assert not sending.done()
            await transaction.rollback()
            assert (await sending).status == 202
            assert len(await broker.stored()) == 1
        finally:
            await blocker.close()

    async def test_a_blocked_commit_is_503_and_the_detail_says_what_is_known(self, database: str) -> None:
        async with serving(database, produce_timeout=0.5) as broker:
            blocker = await asyncpg.connect(broker.dsn)
            try:
                async with blocker.transaction():
                    await blocker.execute("lock table pgbackend.events in share row exclusive mode")
                    answer = await broker.send(HEADERS)
                assert answer.status == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert "unknown" in answer.detail or "Nothing was stored" in answer.detail
            finally:
                await blocker.close()

    async def test_events_are_refused_while_postgresql_is_away(self, database: str) -> None:
        async with Proxy(database) as proxy, serving(proxy.dsn, produce_timeout=4.0) as broker:
            assert (await broker.send(HEADERS | {"ce-id": "before"})).status == 202
            proxy.cut()
            for answer in (await broker.send(HEADERS | {"ce-id": "lost"}), await broker.request("GET", "/readyz")):
                assert answer.status == 503
                assert int(answer.headers["retry-after"]) >= 1
            proxy.restore()

            async def accepted() -> bool:
                return (await broker.send(HEADERS | {"ce-id": "after"})).status == 202

            await eventually("PostgreSQL is back", accepted)

            async def ready() -> bool:
                return (await broker.request("GET", "/readyz")).status == 200

            await eventually("it is ready", ready)
            assert {event.id for event in await broker.stored()} == {"before", "after"}

    async def test_every_client_gets_a_503_in_time_while_postgresql_is_silent(self, database: str) -> None:
        async with Proxy(database) as proxy, serving(proxy.dsn, produce_timeout=1.0) as broker:

            async def accepted() -> bool:
                return (await broker.send(HEADERS)).status == 202

            await eventually("PostgreSQL answers, however slow the machine", accepted)
            proxy.stall()
            began = asyncio.get_running_loop().time()
            events = [
                (HEADERS, b"x"),
                (STRUCTURED, envelope()),
                (BATCH, b"[%b]" % envelope()),
                (HEADERS, b"x" * 990_000),
            ]
            answers = await asyncio.gather(*(broker.send(*event) for event in events * 10))
            assert asyncio.get_running_loop().time() - began < 15
            for answer in answers:
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert "Nothing was stored" in answer.detail or "outcome is unknown" in answer.detail
            proxy.restore()
            await eventually("PostgreSQL answers again", accepted)

    async def test_the_outcome_is_unknown_if_the_reply_to_a_commit_is_lost(self, database: str) -> None:
        async with Proxy(database) as proxy, serving(proxy.dsn) as broker:
            proxy.lose_reply_to(b"uncertain")
            answer = await broker.send(HEADERS | {"ce-id": "uncertain"})
            await proxy.struck()
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert "outcome is unknown" in answer.detail

    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (ConnectionLostError("no route"), 503, "Nothing was stored"),
            (ProduceTimeoutError("30 s"), 503, "Nothing was stored"),
            (NotRunningError("stopped"), 503, "stopping"),
            (ProduceUncertainError("broken"), 503, "outcome is unknown"),
            (DatabaseError("disk full", sqlstate="53100"), 503, "disk full"),
            (DatabaseError("bad text", sqlstate="22021"), 400, "bad text"),
            (RuntimeError("a bug"), 500, "The broker failed"),
        ],
    )
    async def test_each_error_of_produce_has_its_answer(
        self, error: Exception, status: int, said: str, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def failing(*_: object, **__: object) -> None:
            raise error

        def failing_soon(_: Backend, event: object, done: Callable[[Exception | None], None], **__: object) -> None:
            asyncio.get_running_loop().call_soon(done, error)

        monkeypatch.setattr(Backend, "produce_soon", failing_soon)
        monkeypatch.setattr(Backend, "produce_many", failing)
        for headers, body in ((HEADERS, b"x"), (HEADERS, b"x" * 1_000_000), (BATCH, b"[%b]" % envelope())):
            answer = await broker.send(headers, body)
            assert answer.status == status
            assert said in answer.detail
            assert ("retry-after" in answer.headers) == (status == 503)


class TestReadiness:
    async def test_readyz_says_what_is_wrong(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        async def failing(*_: object) -> None:
            raise PgBackendError("the log is upside down")

        monkeypatch.setattr(Backend, "probe", failing)
        answer = await broker.request("GET", "/readyz")
        assert answer.status == 503
        assert "upside down" in answer.detail
        assert answer.headers["retry-after"] == "1"
        assert (await broker.request("GET", "/healthz")).status == 200

    async def test_postgresql_is_probed_at_most_once_a_second(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probe, asked_at = Backend.probe, []

        async def counted(self: Backend) -> None:
            asked_at.append(monotonic())
            await probe(self)

        monkeypatch.setattr(Backend, "probe", counted)
        answers = await asyncio.gather(*(broker.request("GET", "/readyz") for _ in range(50)))
        assert {answer.status for answer in answers} == {200}

        async def asked_again() -> bool:
            await broker.request("GET", "/readyz")
            return len(asked_at) > 1

        await eventually("PostgreSQL is asked again", asked_again)
        assert all(later - earlier >= 1 for earlier, later in pairwise(asked_at))

    async def test_readyz_answers_although_postgresql_is_silent(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(probes, "TIMEOUT", 0.3)
        async with Proxy(database) as proxy, serving(proxy.dsn) as broker:
            proxy.stall()
            answer = await broker.request("GET", "/readyz")
            assert answer.status == 503
            assert "did not answer" in answer.detail
            assert (await broker.request("GET", "/healthz")).status == 200
            proxy.restore()

    async def test_a_client_that_disconnects_leaves_the_probe_to_others(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, answered = asyncio.Event(), asyncio.Event()

        async def slow(_: Backend) -> None:
            asked.set()
            await answered.wait()

        monkeypatch.setattr(Backend, "probe", slow)
        _, writer = await asyncio.open_connection(broker.host, broker.port)
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asked.wait()
        other = asyncio.create_task(broker.request("GET", "/readyz"))
        writer.transport.abort()
        await broker.request("GET", "/healthz")
        answered.set()
        assert (await other).status == 200


class TestWebhookHandshake:
    ORIGIN: ClassVar = {"WebHook-Request-Origin": "eventemitter.example.com"}

    async def test_every_origin_may_send_at_any_rate(self, broker: Broker) -> None:
        callback = {"WebHook-Request-Callback": "http://127.0.0.1:1/never-called"}
        for more in ({}, {"WebHook-Request-Rate": "120"}, {"WebHook-Request-Rate": " *"}, callback):
            answer = await broker.request("OPTIONS", "/a?b", headers=self.ORIGIN | more)
            assert (answer.status, answer.body) == (200, b"")
            assert answer.headers["webhook-allowed-origin"] == "*"
            assert answer.headers["webhook-allowed-rate"] == "*"
            assert "POST" in answer.headers["allow"]

    async def test_an_invalid_rate_is_400(self, broker: Broker) -> None:
        for rate in ("0", "-5", "fast", "1.5", ""):
            answer = await broker.request("OPTIONS", headers=self.ORIGIN | {"WebHook-Request-Rate": rate})
            assert answer.status == 400, rate
            assert "WebHook-Request-Rate" in answer.detail

    async def test_the_handshake_needs_no_secret(self, database: str) -> None:
        async with serving(database, config=TestAuthorization.CONFIG) as broker:
            answer = await broker.request("OPTIONS", headers=self.ORIGIN)
            assert (answer.status, answer.headers["webhook-allowed-origin"]) == (200, "*")
            assert (await broker.send(HEADERS | self.ORIGIN)).status == 401


class TestWholeRequests:
    """`Ingest.take_whole` and `Ingest.__call__` must store, and refuse, the same requests."""

    async def test_a_request_is_stored_or_refused_alike_however_it_is_cut(self, broker: Broker) -> None:
        head = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in HEADERS.items())
        length = b"Content-Length: 4\r\n\r\nbody"
        chunked = b"\r\n4\r\nbody\r\n0\r\n\r\n"
        structured = envelope(data={"n": 1})
        twice = b"Content-Type: text/plain\r\nContent-Type: application/cloudevents+json\r\n"
        requests = [
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + length, 202),
            (b"POST /a/b?c=%ff HTTP/1.1\r\nHost: localhost\r\n" + head + length, 202),
            (
                b"POST /%2f HTTP/1.1\r\nHost: localhost\r\n" + head + b"ce-subject: caf%C3%A9\r\nCE-X: 1\r\n" + length,
                202,
            ),
            (b"POST / HTTP/1.0\r\n" + head + length, 202),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"Content-Encoding: identity\r\n" + length, 202),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"Content-Encoding: gzip\r\n" + length, 415),
            (
                b"POST / HTTP/1.1\r\nHost: localhost\r\n"
                + head
                + b"Content-Type: application/cloudevents+xml\r\n"
                + length,
                415,
            ),
            (
                b"POST / HTTP/1.1\r\nHost: localhost\r\n"
                + head
                + twice
                + b"Content-Length: %d\r\n\r\n" % len(structured)
                + structured,
                400,
            ),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"Transfer-Encoding: gzip, chunked\r\n" + chunked, 501),
            (
                b"POST / HTTP/1.1\r\nHost: localhost\r\n"
                + head
                + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
                + chunked,
                501,
            ),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"Transfer-Encoding: Chunked\r\n" + chunked, 202),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"ce-data: x\r\n" + length, 400),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"ce-id: 2\r\n" + length, 400),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"Transfer-Encoding: chunked\r\n" + chunked, 202),
            (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n", 202),
            (
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: Application/CloudEvents+JSON\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(structured), structured),
                202,
            ),
            (b"PUT / HTTP/1.1\r\nHost: localhost\r\n" + head + length, 405),
            (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        ]
        close = b"GET /never HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        total = 0
        for request, status in requests:
            cuts = range(0, len(request), 7)
            answers = await asyncio.gather(*(talk_in_two(broker, request[:cut], request[cut:] + close) for cut in cuts))
            for cut, answer in zip(cuts, answers, strict=True):
                assert answer.startswith(b"HTTP/1.1 %d " % status), (request, cut, answer)
                assert status < 400 or b"application/problem+json" in answer
            rows = [event.row for event in (await broker.stored())[total:]]
            assert len(rows) == (len(cuts) if status == 202 else 0)
            assert all(row == rows[0] for row in rows)
            total += len(rows)

    async def test_a_bug_is_500_and_logged(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def buggy(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(wire, "parse_binary", buggy)
        answer = await broker.send(HEADERS)
        assert answer.status == 500
        assert "Its log says why" in answer.detail
        assert "a bug" in caplog.text


async def talk_in_two(broker: Broker, first: bytes, second: bytes) -> bytes:
    """The answers if the broker has read `first` before `second` is sent."""
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(first)
    await writer.drain()
    await broker.request("GET", "/healthz")  # answered after the first part was read
    writer.write(second)
    try:
        return await reader.read()
    finally:
        writer.close()
