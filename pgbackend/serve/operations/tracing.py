"""OpenTelemetry traces that pass through the log; they need `pgbackend[otel]` and the standard OTEL_… variables.

`handler` and `replies` put a span around each commit, `dispatcher` around each attempt. The log keeps an event's
context as the attributes `traceparent` and `tracestate` of CloudEvents' distributed tracing extension. An event that
brings a context keeps it; others get the context of the span around their commit. The promise: an event is stored
whether or not its trace is well-formed, sampled or exported, and OpenTelemetry is imported only for traces.

    client ──header──▶ `send` span ──`traceparent` attribute, in the log──▶ `process` span ──header──▶ target

OpenTelemetry's messaging conventions link a `process` span to the event's context, and allow that as the parent if the
span is about one event. Every attempt is about one, so it is both child and link, and users see one trace. The span of
a batch is linked to each event that brought a context.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pgbackend.codec.attributes import ATTRIBUTES_BYTES, attributes_size, event_size
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import ConfigError

Answered = Callable[[int], None]

if TYPE_CHECKING:
    from multidict import CIMultiDict
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Span
    from opentelemetry.util.types import AttributeValue

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EVENT_BYTES = 1 << 20
"""The largest attributes that the log accepts. An event that the context would make larger is stored without it."""
_STATE_CHARACTERS = 512
"""W3C asks for at least so many of a `tracestate` to be passed on. A longer one is not stored with the event."""


def from_environment(*, destination: str = "pgbackend") -> "Tracing | None":
    """Tracing as the standard OTEL_… variables ask for it; None if they do not.

    They do if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, OTEL_SDK_DISABLED is not
    `true` and OTEL_TRACES_EXPORTER is not `none`. Spans call the log `destination`. Raises ConfigError if a package is
    missing, or if the variables ask for another protocol than HTTP.
    """
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if named is None or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(f"Traces are sent by http/protobuf, not by {protocol!r}. Unset {' and '.join(_PROTOCOLS)}.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{named} asks for traces, but a package is missing ({error}). "
            "Install `pgbackend[otel]`, or set OTEL_SDK_DISABLED=true."
        ) from None
    # The environment's name for the service takes precedence.
    resource = Resource.create({SERVICE_NAME: "pgbackend"}).merge(OTELResourceDetector().detect())
    # `shutdown()` replaces the library's exit hook, which has no time limit.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, destination=destination)


class Tracing:
    """Spans around commits and attempts."""

    def __init__(self, provider: "TracerProvider", *, destination: str = "pgbackend") -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.context import Context, get_current  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self._tracer = provider.get_tracer("pgbackend")
        self._api = trace
        self._now = get_current
        # The parent of spans without another one, instead of whatever span is current.
        self._nothing = Context()
        # CloudEvents' extension has only this format, whatever OTEL_PROPAGATORS says.
        self._propagator = TraceContextTextMapPropagator()
        # It warns about each malformed header, so strangers could fill the log.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        self._destination = destination

    @contextmanager
    def receive(
        self, events: Sequence[Event], headers: Iterable[tuple[bytes, bytes]] | None
    ) -> Iterator[Sequence[Event]]:
        """A span around the commit of one request's events; yields the events to store.

        Its parent is the context in the request's headers, or else that of a single event. `headers` is None for a
        reply, whose parent is the attempt that it answers.
        """
        single = events[0] if len(events) == 1 else None
        brought = [context for event in events if (context := self._context_of(event)) is not None]
        parent = self._now() if headers is None else self._context_in(headers)
        if parent is None and single is not None and brought:
            parent = brought[0]
        # In the conventions a PRODUCER's context becomes an event's. Otherwise the span only serves a request.
        creates = any(event.attribute("traceparent") is None for event in events)
        with self._tracer.start_as_current_span(
            f"send {self._destination}",
            context=parent or self._nothing,
            kind=self._api.SpanKind.PRODUCER if creates else self._api.SpanKind.SERVER,
            attributes=self._attributes("send", single),
            links=[self._link(context) for context in brought],
        ) as span:
            if single is None:
                span.set_attribute("messaging.batch.message_count", len(events))
            with _failures(span):
                yield self._with_context(events) if creates else events

    @contextmanager
    def send(self, event: Event, headers: "CIMultiDict[str]", *, trigger: str, url: str) -> Iterator[Answered]:
        """A span around one attempt to deliver the event; its context is added to the request's headers.

        Yields a function to call with the answer's status. An exception that leaves the body marks the span as failed.
        """
        created = self._context_of(event)
        where = urlsplit(url)
        attributes = self._attributes("process", event) | {
            "messaging.consumer.group.name": trigger,
            "messaging.pgbackend.message.delivery_attempt": event.attempt,
            "http.request.method": "POST",
            "url.full": url,
            "server.address": where.hostname or "",
        }
        if where.port is not None:
            attributes["server.port"] = where.port
        with self._tracer.start_as_current_span(
            f"process {self._destination}",
            context=created or self._nothing,
            kind=self._api.SpanKind.CONSUMER,
            attributes=attributes,
            links=[] if created is None else [self._link(created)],
        ) as span:
            headers.update(self._carrier())
            with _failures(span) as answered:
                yield answered

    def shutdown(self, timeout: float = 5.0) -> None:
        """Return once ended spans are exported, after `timeout` seconds at the latest. A second call does nothing."""
        # In a thread: the library waits for half a minute if the collector is away.
        flushing = threading.Thread(target=self._provider.shutdown, name="flush traces", daemon=True)
        flushing.start()
        flushing.join(timeout)

    def _with_context(self, events: Sequence[Event]) -> list[Event]:
        """The events; those without a context get that of the current span, if they have room for it."""
        carrier = self._carrier()
        if len(carrier.get("tracestate", "")) > _STATE_CHARACTERS:
            del carrier["tracestate"]
        return [
            traced
            if event.attribute("traceparent") is None and _fits(traced := attributes_with(event, carrier))
            else event
            for event in events
        ]

    def _carrier(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def _context_of(self, event: Event) -> "Context | None":
        if (parent := event.attribute("traceparent")) is None:
            return None
        state = event.attribute("tracestate")
        return self._context({"traceparent": [parent], "tracestate": [] if state is None else [state]})

    def _context_in(self, headers: Iterable[tuple[bytes, bytes]]) -> "Context | None":
        found: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
        for name, value in headers:
            if (key := name.decode("latin-1")) in found:
                found[key].append(value.decode("latin-1"))
        # W3C has duplicate headers ignored.
        return self._context(found) if len(found["traceparent"]) == 1 else None

    def _context(self, carrier: dict[str, list[str]]) -> "Context | None":
        """The context in the carrier; None if it is malformed."""
        context = self._propagator.extract(carrier, self._nothing)
        return context if self._api.get_current_span(context).get_span_context().is_valid else None

    def _link(self, context: "Context") -> "Link":
        return self._api.Link(self._api.get_current_span(context).get_span_context())

    def _attributes(self, operation: str, event: Event | None) -> "dict[str, AttributeValue]":
        attributes: dict[str, AttributeValue] = {
            "messaging.system": "pgbackend",
            "messaging.destination.name": self._destination,
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
        }
        if event is not None:
            attributes |= {
                "messaging.message.id": event.id,
                "messaging.message.body.size": len(event.data_bytes or b""),
                "cloudevents.event_id": event.id,
                "cloudevents.event_source": event.source,
                "cloudevents.event_type": event.type,
                "cloudevents.event_spec_version": event.specversion,
            }
            if event.subject is not None:
                attributes["cloudevents.event_subject"] = event.subject
        return attributes


def _fits(event: Event) -> bool:
    return attributes_size(event.row) <= ATTRIBUTES_BYTES and event_size(event.row) <= _EVENT_BYTES


@contextmanager
def _failures(span: "Span") -> Iterator[Answered]:
    """An exception that leaves the body sets the span's `error.type`: the answer's status, or the exception's type."""
    statuses: list[int] = []

    def answered(status: int) -> None:
        statuses.append(status)
        span.set_attribute("http.response.status_code", status)

    try:
        yield answered
    except BaseException as error:
        refused = bool(statuses) and not 200 <= statuses[-1] < 300
        span.set_attribute("error.type", str(statuses[-1]) if refused else type(error).__qualname__)
        raise  # the library records the exception itself
