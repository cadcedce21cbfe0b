"""One trace from a client's request through the log to the target; and a broker without traces."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pgbackend.codec.attributes import ATTRIBUTES_BYTES
from pgbackend.codec.event import Event
from pgbackend.codec.wire import parse_structured
from pgbackend.errors import ConfigError
from pgbackend.serve.operations import tracing
from pgbackend.serve.operations.tracing import Tracing
from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, envelope, serving
from tests.serve.support.target import Request, Target
from tests.support.polling import eventually

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-01"
TRACE = PARENT[3:35]
NONSENSE = ["00-0-0-0", "zz" + PARENT[2:], PARENT + "-x", PARENT.upper(), f"00-{'0' * 32}-{'1' * 16}-01", "x" * 4000]
Kind = Span.SpanKind


class Seen:
    """A span as it arrived at the collector."""

    def __init__(self, span: Span, resource: Mapping[str, Any]) -> None:
        self.name = span.name
        self.kind = span.kind
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.attributes = {one.key: _value(one.value) for one in span.attributes}
        self.failed = span.status.code == Status.STATUS_CODE_ERROR
        self.exceptions = [
            {one.key: _value(one.value) for one in event.attributes}
            for event in span.events
            if event.name == "exception"
        ]
        self.resource = resource

    def is_in(self, traceparent: str | None) -> bool:
        """Whether it is this span that the text names; whatever its flags."""
        return traceparent is not None and traceparent.startswith(f"00-{self.trace}-{self.id}-")


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


class Collector:
    """Receives what OTLP exporters send over HTTP."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Seen] = []

    async def wait(self, name: str, count: int = 1) -> list[Seen]:
        """The spans whose name begins so, in the order in which they ended, once there are `count`."""

        async def arrived() -> list[Seen] | None:
            found = [span for span in self.spans if span.name.startswith(name)]
            return found if len(found) >= count else None

        found = await eventually(f"{count} spans {name}", arrived)
        assert found
        return found

    async def _take(self, request: web.Request) -> web.Response:
        assert request.path == "/v1/traces"
        for scope in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            resource = {one.key: _value(one.value) for one in scope.resource.attributes}
            self.spans += [Seen(span, resource) for spans in scope.scope_spans for span in spans.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector to which the environment sends traces."""
    running = Collector()
    application = web.Application(client_max_size=1 << 26)
    application.router.add_post("/{path:.*}", running._take)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    running.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield running
    await runner.cleanup()


@asynccontextmanager
async def traces() -> AsyncIterator[Tracing]:
    found = tracing.from_environment()
    assert found is not None
    try:
        yield found
    finally:
        # In a thread: the collector is on this loop.
        await asyncio.to_thread(found.shutdown)


Sending = Callable[[str, Mapping[str, str]], tuple[Mapping[str, str], bytes]]


def binary(id_: str, attributes: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
    return {**HEADERS, "ce-id": id_, **{f"ce-{name}": text for name, text in attributes.items()}}, b"{}"


def structured(id_: str, attributes: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
    return STRUCTURED, envelope(id_, **attributes)


def batch(id_: str, attributes: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
    return BATCH, b"[" + envelope(id_, **attributes) + b"]"


def config(target: Target, mode: str = "binary", options: Mapping[str, object] | None = None) -> str:
    return json.dumps(
        {"triggers": {"billing": {"target": {"url": target.url, "mode": mode}, "deliveryOptions": options or {}}}}
    )


@pytest.mark.parametrize("sent", [binary, structured, batch])
class TestThroughTheLog:
    @pytest.mark.parametrize("mode", ["binary", "structured"])
    async def test_a_request_its_commit_and_its_delivery_are_one_trace(
        self, mode: str, sent: Sending, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target, mode), tracing=traced) as broker:
            headers, body = sent("7", {})
            answer = await broker.send({**headers, "traceparent": PARENT, "tracestate": "congo=t61r"}, body)
            assert answer.status == 202
            [request] = await target.wait(1)
            [commit] = await collector.wait("send")
            [attempt] = await collector.wait("process")
            [stored] = await broker.stored()
        assert (commit.trace, commit.parent) == (TRACE, PARENT[36:52])
        assert commit.kind == Kind.SPAN_KIND_PRODUCER
        assert commit.links == []
        assert commit.is_in(stored.attribute("traceparent"))
        assert stored.attribute("tracestate") == "congo=t61r"
        assert (attempt.trace, attempt.parent) == (TRACE, commit.id)
        assert attempt.links == [(TRACE, commit.id)]
        assert attempt.kind == Kind.SPAN_KIND_CONSUMER
        assert attempt.is_in(request.header("traceparent"))
        assert request.header("tracestate") == "congo=t61r"
        assert commit.is_in(request.event().attribute("traceparent"))
        assert not commit.failed
        assert not attempt.failed

    async def test_an_event_keeps_its_own_context(
        self, sent: Sending, database: str, target: Target, collector: Collector
    ) -> None:
        brought = {"traceparent": OTHER, "tracestate": "its=own"}
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            headers, body = sent("7", brought)
            assert (await broker.send({**headers, "traceparent": PARENT}, body)).status == 202
            [request] = await target.wait(1)
            [commit] = await collector.wait("send")
            [attempt] = await collector.wait("process")
            [stored] = await broker.stored()
        assert stored.attributes_text.items() >= brought.items()
        assert commit.kind == Kind.SPAN_KIND_SERVER
        assert (commit.trace, commit.parent) == (TRACE, PARENT[36:52])
        assert commit.links == [(OTHER[3:35], OTHER[36:52])]
        assert (attempt.trace, attempt.parent) == (OTHER[3:35], OTHER[36:52])
        assert attempt.is_in(request.header("traceparent"))
        assert request.header("tracestate") == "its=own"
        assert request.event().attributes_text.items() >= brought.items()

    async def test_the_context_of_an_event_is_the_parent_without_a_header(
        self, sent: Sending, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            headers, body = sent("7", {"traceparent": OTHER})
            assert (await broker.send(headers, body)).status == 202
            [commit] = await collector.wait("send")
        assert (commit.trace, commit.parent) == (OTHER[3:35], OTHER[36:52])

    async def test_an_event_without_a_trace_starts_one(
        self, sent: Sending, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            headers, body = sent("7", {})
            assert (await broker.send(headers, body)).status == 202
            await target.wait(1)
            [commit] = await collector.wait("send")
            [attempt] = await collector.wait("process")
        assert commit.parent == ""
        assert attempt.trace == commit.trace

    @pytest.mark.parametrize("nonsense", NONSENSE)
    async def test_a_malformed_context_is_kept_and_ignored(
        self, nonsense: str, sent: Sending, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            headers, body = sent("7", {"traceparent": nonsense})
            assert (await broker.send({**headers, "traceparent": nonsense}, body)).status == 202
            [request] = await target.wait(1)
            [commit] = await collector.wait("send")
            [attempt] = await collector.wait("process")
            [stored] = await broker.stored()
        assert (commit.parent, commit.links) == ("", [])
        assert (attempt.parent, attempt.links) == ("", [])
        assert attempt.is_in(request.header("traceparent"))
        assert stored.attribute("traceparent") == nonsense


class TestSpans:
    async def test_a_batch_is_one_span_with_links(self, database: str, target: Target, collector: Collector) -> None:
        events = [envelope("1"), envelope("2", traceparent=OTHER), envelope("3")]
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            assert (await broker.send({**BATCH, "traceparent": PARENT}, b"[" + b",".join(events) + b"]")).status == 202
            [commit] = await collector.wait("send")
            attempts = await collector.wait("process", 3)
            stored = await broker.stored()
        assert commit.links == [(OTHER[3:35], OTHER[36:52])]
        assert commit.attributes["messaging.batch.message_count"] == 3
        assert "messaging.message.id" not in commit.attributes
        assert [event.attribute("traceparent") == OTHER for event in stored] == [False, True, False]
        assert [commit.is_in(event.attribute("traceparent")) for event in stored] == [True, False, True]
        parents = {attempt.attributes["messaging.message.id"]: attempt.parent for attempt in attempts}
        assert parents == {"1": commit.id, "2": OTHER[36:52], "3": commit.id}

    async def test_spans_have_the_attributes_of_the_conventions(
        self, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "ce-id": "7", "ce-subject": "cart"}, b"{}")).status == 202
            [commit] = await collector.wait("send")
            [attempt] = await collector.wait("process")
        about = {
            "messaging.system": "pgbackend",
            "messaging.destination.name": "pgbackend",
            "messaging.message.id": "7",
            "messaging.message.body.size": 2,
            "cloudevents.event_id": "7",
            "cloudevents.event_source": "/shop",
            "cloudevents.event_type": "order",
            "cloudevents.event_subject": "cart",
            "cloudevents.event_spec_version": "1.0",
        }
        assert commit.name == "send pgbackend"
        assert attempt.name == "process pgbackend"
        assert commit.attributes == {
            **about, "messaging.operation.name": "send", "messaging.operation.type": "send",
        }  # fmt: skip
        port = int(target.url.rstrip("/").rpartition(":")[2])
        assert attempt.attributes == {
            **about, "messaging.operation.name": "process", "messaging.operation.type": "process",
            "messaging.consumer.group.name": "billing", "messaging.pgbackend.message.delivery_attempt": 1,
            "http.request.method": "POST", "url.full": target.url, "server.address": "127.0.0.1", "server.port": port,
            "http.response.status_code": 204,
        }  # fmt: skip

    async def test_each_attempt_is_a_span_with_the_reason_of_its_failure(
        self, database: str, target: Target, collector: Collector
    ) -> None:
        answers = iter([503, 400])
        target.answer = lambda request: web.Response(status=next(answers))
        options = {"backoffDelay": "PT0.05S", "retry": 3}
        async with (
            traces() as traced,
            serving(database, config=config(target, options=options), tracing=traced) as broker,
        ):
            assert (await broker.send(HEADERS)).status == 202
            first, second = await collector.wait("process", 2)
            [commit] = await collector.wait("send")
        assert first.trace == second.trace == commit.trace
        assert first.parent == second.parent == commit.id
        for attempt, number, status in ((first, 1, 503), (second, 2, 400)):
            assert attempt.failed
            assert attempt.attributes["error.type"] == str(status)
            assert attempt.attributes["http.response.status_code"] == status
            assert attempt.attributes["messaging.pgbackend.message.delivery_attempt"] == number
            assert str(status) in attempt.exceptions[0]["exception.message"]

    async def test_a_reply_continues_the_trace(self, database: str, target: Target, collector: Collector) -> None:
        def answer(request: Request) -> web.Response:
            if request.event().id != "7":
                return web.Response(status=204)
            return web.Response(body=envelope("reply"), headers=STRUCTURED)

        target.answer = answer
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "ce-id": "7", "traceparent": PARENT})).status == 202
            await target.wait(2)
            asked, answered = await collector.wait("process", 2)
            sent, replied = await collector.wait("send", 2)
            _, reply = await broker.stored()
        assert {span.trace for span in (asked, answered, sent, replied)} == {TRACE}
        assert replied.parent == asked.id
        assert answered.parent == replied.id
        assert replied.is_in(reply.attribute("traceparent"))

    async def test_a_reply_that_cannot_be_stored_fails_the_attempt(
        self, database: str, target: Target, collector: Collector
    ) -> None:
        large = envelope("reply", data="x" * (1 << 20))
        target.answer = lambda request: web.Response(body=large, headers=STRUCTURED)
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            assert (await broker.send(HEADERS)).status == 202
            [attempt, *_] = await collector.wait("process")
        assert attempt.failed
        assert attempt.attributes["error.type"] == "TargetError"

    async def test_an_attempt_without_an_answer_has_no_status(self, database: str, collector: Collector) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            there = Target()
            there.url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
            async with traces() as traced, serving(database, config=config(there), tracing=traced) as broker:
                assert (await broker.send(HEADERS)).status == 202
                [attempt, *_] = await collector.wait("process")
        assert attempt.failed
        assert attempt.attributes["error.type"] == "TargetError"
        assert "http.response.status_code" not in attempt.attributes

    async def test_no_span_has_the_secrets_of_a_target(
        self, database: str, target: Target, collector: Collector
    ) -> None:
        target.answer = lambda request: web.Response(status=400)
        url = target.url.replace("http://", "http://user:hunter2@") + "?token=hunter2"
        text = json.dumps({"triggers": {"billing": {"target": {"url": url, "headers": {"x-key": "hunter2"}}}}})
        async with traces() as traced, serving(database, config=text, tracing=traced) as broker:
            assert (await broker.send(HEADERS)).status == 202
            [attempt] = await collector.wait("process")
        assert "hunter2" not in repr(vars(attempt))

    async def test_an_event_that_is_not_sampled_keeps_its_trace(
        self, database: str, target: Target, collector: Collector
    ) -> None:
        async with traces() as traced, serving(database, config=config(target), tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "traceparent": PARENT[:-2] + "00"})).status == 202
            [request] = await target.wait(1)
        header = request.header("traceparent") or ""
        assert header.startswith(PARENT[:35])
        assert header.endswith("-00")
        assert collector.spans == []

    async def test_a_refused_request_makes_no_span(self, database: str, collector: Collector) -> None:
        async with traces() as traced, serving(database, tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "ce-id": "", "traceparent": PARENT})).status == 400
            assert (await broker.send(HEADERS)).status == 202
            [commit] = await collector.wait("send")
        assert commit.trace != TRACE

    async def test_an_event_at_the_size_limit_is_stored_without_a_context(
        self, database: str, collector: Collector
    ) -> None:
        """Its `traceparent` would be too much for the log."""
        data = b"x" * ((1 << 20) - 40)
        async with traces() as traced, serving(database, tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "content-type": "text/plain"}, data)).status == 202
            await collector.wait("send")
            [stored] = await broker.stored()
        assert stored.attribute("traceparent") is None
        assert stored.data_bytes == data

    async def test_an_event_with_full_attributes_is_stored_without_a_context(
        self, database: str, collector: Collector
    ) -> None:
        subject = "x" * (ATTRIBUTES_BYTES - 80)
        async with traces() as traced, serving(database, tracing=traced) as broker:
            assert (await broker.send(STRUCTURED, envelope(subject=subject))).status == 202
            await collector.wait("send")
            [stored] = await broker.stored()
        assert stored.attribute("traceparent") is None
        assert stored.subject == subject

    @pytest.mark.usefixtures("collector")
    async def test_a_long_tracestate_is_not_stored(self, database: str) -> None:
        state = ",".join(f"vendor{number}={'x' * 100}" for number in range(10))
        async with traces() as traced, serving(database, tracing=traced) as broker:
            assert (await broker.send({**HEADERS, "traceparent": PARENT, "tracestate": state})).status == 202
            [stored] = await broker.stored()
        assert (stored.attribute("traceparent") or "").startswith(PARENT[:35])
        assert stored.attribute("tracestate") is None

    @pytest.mark.usefixtures("collector")
    @pytest.mark.parametrize(
        ("traceparent", "tracestate"),
        [("x" * 4000, ""), (PARENT, "x" * 9000), (PARENT, "no pair"), (PARENT, ",".join(f"a{n}=b" for n in range(40)))],
    )
    async def test_malformed_contexts_are_not_logged(
        self, traceparent: str, tracestate: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with traces() as traced:
            headers = [(b"traceparent", traceparent.encode()), (b"tracestate", tracestate.encode())]
            with traced.receive([order()], headers) as [stored]:
                assert stored.attribute("tracestate") is None
        assert not caplog.records

    async def test_duplicate_headers_are_ignored(self, collector: Collector) -> None:
        async with traces() as traced:
            headers = [(b"traceparent", PARENT.encode()), (b"traceparent", OTHER.encode())]
            with traced.receive([order()], headers):
                pass
            [commit] = await collector.wait("send")
        assert commit.parent == ""

    async def test_the_current_span_is_not_the_parent_of_a_request(self, collector: Collector) -> None:
        """The broker's own work does not become part of a user's trace, either."""
        async with traces() as traced:
            with traced.receive([order()], []), traced.receive([order()], []):
                pass
            first, second = await collector.wait("send", 2)
        assert first.trace != second.trace
        assert first.parent == second.parent == ""


class TestEnvironment:
    async def test_the_service_is_pgbackend_unless_the_environment_names_it(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("pgbackend", "orders"):
            async with traces() as traced:
                with traced.receive([order()], []):
                    pass
                span = (await collector.wait("send"))[-1]
            assert span.resource["service.name"] == name
            collector.spans.clear()
            monkeypatch.setenv("OTEL_SERVICE_NAME", "orders")
            monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": " TRUE "},
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:1", "OTEL_TRACES_EXPORTER": "none"},
        ],
    )
    def test_traces_are_off_unless_the_environment_asks_for_them(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert tracing.from_environment() is None

    @pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
    def test_protocols_other_than_http_are_refused(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
        monkeypatch.setenv(name, "grpc")
        with pytest.raises(ConfigError, match=r"by http/protobuf, not by 'grpc'"):
            tracing.from_environment()

    async def test_shutdown_exports_ended_spans(self, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        async with traces() as traced:
            with traced.receive([order()], []):
                pass
            assert collector.spans == []
        assert len(collector.spans) == 1

    def test_a_silent_collector_delays_shutdown_by_the_timeout_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
            traced = tracing.from_environment()
            assert traced
            with traced.receive([order()], []):
                pass
            began = time.monotonic()
            traced.shutdown(0.3)
            assert time.monotonic() - began < 20


class TestWithoutTheExtra:
    PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from pgbackend.codec.attributes import ATTRIBUTES_BYTES
from pgbackend.errors import ConfigError
from pgbackend.serve import app
from pgbackend.serve.egress import dispatcher
from pgbackend.serve.ingest import handler as ingest
from pgbackend.serve.operations import metrics
from pgbackend.serve.operations import logs
from pgbackend.serve.operations import tracing
from pgbackend.serve.egress import triggers
try:
    print(tracing.from_environment())
except ConfigError as error:
    print(error)
"""

    def run(self, **environment: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        done = subprocess.run(
            [sys.executable, "-c", self.PROGRAM], env={**clean, **environment},
            stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        )  # fmt: skip
        return done.stdout.strip()

    def test_the_broker_works_without_opentelemetry(self) -> None:
        assert self.run() == "None"

    def test_asking_for_traces_names_the_missing_package(self) -> None:
        said = self.run(OTEL_EXPORTER_OTLP_ENDPOINT="http://localhost:4318")
        assert said == (
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but a package is missing (No module named "
            "'opentelemetry'). Install `pgbackend[otel]`, or set OTEL_SDK_DISABLED=true."
        )

    def test_opentelemetry_is_not_imported_unless_asked_for(self) -> None:
        program = (
            "import sys; from pgbackend.serve import app; from pgbackend.serve.operations import tracing\n"
            "assert tracing.from_environment() is None\n"
            "print([name for name in sys.modules if name.startswith('opentelemetry')])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=60
        )
        assert done.stdout == "[]\n"


def order() -> Event:
    return parse_structured(envelope("1"))
