"""Takes CloudEvents in over HTTP: an ASGI application without a framework, since it is the broker's hot path.

A request is answered 202 only after its events are committed; anything else says what is wrong with which event, or
that the outcome is unknown. Four bounds limit what clients make the broker hold: per request, by count of events in a
batch, over all requests of an address, and over all requests together. Bodies that are too large are refused while
they arrive.

An event whose request is there in one piece, as nearly all are, needs no task and none of ASGI's messages: its
`connection` hands it to `take_whole()`. That way is for what is beyond doubt; all else goes through `__call__`, which
also finds the words for what is wrong.

| method     | path       | answer                                                                      |
|------------|------------|-----------------------------------------------------------------------------|
| POST       | any        | 202 once committed                                                          |
| OPTIONS    | any        | what is allowed; the handshake of CloudEvents' webhooks, where one is asked |
| GET, HEAD  | `/healthz` | 200 while the process lives                                                 |
| GET, HEAD  | `/readyz`  | 200 while events can be committed, else 503 and why                         |
| GET, HEAD  | `/metrics` | what is measured, for Prometheus                                            |

Only POST asks who is there. The others are for load balancers, Prometheus and webhook senders, which seldom can say,
and tell nothing of any event.
"""

import asyncio
import json
import logging
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hmac import compare_digest
from http import HTTPStatus
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from pgbackend import facts
from pgbackend.codec import wire
from pgbackend.codec.attributes import ATTRIBUTES_BYTES, attributes_size, size_of
from pgbackend.codec.event import Event
from pgbackend.codec.wire import ContentTypeError
from pgbackend.errors import (
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.serve.config.models import IngestAuth
from pgbackend.serve.ingest.clients import Budget

if TYPE_CHECKING:
    from pgbackend.backend import Backend
    from pgbackend.serve.operations.metrics import Metrics
    from pgbackend.serve.operations.tracing import Tracing

# ASGI's own words; its mappings hold what the protocol says, of many types.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

Header = tuple[bytes, bytes]
_Headers = Sequence[Header]

_ACCEPTED: Message = {"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]}
_NO_BODY: Message = {"type": "http.response.body", "body": b""}
# What attributes in headers, or the envelope of a structured event, may add to the data.
_ENVELOPE_BYTES = 1 << 16
_SMALL_BYTES = 1 << 16
_SHARE_OF_SMALL = 15
"""An address may hold so many times what is left when a small body comes in pieces. The large bodies of a reverse
proxy's clients, which get what is left once, must not keep small ones out."""
_EVENT_WEIGHT = 700
"""Bytes of the objects that an event is in memory."""
_BREATH = 0.02
"""Seconds of reading a batch after which others have their turn: a large one takes a second."""
_READ_PATHS = (b"/healthz", b"/readyz", b"/metrics")
_ACCEPT_BYTES = 1 << 12
"""No more of an Accept header is read: 64 KiB took 20 ms, for clients that need no authorization."""
_PROBE_TIMEOUT = 3.0
"""Seconds. Who asks gives up after ten at most, and is better told why."""
_PROBE_AGE = 1.0
"""Seconds for which an answer of PostgreSQL is good enough: however many ask, it is asked once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may send and make the broker hold."""

    event_bytes: int = 1 << 20
    """Of one event, as the backend's `max_event_bytes`."""
    batch_bytes: int = 8 << 20
    """Of the body of a batch. A batch is one transaction."""
    batch_events: int = 10_000
    """In one batch."""
    held_bytes: int = 256 << 20
    """Of all bodies that are arriving, and of what the events take that are being committed. Beyond it, or beyond an
    address's share as `Budget` has it, requests are told to come back."""


class Problem(Exception):  # noqa: N818 - an answer, not an error
    """A request is answered with this status, and told why as RFC 9457 describes it."""

    def __init__(self, status: int, detail: str, *headers: Header) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = ((b"content-type", b"application/problem+json"), *headers)

    def body(self) -> bytes:
        problem = {"title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail}
        return json.dumps(problem).encode()


_RETRY = (b"retry-after", b"1")
_READ = (b"allow", b"GET, HEAD")


def come_back(detail: str) -> Problem:
    """A 503 that says when to try again."""
    return Problem(503, detail, _RETRY)


STOPPING = "The broker is stopping. Nothing was stored; send it again."
_FULL = "The broker holds as many events as it can, of all or of this address. Nothing was stored; send it again."


class Ingest:
    """The ASGI application. `backend` must be initialized; `auth` says who may send.

    `has_admin`: the metrics are at the admin port, and no longer here.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        auth: IngestAuth | None = None,
        limits: Limits | None = None,
        metrics: "Metrics | None" = None,
        tracing: "Tracing | None" = None,
        has_admin: bool = False,
    ) -> None:
        self._backend = backend
        self._has_admin = has_admin
        self._authorize = _authorizer(auth or IngestAuth())
        self._limits = limits or Limits()
        self._metrics = metrics
        self._tracing = tracing
        self._readiness = _Readiness(backend)
        self._held = Budget(self._limits.held_bytes)
        self._one_batch = asyncio.Lock()
        self._retired = False
        self._stopping = False
        # Within it no limit of an event can be broken, so that nothing has to be measured.
        self._whole_bytes = self._limits.event_bytes - _ENVELOPE_BYTES

    def authorize_by(self, auth: IngestAuth) -> None:
        """From the next request on, this is who may send."""
        self._authorize = _authorizer(auth)

    def retire(self) -> None:
        """Not ready from now on. What still comes over connections that there are is taken."""
        self._retired = True

    def stop_taking(self) -> None:
        """Requests that begin from now on are told to come back; those in progress are finished."""
        self._retired = self._stopping = True

    def count_refused(self, status: int) -> None:
        """A request was answered with this status, here or by the HTTP server."""
        if self._metrics is not None:
            self._metrics.refused(status)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The request is answered, or its client has gone."""
        if scope["type"] != "http":
            return
        method = scope["method"]
        try:
            if method == "POST":
                if not await self._take(scope, receive):
                    return
                await send(_ACCEPTED)
                await send(_NO_BODY)
            elif method == "OPTIONS":
                await _write(send, 200, b"", *_allowed(scope))
            else:
                await self._tell(scope, send, is_admin=False)
        except Problem as problem:
            await self._refuse(send, problem, counts=method == "POST")
        except Exception as error:  # noqa: BLE001 - a bug must answer too, and leave its trace
            await self._refuse(send, _failure(error), counts=True)

    async def tell(self, scope: Message, send: Send) -> None:
        """A request to the admin port is answered."""
        try:
            await self._tell(scope, send, is_admin=True)
        except Problem as problem:
            await self._refuse(send, problem, counts=False)
        except Exception as error:  # noqa: BLE001 - as above
            await self._refuse(send, _failure(error), counts=False)

    # Taking events in

    def take_whole(self, headers: _Headers, body: bytes, answer: Callable[[Problem | None], None]) -> bool:
        """Take in the POST of a single event, all of which is there, in any path and without a query.

        True: `answer` gets None once the event is committed, or what is wrong. False: nothing was done, and the request
        is for `__call__`.
        """
        started = perf_counter()
        fields = dict(headers)
        size = len(body)
        if (
            len(fields) != len(headers)
            or b"content-encoding" in fields
            or (b"transfer-encoding" in fields and fields[b"transfer-encoding"].lower() != b"chunked")
            or size > self._whole_bytes
            # It is there, and goes as soon as it is committed: no client can make it stay, so no address has a share.
            or self._held.held + size > self._held.total
            or self._stopping
            or self._tracing is not None
        ):
            return False
        content_type = fields.get(b"content-type", b"").lower()
        try:
            if self._authorize is not None:
                self._authorize(headers, b"")
            if b"cloudevents" not in content_type or (mode := wire.mode_of(content_type.decode("latin-1"))) == "binary":
                event = wire.parse_binary(headers, body)
            elif mode == "structured":
                event = wire.parse_structured(body)
            else:
                return False

            def done(error: Exception | None) -> None:
                self._held.held -= size
                if error is None:
                    if self._metrics is not None:
                        self._metrics.ingested(1, perf_counter() - started)
                    answer(None)
                else:
                    problem = _problem_of(error, event)
                    self.count_refused(problem.status)
                    answer(problem)

            self._backend.produce_soon(event, done)
        except Exception:  # noqa: BLE001 - `__call__` meets it, too, and has the words for it
            return False
        self._held.held += size
        return True

    async def _take(self, scope: Message, receive: Receive) -> bool:
        """Commit what a POST brings. False when the client went away first."""
        headers: list[Header] = scope["headers"]
        if self._stopping:
            raise come_back(STOPPING)
        content_type, length = _framing(headers)
        if self._authorize is not None:
            self._authorize(headers, scope["query_string"])
        try:
            mode = wire.mode_of(content_type)
        except ContentTypeError as error:
            raise Problem(415, str(error)) from None
        limit = self._limits.batch_bytes if mode == "batch" else self._limits.event_bytes
        if mode == "structured":
            limit = limit * 2 + _ENVELOPE_BYTES  # base64 and escapes; the event itself is measured once it is parsed
        if length > limit:
            raise _too_large(mode, limit)
        address: str = scope["state"]["address"]
        body = bytearray()
        held = 0

        def hold(size: int, *, share: int = 1) -> None:
            nonlocal held
            if not self._held.take(address, size, share=share):
                raise come_back(_FULL)
            held += size

        try:
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return False
                some: bytes = message["body"]
                if len(body) + len(some) > limit:
                    raise _too_large(mode, limit)
                hold(len(some), share=_SHARE_OF_SMALL if len(body) + len(some) <= _SMALL_BYTES else 1)
                body += some
                more = message["more_body"]
            await self._commit(mode, headers, body, hold)
        finally:
            self._held.give_back(address, held)
        return True

    async def _commit(self, mode: str, headers: _Headers, body: bytearray, hold: Callable[[int], None]) -> None:
        """Commit the events of a body, which is empty afterwards. `hold` notes what a batch's events take in memory."""
        started = perf_counter()
        event: Event | None = None
        try:
            if mode == "batch":
                events: Sequence[Event] = await self._read_batch(body, hold)
            else:
                event = wire.parse_binary(headers, body) if mode == "binary" else wire.parse_structured(body)
                self._check_size(event, "The event")
                events = (event,)
        except ContentTypeError as error:
            raise Problem(415, str(error)) from None
        except wire.TooLargeError as error:
            raise Problem(413, str(error)) from None
        except EventError as error:
            raise Problem(400, str(error)) from None
        body.clear()
        if not events:
            return
        try:
            with nullcontext(events) if self._tracing is None else self._tracing.receive(events, headers) as stored:
                await self._backend.produce_many(stored)
        except PgBackendError as error:
            raise _problem_of(error, event) from None
        if self._metrics is not None:
            self._metrics.ingested(len(events), perf_counter() - started)

    async def _read_batch(self, body: bytearray, hold: Callable[[int], None]) -> list[Event]:
        events: list[Event] = []
        # One batch at a time: as text, each byte of it may take four.
        async with self._one_batch:
            breathed = perf_counter()
            for index, event in enumerate(wire.read_batch(body, most=2 * self._limits.event_bytes + _ENVELOPE_BYTES)):
                if index == self._limits.batch_events:
                    # Not read to its end: 8 MiB of the smallest are 150,000.
                    raise Problem(413, f"The batch has too many events: expected at most {self._limits.batch_events}.")
                hold(self._check_size(event, f"Batch, index {index}: the event"))
                events.append(event)
                if perf_counter() - breathed > _BREATH:
                    await asyncio.sleep(0)
                    breathed = perf_counter()
        return events

    def _check_size(self, event: Event, which: str) -> int:
        """The bytes that the event may take in memory. Raises Problem when it is too large for the log."""
        attributes, size = attributes_size(event.row), size_of(event.row)
        if attributes > ATTRIBUTES_BYTES:
            said = f"{attributes} bytes of attributes: expected at most {ATTRIBUTES_BYTES}."
        elif size > self._limits.event_bytes:
            said = f"{size} bytes: expected at most {self._limits.event_bytes}."
        else:
            return _EVENT_WEIGHT + size + 3 * attributes
        raise Problem(413, f"{which} {event.id[:80]!r} of {event.source[:80]!r} has {said}")

    # Telling how things are

    async def _tell(self, scope: Message, send: Send, *, is_admin: bool) -> None:
        """Answer a GET or a HEAD, and methods that nobody knows."""
        path = scope["raw_path"]  # as the proxy in front sees it, so that %6d cannot pass a rule about /metrics
        if scope["method"] not in ("GET", "HEAD"):
            if is_admin:
                raise Problem(405, "This port takes no events. Send them to the broker's other port.", _READ)
            said = f"{scope['method']} is not understood. Events are sent by POST."
            raise Problem(405, said, (b"allow", _methods(path)))
        if path == b"/healthz":
            await _write(send, 200, b'{"ok": "true"}', _JSON)
        elif path == b"/readyz":
            wrong = STOPPING if self._retired else await self._readiness.what_is_wrong()
            if wrong is not None:
                raise come_back(wrong)
            await _write(send, 200, b'{"ok": "true"}', _JSON)
        elif path == b"/metrics" and (is_admin or not self._has_admin) and self._metrics is not None:
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")[:_ACCEPT_BYTES]
            body, content_type = await self._metrics.exposition(accept.decode("latin-1"))
            await _write(send, 200, body, (b"content-type", content_type.encode()))
        else:
            said = "Nothing to read here. Events are sent by POST, to any path; health is at /healthz and /readyz."
            raise Problem(404, said)

    async def _refuse(self, send: Send, problem: Problem, *, counts: bool) -> None:
        if counts:
            self.count_refused(problem.status)
        await _write(send, problem.status, problem.body(), *problem.headers)


class _Readiness:
    """Whether events can be committed, asked of PostgreSQL at most once a second."""

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[str | None] | None = None

    async def what_is_wrong(self) -> str | None:
        """Why events cannot be committed; None when they can."""
        now = asyncio.get_running_loop().time()
        asking = self._asking
        if asking is None or (asking.done() and now - self._asked_at >= _PROBE_AGE):
            self._asked_at = now
            asking = self._asking = asyncio.create_task(self._ask(), name="probe")
        # Shielded: who gives up does not take the answer from the others.
        return await asyncio.shield(asking)

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                await self._backend.probe()
        except TimeoutError:
            return f"PostgreSQL did not answer within {_PROBE_TIMEOUT:g} s. Check that it runs and can be reached."
        except PgBackendError as error:
            return str(error)
        return None


def _methods(path: bytes) -> bytes:
    return b"GET, HEAD, OPTIONS, POST" if path in _READ_PATHS else b"OPTIONS, POST"


# Lenient: a plus, zeros before it, white space around it.
_is_rate = re.compile(rb"\s*(?:\+?0*[1-9][0-9]*|\*)\s*").fullmatch


def _allowed(scope: Message) -> list[Header]:
    """What an OPTIONS request is told: the methods, and to the webhook handshake that its sender may send.

    To any origin, as fast as it likes: who may send is asked with each event, by its secret, and an origin is only what
    a sender calls itself. To name it would look like a decision. Consent is given at once, so nobody is called back.
    """
    headers = [(b"allow", _methods(scope["raw_path"]))]
    fields: dict[bytes, bytes] = dict(scope["headers"])
    if fields.get(b"webhook-request-origin"):
        rate = fields.get(b"webhook-request-rate", b"*")
        if not _is_rate(rate):
            said = f"Header WebHook-Request-Rate is {rate.decode('latin-1')[:80]!r}: expected requests per minute."
            raise Problem(400, said)
        headers += [(b"webhook-allowed-origin", b"*"), (b"webhook-allowed-rate", b"*")]
    return headers


def _framing(headers: _Headers) -> tuple[str | None, int]:
    """Content type and announced length (0 without one). Refuses what would have to be decoded first."""
    content_type: str | None = None
    length = 0
    for name, value in headers:
        if name == b"content-type":
            if content_type is not None:
                raise Problem(400, "Header Content-Type stands there twice.")
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            # The parser lets through digits, 20 at most besides zeros; int() refuses thousands of those.
            length = int(value.lstrip(b"0") or b"0")
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise Problem(415, "Content-Encoding is not supported. Send the body as it is.", (b"accept-encoding", b""))
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            # The parser takes the chunks apart, and would leave what is in them as it is.
            raise Problem(501, "Of transfer codings only `chunked` is supported.")
    return content_type, length


def _too_large(mode: str, limit: int) -> Problem:
    return Problem(413, f"The body is too large for {mode} mode: expected at most {limit} bytes.")


def _problem_of(error: Exception, event: Event | None) -> Problem:
    """What a sender is told when its events could not be stored; `event`: which one it was, if it was one."""
    if isinstance(error, ProduceUncertainError):
        return come_back(
            "The outcome is unknown: PostgreSQL went away while it was committing, so the request may or may not be "
            "stored. Sent again, its events may be stored twice, with the same source and id."
        )
    if isinstance(error, NotRunningError):
        return come_back(STOPPING)
    if isinstance(error, ProduceTimeoutError):
        return come_back(f"Nothing was stored; send it again. {error}")
    which = "The batch" if event is None else f"Event {event.id[:80]!r} of {event.source[:80]!r}"
    # Classes 22 and 23: the data itself is what PostgreSQL refuses.
    refuses_data = isinstance(error, DatabaseError) and (error.sqlstate or "")[:2] in ("22", "23")
    if isinstance(error, EventError) or refuses_data:
        return Problem(400, f"{which} was refused: {error}")
    if isinstance(error, DatabaseError):
        return come_back(f"Nothing was stored; send it again. {error}")
    return _failure(error, event)


def _failure(error: Exception, event: Event | None = None) -> Problem:
    about = {} if event is None else {"event_id": event.id, "event_source": event.source}
    facts.emit("ingest failed", level=logging.ERROR, exc_info=error, error=error, **about)
    return Problem(500, "The broker failed. Its log says why.")


# Who may send

_Authorize = Callable[[_Headers, bytes], None]
_access_tokens = re.compile(rb"(?:^|&)access_token=([^&]*)").finditer


def _authorizer(auth: IngestAuth) -> _Authorize | None:
    """A check that raises 401 for who may not send; None when everybody may."""
    user = auth.user.get_secret_value().encode() if auth.user else None
    password = auth.password.get_secret_value().encode() if auth.password else b""
    token = auth.token.get_secret_value().encode() if auth.token else None
    if user is None and token is None:
        return None
    basic = None if user is None else user + b":" + password
    asked = [(b"www-authenticate", b'Basic realm="pgbackend", charset="UTF-8"')] if basic is not None else []
    asked += [(b"www-authenticate", b'Bearer realm="pgbackend"')] if token is not None else []

    def authorize(headers: _Headers, query: bytes) -> None:
        given = [value for name, value in headers if name == b"authorization"]
        if not given and token is not None and b"access_token=" in query:
            # RFC 6750's other place, which webhook targets have to support.
            # By hand: parsing a query of 20,000 names took 26 ms, and the client is not authorized yet.
            found = [one[1] for one in islice(_access_tokens(query), 2)]
            if len(found) == 1 and len(found[0]) <= 3 * len(token):
                given = [b"Bearer " + unquote_to_bytes(found[0].replace(b"+", b" "))]
        scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        credentials = credentials.strip()
        known = False
        if scheme.lower() == b"basic" and basic is not None:
            known = compare_digest(_decoded(credentials), basic)
        elif scheme.lower() == b"bearer" and token is not None:
            known = compare_digest(credentials, token)
        if not known:
            raise Problem(
                401, "Authorization is missing, or is not what the broker's `ingest` section asks for.", *asked
            )

    return authorize


def _decoded(credentials: bytes) -> bytes:
    try:
        return b64decode(credentials, validate=True)
    except ValueError:
        return b""


# What is sent back

_JSON = (b"content-type", b"application/json")


async def _write(send: Send, status: int, body: bytes, *headers: Header) -> None:
    headers = (*headers, (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
