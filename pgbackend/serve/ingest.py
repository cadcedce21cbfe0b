"""Takes CloudEvents in over HTTP: an ASGI application without a framework, since it is the broker's hot path.

A request is answered 202 only after its events are committed; anything else says what is wrong with which event, or
that the outcome is unknown. What a client can make the broker hold is bounded three ways: per request, by count of
events in a batch, and over all requests together. Bodies that are too large are refused while they arrive.
"""

import json
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from hmac import compare_digest
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qs

from pgbackend import codec, facts
from pgbackend.codec import ContentTypeError, Event
from pgbackend.errors import (
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.serve.config import IngestAuth

if TYPE_CHECKING:
    from pgbackend.backend import Backend

# ASGI's own words; its mappings hold what the protocol says, of many types.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_Headers = Iterable[tuple[bytes, bytes]]

_ACCEPTED: Message = {"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]}
_NO_BODY: Message = {"type": "http.response.body", "body": b""}
# What attributes in headers, or the envelope of a structured event, may add to the data.
_ENVELOPE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may send and make the broker hold."""

    event_bytes: int = 1 << 20
    """Of one event, as the backend's `max_event_bytes`."""
    batch_bytes: int = 8 << 20
    """Of the body of a batch. A batch is one transaction and is parsed in one go."""
    batch_events: int = 10_000
    """In one batch."""
    held_bytes: int = 256 << 20
    """Of all bodies that are arriving or being committed. Beyond it requests are told to come back."""


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    """The request is answered with this status."""

    def __init__(self, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


_RETRY = (b"retry-after", b"1")


class Ingest:
    """The ASGI application. `backend` must be initialized; `auth` says who may send."""

    def __init__(self, backend: "Backend", *, auth: IngestAuth | None = None, limits: Limits | None = None) -> None:
        self._backend = backend
        self._authorize = _authorizer(auth or IngestAuth())
        self._limits = limits or Limits()
        self._held_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The request is answered, or its client has gone."""
        if scope["type"] != "http":
            return
        try:
            if scope["method"] == "POST":
                if not await self._take(scope, receive):
                    return
                await send(_ACCEPTED)
                await send(_NO_BODY)
            else:
                await self._tell(scope, send)
        except _Refused as refused:
            await _answer(send, refused)
        except Exception as error:  # noqa: BLE001 - a bug must answer too, and leave its trace
            facts.emit("ingest failed", level=logging.ERROR, exc_info=error, error=error)
            await _answer(send, _Refused(500, "The broker failed. Its log says why."))

    async def _take(self, scope: Message, receive: Receive) -> bool:
        """Commit what a POST brings. False when the client went away first."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        content_type, length = _framing(headers)
        if self._authorize is not None:
            self._authorize(headers, scope["query_string"])
        try:
            mode = codec.mode_of(content_type)
        except ContentTypeError as error:
            raise _Refused(415, str(error)) from None
        limit = self._limits.batch_bytes if mode == "batch" else self._limits.event_bytes
        if mode == "structured":
            limit = limit * 2 + _ENVELOPE_BYTES  # base64 and escapes; the event itself is measured once it is parsed
        if length > limit:
            raise _too_large(mode, limit)
        message = await receive()
        if message["type"] != "http.request":
            return False
        body: bytes = message["body"]
        if message["more_body"]:
            return await self._take_slowly(mode, limit, body, headers, receive)
        if len(body) > limit:
            raise _too_large(mode, limit)
        self._hold(len(body))
        try:
            await self._commit(mode, headers, body)
        finally:
            self._held_bytes -= len(body)
        return True

    async def _take_slowly(
        self, mode: str, limit: int, first: bytes, headers: list[tuple[bytes, bytes]], receive: Receive
    ) -> bool:
        body = bytearray(first)
        self._hold(held := len(body))
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return False
                some: bytes = message["body"]
                if len(body) + len(some) > limit:
                    raise _too_large(mode, limit)
                self._hold(len(some))
                held += len(some)
                body += some
                more = message["more_body"]
            await self._commit(mode, headers, bytes(body))
        finally:
            self._held_bytes -= held
        return True

    def _hold(self, size: int) -> None:
        if self._held_bytes + size > self._limits.held_bytes:
            raise _Refused(503, "The broker holds as many events as it can. Send it again.", _RETRY)
        self._held_bytes += size

    async def _commit(self, mode: str, headers: _Headers, body: bytes) -> None:
        try:
            if mode == "batch":
                events = codec.parse_batch(body)
                self._check_batch(events)
                if events:
                    await self._backend.produce_many(events)
                return
            event = codec.parse_binary(headers, body) if mode == "binary" else codec.parse_structured(body)
            if len(body) + _ENVELOPE_BYTES > self._limits.event_bytes:
                self._check_size(event, "The event")
            await self._backend.produce(event)
        except ContentTypeError as error:
            raise _Refused(415, str(error)) from None
        except EventError as error:
            raise _Refused(400, str(error)) from None
        except PgBackendError as error:
            _refuse_for_backend(error)

    def _check_batch(self, events: list[Event]) -> None:
        if len(events) > self._limits.batch_events:
            raise _Refused(413, f"The batch has {len(events)} events: expected at most {self._limits.batch_events}.")
        for index, event in enumerate(events):
            self._check_size(event, f"Batch, index {index}: the event")

    def _check_size(self, event: Event, which: str) -> None:
        size = codec.size_of(event.row)
        if size > self._limits.event_bytes:
            raise _Refused(
                413,
                f"{which} {event.id[:80]!r} of {event.source[:80]!r} has {size} bytes: "
                f"expected at most {self._limits.event_bytes}.",
            )

    async def _tell(self, scope: Message, send: Send) -> None:
        """Answer what is no POST: only `/healthz` has something to say."""
        if scope["method"] not in ("GET", "HEAD"):
            allowed = b"GET, HEAD, POST" if scope["path"] == "/healthz" else b"POST"
            raise _Refused(405, f"{scope['method']} is not understood. Events are sent by POST.", (b"allow", allowed))
        if scope["path"] != "/healthz":
            raise _Refused(404, "Nothing to read here. Events are sent by POST, to any path; health is at /healthz.")
        try:
            await self._backend.probe()
        except PgBackendError as error:
            raise _Refused(503, str(error), _RETRY) from None
        await _write(send, 200, b'{"ok": "true"}', (b"content-type", b"application/json"))


def _framing(headers: _Headers) -> tuple[str | None, int]:
    """Content type and announced length (0 without one). Refuses what would have to be decoded first."""
    content_type: str | None = None
    length = 0
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            # The HTTP parser has let through digits only.
            length = int(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise _Refused(415, "Content-Encoding is not supported. Send the body as it is.", (b"accept-encoding", b""))
    return content_type, length


def _too_large(mode: str, limit: int) -> _Refused:
    return _Refused(413, f"The body is too large for {mode} mode: expected at most {limit} bytes.")


def _refuse_for_backend(error: PgBackendError) -> NoReturn:
    if isinstance(error, ProduceUncertainError):
        raise _Refused(
            503,
            "The outcome is unknown: PostgreSQL went away while it was committing, so the request may or may not be "
            "stored. Sent again, its events may be stored twice, with the same source and id.",
            _RETRY,
        ) from None
    if isinstance(error, NotRunningError):
        raise _Refused(503, "The broker is stopping. Nothing was stored; send it again.", _RETRY) from None
    if isinstance(error, ProduceTimeoutError):
        raise _Refused(503, f"Nothing was stored; send it again. {error}", _RETRY) from None
    if isinstance(error, DatabaseError):
        # Classes 22 and 23: the data itself is what PostgreSQL refuses.
        if error.sqlstate is not None and error.sqlstate[:2] in ("22", "23"):
            raise _Refused(400, f"PostgreSQL refused the event: {error}") from None
        raise _Refused(503, f"Nothing was stored; send it again. {error}", _RETRY) from None
    raise error


# Who may send

_Authorize = Callable[[_Headers, bytes], None]


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
            given = [b"Bearer " + one.encode() for one in parse_qs(query.decode("latin-1")).get("access_token", [])]
        scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        credentials = credentials.strip()
        known = False
        if scheme.lower() == b"basic" and basic is not None:
            known = compare_digest(_decoded(credentials), basic)
        elif scheme.lower() == b"bearer" and token is not None:
            known = compare_digest(credentials, token)
        if not known:
            raise _Refused(
                401, "Authorization is missing, or is not what the broker's `ingest` section asks for.", *asked
            )

    return authorize


def _decoded(credentials: bytes) -> bytes:
    try:
        return b64decode(credentials, validate=True)
    except ValueError:
        return b""


# What is sent back


async def _answer(send: Send, refused: _Refused) -> None:
    """The problem as RFC 9457 describes it."""
    problem = {"title": HTTPStatus(refused.status).phrase, "status": refused.status, "detail": refused.detail}
    body = json.dumps(problem).encode()
    await _write(send, refused.status, body, (b"content-type", b"application/problem+json"), *refused.headers)


async def _write(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    headers = (*headers, (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
