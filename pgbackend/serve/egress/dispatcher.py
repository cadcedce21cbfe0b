"""Dispatches events to HTTP targets.

A `TargetDispatcher` is a dispatcher for `Backend.subscribe()`. It returns when the target answered 2xx and its reply is
in the log; otherwise it raises what `outcomes` decides. The promise: a request ends within its timeout, whatever the
target does, and what is read of its response is bounded.
"""

import asyncio
from base64 import b64encode
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Literal

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from pgbackend.codec import wire
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import EventError, Pause, Reject, RetryAfter
from pgbackend.serve.egress import outcomes
from pgbackend.serve.egress.connections import Pool, new_connection
from pgbackend.serve.egress.exchange import Exchange, Line, Response
from pgbackend.serve.egress.outcomes import Answer, TargetError
from pgbackend.serve.egress.protocol import StaleConnectionError, read
from pgbackend.serve.egress.replies import Replies, Reply, ReplyError

if TYPE_CHECKING:
    from pgbackend.serve.operations.metrics import TriggerMetrics
    from pgbackend.serve.operations.tracing import Answered, Tracing

ATTEMPT = "Pgbackend-Attempt"
"""The header with the number of the attempt; the first is 1."""

_STRUCTURED = ("Content-Type", "application/cloudevents+json; charset=utf-8")
_DRAINED_BYTES = 1 << 16  # read to reuse the connection; for longer bodies a new one is cheaper
_Headers = list[tuple[str, str]]
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the events of a trigger go, and how their requests are written."""

    trigger: str
    url: URL
    timeout: float = 30.0
    """Seconds for one request. Waiting for one of the `connections` does not count."""
    mode: Literal["binary", "structured"] = "binary"
    header_coding: Literal["percent", "none"] = "percent"
    headers: Mapping[str, str] = field(default_factory=dict)
    connections: int = 256
    """Requests open at a time, over all shards."""


class TargetDispatcher:
    """Dispatches events to one endpoint."""

    def __init__(
        self,
        pool: Pool,
        endpoint: Endpoint,
        replies: Replies,
        *,
        metrics: "TriggerMetrics | None" = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._endpoint = endpoint
        self._public_url = outcomes.public_url(endpoint.url)
        self._headers = (*_authorization(endpoint.url), *endpoint.headers.items())
        self._line = Line(pool, endpoint.url.with_user(None), given=[name for name, _ in self._headers])
        self._slots = asyncio.Semaphore(endpoint.connections)
        self._replies = replies
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, event: Event) -> None:
        """The target has the event, and the log has its reply. Raises what `outcomes` decides."""
        headers, body = self._write(event)
        async with self._slots:
            began = monotonic()
            try:
                if self._tracing is None:
                    await self._attempt(event, headers, body)
                else:
                    trigger, traced = self._endpoint.trigger, CIMultiDict(headers)
                    with self._tracing.send(event, traced, trigger=trigger, url=self._public_url) as answered:
                        await self._attempt(event, list(traced.items()), body, answered)
            except (TargetError, RetryAfter, Reject, Pause) as failure:
                if self._metrics is not None:
                    self._metrics.failed(monotonic() - began, outcomes.status_of(failure))
                raise
        if self._metrics is not None:
            self._metrics.delivered(monotonic() - began)

    def _write(self, event: Event) -> tuple[_Headers, bytes]:
        """The headers and the body of the request."""
        attempt = (ATTEMPT, str(event.attempt))
        if self._endpoint.mode == "binary":
            try:
                headers, body = wire.write_binary(event, coded=self._endpoint.header_coding == "percent")
            except EventError:
                pass  # plain SQL may store names and content types that only structured mode can carry
            else:
                return [*headers, attempt, *self._headers], body
        return [_STRUCTURED, attempt, *self._headers], wire.write_structured(event)

    async def _attempt(self, event: Event, headers: _Headers, body: bytes, answered: "Answered | None" = None) -> None:
        try:
            async with AsyncExitStack() as room:
                answer, reply = await self._send(headers, body, room)
                if answered is not None:
                    answered(answer.status)
                if not answer.is_success:
                    raise outcomes.failure_of(answer, url=self._public_url, trigger=self._endpoint.trigger)
                if reply is not None:
                    await self._replies.store(reply, to=event)
        except ReplyError as error:
            raise outcomes.bad_reply(error.code, str(error), url=self._public_url) from error

    async def _send(
        self, headers: _Headers, body: bytes, room: AsyncExitStack, *, again: bool = True
    ) -> tuple[Answer, Reply | None]:
        """The target's answer and reply; `room` keeps memory for the reply. Raises TargetError, Reject, ReplyError."""
        deadline = asyncio.get_running_loop().time() + self._endpoint.timeout
        try:
            head = self._line.head(headers, len(body))
            async with Exchange(self._line, deadline=deadline) as exchange:
                return await self._read(await exchange.post(head, body), room, deadline)
        except StaleConnectionError as error:
            if again:
                # Not a failed attempt. Retry once, on a new connection: other idle ones may be stale as well, or this
                # event kills the target's processes one by one.
                with new_connection():
                    return await self._send(headers, body, room, again=False)
            raise self._no_answer(error) from None
        except _BROKEN as error:
            raise self._no_answer(error) from None
        except ValueError as error:
            raise outcomes.cannot_be_sent(error, url=self._public_url) from None

    async def _read(self, response: Response, room: AsyncExitStack, deadline: float) -> tuple[Answer, Reply | None]:
        """The answer, and its reply if it has one. A body that breaks off matters only for a reply."""
        answer, body = Answer(response.status), bytearray()
        if not answer.is_success:
            with suppress(*_BROKEN):
                await read(response.content, outcomes.BODY_BYTES, into=body)
            return Answer(response.status, bytes(body), response.headers.get("Retry-After")), None
        if (mode := self._replies.mode_of(response.headers)) is not None:
            try:
                return answer, await self._replies.read(response, mode, room, deadline=deadline)
            except _BROKEN as error:
                reason = outcomes.why_broken(error, timeout=self._endpoint.timeout)
                raise ReplyError(response.status, f"broke off: {reason}") from None
        if not response.content.at_eof():
            with suppress(*_BROKEN):
                await read(response.content, _DRAINED_BYTES, into=body)
        return answer, None

    def _no_answer(self, error: Exception) -> TargetError:
        return outcomes.no_answer(outcomes.why_broken(error, timeout=self._endpoint.timeout), url=self._public_url)


class DeadLetterDispatcher:
    """Dispatches given-up events to `deadLetterURL`; a `dead_letter` dispatcher for `Backend.subscribe()`."""

    def __init__(self, dispatcher: TargetDispatcher) -> None:
        self._dispatcher = dispatcher

    async def __call__(self, event: Event) -> None:
        """As `TargetDispatcher`; the event gets the `knativeerror…` attributes of its failure. Never raises Pause."""
        details = {} if event.failure is None else event.failure.details
        extra = {name: value for name, value in details.items() if name.startswith("knativeerror")}
        try:
            await self._dispatcher(attributes_with(event, extra))
        except (Pause, EventError) as final:
            # The target is gone, or plain SQL stored names that no attribute may have: keep it in `dead_letters`.
            raise Reject(str(final), details=getattr(final, "details", None)) from None


async def reject_without_target(_event: Event) -> None:
    """The dispatcher of a trigger without a URL: each event is given up at once."""
    reason = "the trigger has no target URL"
    raise Reject(reason, details={"knativeerrordata": b64encode(reason.encode()).decode()})


def _authorization(url: URL) -> tuple[tuple[str, str], ...]:
    """The Authorization header for the user of a URL, in UTF-8 (RFC 7617); aiohttp encodes it as Latin-1."""
    if url.user is None and url.password is None:
        return ()
    return (("Authorization", "Basic " + b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()),)
