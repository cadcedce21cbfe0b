"""What targets reply: which responses carry events, how they come into the log, and where chains of them end.

A reply is read like anything that is sent to the broker: its Content-Type alone says which mode it is in. Its hop
counter, the extension attribute `knativebrokerttl` as Knative's brokers have it, is one less than that of the event it
answers. The promise: of a chain of replies, however it is spread over targets, there is an end; what a target replied
is in the log before its delivery counts; and all replies of a process together are held within one bound of bytes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import aiohttp

from pgbackend import facts
from pgbackend.codec import wire
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import EventError, PgBackendError
from pgbackend.serve.egress import connections as egress

if TYPE_CHECKING:
    from pgbackend.serve.operations.metrics import TriggerMetrics
    from pgbackend.serve.operations.tracing import Tracing

HOPS = "knativebrokerttl"
EVENT_BYTES = 1 << 20
"""The data of a reply; the same as what is taken in over HTTP."""
BATCH_EVENTS = 100
"""In one reply. Each may be replied to by a batch again."""
_ENVELOPE_BYTES = 1 << 16
_SMALL_BYTES = 1 << 16
"""A reply within it is read at once. The connection itself holds as much."""
_HELD_BYTES = 128 << 20
"""All larger replies together hold at most this, from their first byte to their commit. Others wait for their turn."""
_SHARE = 4
"""One trigger's replies hold at most this part of it: a target that never ends its replies delays no other's."""
_IN_MEMORY = 4
"""Bytes that a byte of a body may take: as text, with one character that needs four, each takes four."""
_BREATH = 0.02
"""Seconds of parsing after which others have their turn."""
_BAD_REPLY, _NOT_STORED = 502, 503

Mode = Literal["binary", "structured", "batch"]
Store = Callable[[Sequence[Event]], Awaitable[None]]


class ReplyError(Exception):
    """The target took the event, but what it replied cannot be had or stored. May succeed later."""

    def __init__(self, status: int, reason: str, *, code: int = _BAD_REPLY) -> None:
        """`status` is what the target answered, `code` the status that this amounts to."""
        super().__init__(f"answered {status}, but its reply {reason}")
        self.code = code


class Reply(NamedTuple):
    """The response that carries events."""

    mode: Mode
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class ReplyBudget:
    """Bytes that replies hold. Those for whom there is no room wait, in order."""

    def __init__(self, limit: int = _HELD_BYTES) -> None:
        self.limit = limit
        self._held = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        """So many bytes are the caller's while it is open. One that wants more than the limit has it alone."""
        async with self._turn:
            while self._held and self._held + size > self.limit:
                self._room.clear()
                await self._room.wait()
            self._held += size
        try:
            yield
        finally:
            self._held -= size
            self._room.set()


class Replies:
    """Takes what one target replies to `store`."""

    def __init__(
        self,
        store: Store,
        *,
        hops: int,
        trigger: str,
        url: str,
        budget: ReplyBudget | None,
        metrics: "TriggerMetrics | None",
        tracing: "Tracing | None",
    ) -> None:
        """`budget`: what all replies of the process share."""
        self._store = store
        self._budget = budget or ReplyBudget()
        self._share = ReplyBudget(self._budget.limit // _SHARE)
        self._hops = hops
        self._trigger = trigger
        self._url = url
        self._metrics = metrics
        self._tracing = tracing

    def mode_of(self, headers: Mapping[str, str]) -> Mode | None:
        """The mode of the events in a response with these headers; None when it has none."""
        try:
            mode = wire.mode_of(headers.get("Content-Type"))
        except EventError as error:
            self._ignore(error)
            return None
        return mode if mode != "binary" or "ce-specversion" in headers else None

    async def read(
        self, response: aiohttp.ClientResponse, mode: Mode, *, held: AsyncExitStack, deadline: float
    ) -> Reply:
        """The whole reply, for which `held` keeps room.

        Raises ReplyError for one that is compressed or too large, TimeoutError when there is no room for it by the
        `deadline` of the loop's clock, else as `egress.read()`.
        """
        if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            # Although none was asked for. Kept as it is, an event's data would not be what its type says.
            raise ReplyError(response.status, f"has the Content-Encoding {encoding!r}")
        limit, body = limit_of(mode), bytearray()
        if (length := response.content_length or 0) > limit:
            raise ReplyError(response.status, f"has more than {limit} bytes")
        await egress.read(response, _SMALL_BYTES + 1, into=body)
        if len(body) > _SMALL_BYTES:
            # For all of it before more is read: replies that wait for each other in the middle would wait for ever.
            size = (length or limit) * _IN_MEMORY
            async with asyncio.timeout_at(deadline):
                await held.enter_async_context(self._share.taken(size))
                await held.enter_async_context(self._budget.taken(size))
            await egress.read(response, limit + 1, into=body)
        if len(body) > limit:
            raise ReplyError(response.status, f"has more than {limit} bytes")
        return Reply(mode, response.status, response.raw_headers, bytes(body))

    async def take(self, reply: Reply, *, to: Event) -> None:
        """What was replied to an event is in the log, or is not worth it. Raises ReplyError."""
        try:
            found = await _parse(reply)
        except EventError as error:
            self._ignore(error, event_id=to.id, event_source=to.source)
            return
        events = list(_counted(found, to=to, most=self._hops))
        if len(events) < len(found):
            facts.emit(
                "reply dropped after too many hops", level=logging.WARNING,
                trigger=self._trigger, url=self._url, events=len(found) - len(events),
                event_id=to.id, event_source=to.source,
            )  # fmt: skip
        if not events:
            return
        try:
            with nullcontext(events) if self._tracing is None else self._tracing.receive(events, None) as traced:
                await self._store(traced)
        except PgBackendError as error:
            code = _BAD_REPLY if isinstance(error, EventError) else _NOT_STORED
            raise ReplyError(reply.status, f"was not stored: {error}", code=code) from error
        if self._metrics is not None:
            self._metrics.replied(len(events))

    def _ignore(self, error: EventError, **about: Any) -> None:
        facts.emit(
            "reply ignored", level=logging.WARNING, trigger=self._trigger, url=self._url, error=str(error), **about
        )  # fmt: skip


def limit_of(mode: Mode) -> int:
    """Bytes that the body of a reply may have."""
    # Base64, escapes and the envelope come on top of an event's data.
    return EVENT_BYTES if mode == "binary" else EVENT_BYTES * 2 + _ENVELOPE_BYTES


async def _parse(reply: Reply) -> list[Event]:
    """Raises ReplyError for a batch of too many events, which is not read to its end."""
    if reply.mode == "structured":
        return [wire.parse_structured(reply.body)]
    if reply.mode == "binary":
        return [wire.parse_binary(reply.headers, reply.body)]
    events: list[Event] = []
    breathed = perf_counter()
    for event in wire.read_batch(reply.body):
        if len(events) == BATCH_EVENTS:
            raise ReplyError(reply.status, f"has more than {BATCH_EVENTS} events")
        events.append(event)
        if perf_counter() - breathed > _BREATH:
            await asyncio.sleep(0)
            breathed = perf_counter()
    return events


def _counted(replies: list[Event], *, to: Event, most: int) -> Iterator[Event]:
    """Those of the replies to an event that may go on, each with its hop counter."""
    # An event that counts from higher than this broker does would go around for longer than its operator wants.
    left = min(_hops(to, most), most) - 1
    for reply in replies:
        if (hops := min(_hops(reply, left), left)) > 0:
            yield attributes_with(reply, {HOPS: str(hops)})


def _hops(event: Event, default: int) -> int:
    """Its counter; what is not a whole number is none."""
    text = event.attribute(HOPS) or ""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else default
