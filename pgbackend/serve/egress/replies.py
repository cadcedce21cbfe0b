"""The replies of targets: which responses carry events, how these get into the log, and where a chain of them ends.

A reply is read like anything that is sent to the broker: its Content-Type alone decides the mode. Its hop counter, the
extension attribute `knativebrokerttl` of Knative's brokers, is one less than that of the event it answers.

The promise: every chain of replies ends, over however many targets it goes; a reply is in the log before its event
counts as delivered; and all replies of a process together stay within one bound of memory.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pgbackend import facts
from pgbackend.codec import wire
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import EventError, PgBackendError
from pgbackend.serve.egress import protocol

if TYPE_CHECKING:
    from pgbackend.serve.egress.exchange import Response
    from pgbackend.serve.operations.metrics import TriggerMetrics
    from pgbackend.serve.operations.tracing import Tracing

HOPS = "knativebrokerttl"
EVENT_BYTES = 1 << 20
"""The data of a replied event; ingest takes as much."""
BATCH_EVENTS = 100
"""The events of one reply. Each may cause a batch again."""
_ENVELOPE_BYTES = 1 << 16
_SMALL_BYTES = 1 << 16
"""A reply of this size needs no budget: its connection holds as much anyway."""
_BUDGET_BYTES = 128 << 20
"""The memory of all larger replies together, from their first byte to their commit."""
_SHARE = 4
"""One trigger gets this fraction of the budget, so that replies that never end delay no other trigger."""
_MEMORY_FACTOR = 4
"""Bytes of memory for a byte of a body: one character beyond the BMP makes Python keep four for each."""
_PARSING_TIME = 0.02
"""Seconds of parsing after which other tasks get a turn."""
_BAD_REPLY, _NOT_STORED = 502, 503

Mode = Literal["binary", "structured", "batch"]
Store = Callable[[Sequence[Event]], Awaitable[None]]


class ReplyError(Exception):
    """The target took the event, but its reply cannot be read or stored. A retry may succeed."""

    def __init__(self, status: int, reason: str, *, code: int = _BAD_REPLY) -> None:
        """`status` is what the target answered; `code` is the status that the failure amounts to."""
        super().__init__(f"answered {status}, but its reply {reason}")
        self.code = code


class Reply(NamedTuple):
    """A response that carries events."""

    mode: Mode
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class ReplyBudget:
    """A number of bytes that replies may hold together."""

    def __init__(self, limit: int = _BUDGET_BYTES) -> None:
        self.limit = limit
        self._reserved = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncIterator[None]:
        """Wait in line for `size` bytes, and hold them while the context is open.

        A reply larger than the limit waits until it has the budget for itself.
        """
        async with self._turn:
            while self._reserved and self._reserved + size > self.limit:
                self._room.clear()
                await self._room.wait()
            self._reserved += size
        try:
            yield
        finally:
            self._reserved -= size
            self._room.set()


class Replies:
    """Reads the replies of one target, and stores them."""

    def __init__(
        self,
        store: Store,
        *,
        trigger: str,
        url: str,
        max_hops: int,
        budget: ReplyBudget,
        metrics: "TriggerMetrics | None" = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """All replies of the process share `budget`. `url` is for logs."""
        self._store = store
        self._trigger = trigger
        self._url = url
        self._max_hops = max_hops
        self._budget = budget
        self._share = ReplyBudget(budget.limit // _SHARE)
        self._metrics = metrics
        self._tracing = tracing

    def mode_of(self, headers: Mapping[str, str]) -> Mode | None:
        """The mode of the events in a response with these headers; None when it carries none."""
        try:
            mode = wire.mode_of(headers.get("Content-Type"))
        except EventError as error:
            self._report_ignored(error)
            return None
        return mode if mode != "binary" or "ce-specversion" in headers else None

    async def read(self, response: "Response", mode: Mode, room: AsyncExitStack, *, deadline: float) -> Reply:
        """The whole reply, whose memory `room` keeps reserved.

        Raises ReplyError for a reply that is compressed or too large, TimeoutError when no memory is free before the
        `deadline` of the loop's clock, and aiohttp's errors when the response breaks off.
        """
        if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            # The request asked for none. Stored compressed, the data would not be what its content type says.
            raise ReplyError(response.status, f"has the Content-Encoding {encoding!r}")
        limit, body = limit_of(mode), bytearray()
        if (length := response.content_length or 0) > limit:
            raise ReplyError(response.status, f"has more than {limit} bytes")
        await protocol.read(response.content, _SMALL_BYTES + 1, into=body)
        if len(body) > _SMALL_BYTES:
            # Reserve for the whole reply: half-read replies that wait for each other would wait for ever.
            size = (length or limit) * _MEMORY_FACTOR
            async with asyncio.timeout_at(deadline):
                await room.enter_async_context(self._share.reserved(size))
                await room.enter_async_context(self._budget.reserved(size))
            await protocol.read(response.content, limit + 1, into=body)
        if len(body) > limit:
            raise ReplyError(response.status, f"has more than {limit} bytes")
        return Reply(mode, response.status, response.raw_headers, bytes(body))

    async def store(self, reply: Reply, *, to: Event) -> None:
        """The events of the reply to an event are in the log, except invalid ones and those without hops left.

        Raises ReplyError.
        """
        try:
            found = await _parse(reply)
        except EventError as error:
            self._report_ignored(error, event_id=to.id, event_source=to.source)
            return
        events = list(_with_hops(found, to=to, max_hops=self._max_hops))
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

    def _report_ignored(self, error: EventError, **fields: Any) -> None:
        facts.emit(
            "reply ignored", level=logging.WARNING, trigger=self._trigger, url=self._url, error=str(error), **fields
        )  # fmt: skip


def limit_of(mode: Mode) -> int:
    """The most bytes that the body of a reply may have."""
    # In JSON an event has an envelope, and its data has escapes or base64.
    return EVENT_BYTES if mode == "binary" else EVENT_BYTES * 2 + _ENVELOPE_BYTES


async def _parse(reply: Reply) -> list[Event]:
    """The events of the reply. Raises EventError, and ReplyError for a batch of too many."""
    if reply.mode == "structured":
        return [wire.parse_structured(reply.body)]
    if reply.mode == "binary":
        return [wire.parse_binary(reply.headers, reply.body)]
    events: list[Event] = []
    turn_began = perf_counter()
    for event in wire.parse_batch(reply.body):
        if len(events) == BATCH_EVENTS:
            raise ReplyError(reply.status, f"has more than {BATCH_EVENTS} events")
        events.append(event)
        if perf_counter() - turn_began > _PARSING_TIME:
            await asyncio.sleep(0)
            turn_began = perf_counter()
    return events


def _with_hops(replies: list[Event], *, to: Event, max_hops: int) -> Iterator[Event]:
    """The replies to an event that have hops left, each with its counter."""
    # An event may come with a counter above this broker's limit: the limit wins.
    left = min(_hops(to, max_hops), max_hops) - 1
    for reply in replies:
        if (hops := min(_hops(reply, left), left)) > 0:
            yield attributes_with(reply, {HOPS: str(hops)})


def _hops(event: Event, default: int) -> int:
    """The counter of the event; the default when it has none, or one that is not a whole number."""
    text = event.attribute(HOPS) or ""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else default
