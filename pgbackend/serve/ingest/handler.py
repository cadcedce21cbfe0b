"""Takes CloudEvents in over HTTP: the broker's ASGI application, without a framework because this is its hot path.

`protocol` reads a request and calls `Ingest`, which parses it, hands its events to the backend and answers. The
promise: 202 is sent only after the events are committed, and says how many a log that deduplicates had before; any
other answer says what is wrong with which event, or that the outcome is unknown. `Limits` bound what clients make the
broker hold, and bodies that are too large are refused while they arrive.

| method     | path       | answer                                                            |
|------------|------------|-------------------------------------------------------------------|
| POST       | any        | 202 once committed                                                |
| OPTIONS    | any        | the methods; for the handshake of CloudEvents' webhooks, consent  |
| GET, HEAD  | `/healthz` | 200 while the process lives                                       |
| GET, HEAD  | `/readyz`  | 200 while events can be committed, else 503 and the reason        |
| GET, HEAD  | `/metrics` | the metrics, for Prometheus                                       |
| any        | `/console` | that of the console, and so below: `pgbackend.serve.console`      |

Besides the console only POST asks for authorization. Load balancers, Prometheus and webhook senders often cannot give
any, and the other answers tell nothing of any event.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

from pgbackend.codec import wire
from pgbackend.codec.attributes import ATTRIBUTES_BYTES, attributes_size
from pgbackend.codec.event import Event
from pgbackend.codec.wire import ContentTypeError
from pgbackend.errors import EventError, PgBackendError
from pgbackend.serve.config.models import IngestAuth
from pgbackend.serve.ingest import probes
from pgbackend.serve.ingest.authorization import authorizer
from pgbackend.serve.ingest.clients import Budget, Holding
from pgbackend.serve.ingest.limits import Limits
from pgbackend.serve.ingest.probes import Probes
from pgbackend.serve.ingest.responses import (
    STOPPING,
    Header,
    Headers,
    Message,
    Problem,
    Receive,
    Repeated,
    Send,
    not_stored,
    respond,
    unavailable,
    unexpected,
)

if TYPE_CHECKING:
    from pgbackend.backend import Backend
    from pgbackend.serve.operations.metrics import Metrics
    from pgbackend.serve.operations.tracing import Tracing

BREATH = 0.02
"""Seconds of parsing a batch after which other requests get a turn: a large batch takes a second."""

_Mode = Literal["binary", "structured", "batch"]

_ACCEPTED: Message = {"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]}
_NO_BODY: Message = {"type": "http.response.body", "body": b""}
_ENVELOPE_BYTES = 1 << 16
"""Bytes that attributes, in headers or in an envelope, may add to the data."""
_SMALL_BYTES = 1 << 16
_SHARE_OF_SMALL = 15
"""Small bodies that come in pieces may use so many times what is left of the budget. Otherwise the large bodies of a
reverse proxy's clients, which may use it once, would keep its small ones out."""
_EVENT_MEMORY = 700
"""Bytes of memory that an event takes besides its data and attributes."""
_FULL = "The broker holds too much, in all or from this address. Nothing was stored; send the request again."


class Subsite(Protocol):
    """An application that answers the requests below some path instead of `Ingest`."""

    def has(self, path: bytes, /) -> bool: ...

    async def __call__(self, scope: Message, receive: Receive, send: Send, /) -> None: ...


class Ingest:
    """The ASGI application of the port for events. `backend` must be initialized; `auth` says who may send.

    `has_admin`: an admin port tells the metrics, so this one does not. `console` answers the requests that it has.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        metrics: "Metrics",
        auth: IngestAuth | None = None,
        limits: Limits | None = None,
        tracing: "Tracing | None" = None,
        has_admin: bool = False,
        console: Subsite | None = None,
    ) -> None:
        self.probes = Probes(backend, metrics)
        self.held = Budget((limits or Limits()).held_bytes)
        """The memory of bodies and events."""
        self._backend = backend
        self._authorize = authorizer(auth or IngestAuth())
        self._limits = limits or Limits()
        self._metrics = metrics
        self._tracing = tracing
        self._has_admin = has_admin
        self._console = console
        self._one_batch = asyncio.Lock()
        self._stopping = False

    def authorize_by(self, auth: IngestAuth) -> None:
        """From the next request on, `auth` says who may send."""
        self._authorize = authorizer(auth)

    def retire(self) -> None:
        """The broker is not ready from now on. Requests over existing connections are still taken."""
        self.probes.retire()

    def stop_taking(self) -> None:
        """Refuse requests that begin from now on; requests in progress are finished."""
        self.retire()
        self._stopping = True

    def count_refused(self, status: int) -> None:
        """Count a request that was answered with this status, here or by the connection."""
        self._metrics.refused(status)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The request is answered, or its client has gone."""
        try:
            await self._answer(scope, receive, send)
        except Problem as problem:
            await self._refuse(scope, send, problem)
        except Exception as error:  # noqa: BLE001 - a bug must be answered, too, and leave its trace
            await self._refuse(scope, send, unexpected(error))

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if self._console is not None and self._console.has(scope["raw_path"]):
            await self._console(scope, receive, send)
        elif method == "POST":
            repeats = await self._take(scope, receive)
            if repeats:
                await respond(send, 202, b"", *Repeated(repeats).headers)
            elif repeats is not None:
                await send(_ACCEPTED)
                await send(_NO_BODY)
        elif method == "OPTIONS":
            await respond(send, 200, b"", *_options(scope))
        elif method in ("GET", "HEAD"):
            await self.probes.answer(scope, send, has_metrics=not self._has_admin)
        else:
            allow = (b"allow", _methods(scope["raw_path"]))
            raise Problem(405, f"Method {method} is not supported. Send events by POST.", allow)

    def take_whole(self, fields: Mapping[bytes, bytes], body: bytes, answer: Callable[[Problem | None], None]) -> bool:
        """Whether a POST of a single event, which is there in one piece, is taken; it has no query.

        `fields`: its headers, no two of which have the same name.

        True: `answer` will be called with None once the event is committed, or with `Repeated`, or with what is wrong.
        False: nothing was done, and `__call__` has to take the request, because something is unusual or wrong.

        It needs no task and no ASGI messages. Measured with benchmarks/ingest.py and 64 connections: 12,500 requests a
        second and 38 µs of the process's time for each; through `__call__` alone 5,300 and 79 µs.
        """
        started = perf_counter()
        size = len(body)
        if (
            b"content-encoding" in fields
            or (b"transfer-encoding" in fields and fields[b"transfer-encoding"].lower() != b"chunked")
            # Below this no limit of an event can be exceeded, so nothing has to be measured.
            or size > self._limits.event_bytes - _ENVELOPE_BYTES
            # No share for each address: the body is complete, so no client can make it stay.
            or self.held.held + size > self.held.total
            or self._stopping
            or self._tracing is not None
        ):
            return False
        content_type = fields.get(b"content-type", b"").lower()
        try:
            if self._authorize is not None:
                self._authorize(tuple(fields.items()), b"")
            if b"cloudevents" not in content_type or (mode := wire.mode_of(content_type.decode("latin-1"))) == "binary":
                event = wire.parse_binary(fields.items(), body)
            elif mode == "structured":
                event = wire.parse_structured(body)
            else:
                return False

            repeated: Repeated | None = None

            def repeat(events: int) -> None:
                nonlocal repeated
                repeated = Repeated(events)
                self._metrics.repeated(events)

            def done(error: Exception | None) -> None:
                self.held.held -= size
                if error is None:
                    self._metrics.ingested(1 if repeated is None else 0, perf_counter() - started)
                    answer(repeated)
                else:
                    problem = not_stored(error, event)
                    self.count_refused(problem.status)
                    answer(problem)

            self._backend.produce_soon(event, done, on_repeats=repeat)
        except Exception:  # noqa: BLE001 - `__call__` meets the same error and has the words for it
            return False
        self.held.held += size
        return True

    async def _take(self, scope: Message, receive: Receive) -> int | None:
        """Commit the events of a POST. How many are repeats; None if the client went away first. Raises Problem."""
        headers: list[Header] = scope["headers"]
        if self._stopping:
            raise unavailable(STOPPING)
        content_type, length = _framing(headers)
        if self._authorize is not None:
            self._authorize(headers, scope["query_string"])
        try:
            mode = wire.mode_of(content_type)
        except ContentTypeError as error:
            raise Problem(415, str(error)) from None
        if length > (limit := self._body_limit(mode)):
            raise _too_large(mode, limit)
        holding = Holding(self.held, scope["state"]["address"])
        try:
            body = await self._receive_body(receive, mode, holding)
            return None if body is None else await self._commit(mode, headers, body, holding)
        finally:
            holding.release()

    def _body_limit(self, mode: _Mode) -> int:
        if mode == "batch":
            return self._limits.batch_bytes
        # Base64 and escapes make an envelope larger than its event, which is measured once it is parsed.
        return self._limits.event_bytes * 2 + _ENVELOPE_BYTES if mode == "structured" else self._limits.event_bytes

    async def _receive_body(self, receive: Receive, mode: _Mode, holding: Holding) -> bytearray | None:
        """The body, for which memory is held; None if the client went away. Raises Problem."""
        limit = self._body_limit(mode)
        body = bytearray()
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            piece: bytes = message["body"]
            size = len(body) + len(piece)
            if size > limit:
                raise _too_large(mode, limit)
            if not holding.grow(len(piece), share=_SHARE_OF_SMALL if size <= _SMALL_BYTES else 1):
                raise unavailable(_FULL)
            body += piece
            has_more = message["more_body"]
        return body

    async def _commit(self, mode: _Mode, headers: Headers, body: bytearray, holding: Holding) -> int:
        """Commit the events of `body`, which is empty afterwards. How many are repeats. Raises Problem."""
        started = perf_counter()
        repeats: list[int] = []
        event: Event | None = None
        try:
            if mode == "batch":
                events: Sequence[Event] = await self._read_batch(body, holding)
            else:
                event = wire.parse_binary(headers, body) if mode == "binary" else wire.parse_structured(body)
                self._size_of(event)
                events = (event,)
        except ContentTypeError as error:
            raise Problem(415, str(error)) from None
        except wire.TooLargeError as error:
            raise Problem(413, str(error)) from None
        except EventError as error:
            raise Problem(400, str(error)) from None
        body.clear()
        if not events:
            return 0
        try:
            with nullcontext(events) if self._tracing is None else self._tracing.receive(events, headers) as stored:
                await self._backend.produce_many(stored, on_repeats=repeats.append)
        except PgBackendError as error:
            raise not_stored(error, event) from None
        found = sum(repeats)
        self._metrics.ingested(len(events) - found, perf_counter() - started)
        if found:
            self._metrics.repeated(found)
        return found

    async def _read_batch(self, body: bytearray, holding: Holding) -> list[Event]:
        """The events of a batch, for which memory is held. Raises Problem and EventError."""
        events: list[Event] = []
        # One batch at a time: as text, each of its bytes may take four.
        async with self._one_batch:
            paused_at = perf_counter()
            max_characters = 2 * self._limits.event_bytes + _ENVELOPE_BYTES
            for index, event in enumerate(wire.parse_batch(body, max_characters=max_characters)):
                if index == self._limits.batch_events:
                    # The rest is not parsed: 8 MiB can hold 150,000 events.
                    raise Problem(413, f"The batch has too many events: expected at most {self._limits.batch_events}.")
                if not holding.grow(self._size_of(event, index)):
                    raise unavailable(_FULL)
                events.append(event)
                if perf_counter() - paused_at > BREATH:
                    await asyncio.sleep(0)
                    paused_at = perf_counter()
        return events

    def _size_of(self, event: Event, index: int | None = None) -> int:
        """The bytes of memory that the event takes; `index`: its place in a batch.

        Raises Problem if it is too large for the log.
        """
        row = event.row
        attributes = attributes_size(row)
        size = len(row[10] or b"") + attributes
        if attributes > ATTRIBUTES_BYTES:
            excess = f"{attributes} bytes of attributes: expected at most {ATTRIBUTES_BYTES}."
        elif size > self._limits.event_bytes:
            excess = f"{size} bytes: expected at most {self._limits.event_bytes}."
        else:
            return _EVENT_MEMORY + size + 3 * attributes
        which = "The event" if index is None else f"Batch, index {index}: the event"
        raise Problem(413, f"{which} {event.id[:80]!r} of {event.source[:80]!r} has {excess}")

    async def _refuse(self, scope: Message, send: Send, problem: Problem) -> None:
        if scope["method"] == "POST":
            self.count_refused(problem.status)
        await respond(send, problem.status, problem.body(), *problem.headers)


def _methods(path: bytes) -> bytes:
    return b"GET, HEAD, OPTIONS, POST" if path in probes.PATHS else b"OPTIONS, POST"


# Lenient: a plus, leading zeros, white space around it.
_is_rate = re.compile(rb"\s*(?:\+?0*[1-9][0-9]*|\*)\s*").fullmatch


def _options(scope: Message) -> list[Header]:
    """The headers that answer an OPTIONS request: the methods, and consent to the webhook handshake.

    Every origin may send at any rate. Authorization decides with each event, and an origin is only what a sender calls
    itself: naming it would look like a decision. Consent is given at once, so no callback is called.
    """
    headers = [(b"allow", _methods(scope["raw_path"]))]
    fields: dict[bytes, bytes] = dict(scope["headers"])
    if fields.get(b"webhook-request-origin"):
        rate = fields.get(b"webhook-request-rate", b"*")
        if not _is_rate(rate):
            given = rate.decode("latin-1")[:80]
            raise Problem(400, f"Header WebHook-Request-Rate is {given!r}: expected requests per minute.")
        headers += [(b"webhook-allowed-origin", b"*"), (b"webhook-allowed-rate", b"*")]
    return headers


def _framing(headers: Headers) -> tuple[str | None, int]:
    """Content type and Content-Length, 0 without one. Raises Problem for bodies that would have to be decoded."""
    content_type: str | None = None
    length = 0
    for name, value in headers:
        if name == b"content-type":
            if content_type is not None:
                raise Problem(400, "Duplicate header Content-Type.")
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            # The parser accepts at most 20 digits after any number of zeros; int() refuses thousands of those.
            length = int(value.lstrip(b"0") or b"0")
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise Problem(415, "Content-Encoding is not supported. Send the body as it is.", (b"accept-encoding", b""))
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            # The parser would take the chunks apart and leave their content encoded.
            raise Problem(501, "Transfer-Encoding: only `chunked` is supported.")
    return content_type, length


def _too_large(mode: _Mode, limit: int) -> Problem:
    return Problem(413, f"The body is too large for {mode} mode: expected at most {limit} bytes.")
