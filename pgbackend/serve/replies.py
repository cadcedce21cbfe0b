"""What targets reply: which responses carry events, how they come into the log, and where chains of them end.

A reply is read like anything that is sent to the broker: its Content-Type alone says which mode it is in. Its hop
counter, the extension attribute `knativebrokerttl` as Knative's brokers have it, is one less than that of the event it
answers. The promise: of a chain of replies, however it is spread over targets, there is an end; and what a target
replied is in the log before its delivery counts.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import aiohttp

from pgbackend import facts, wire
from pgbackend.errors import EventError, PgBackendError
from pgbackend.event import Event, attributes_with
from pgbackend.serve import egress

if TYPE_CHECKING:
    from pgbackend.serve.metrics import TriggerMetrics
    from pgbackend.serve.tracing import Tracing

HOPS = "knativebrokerttl"
EVENT_BYTES = 1 << 20
"""The data of a reply; the same as what is taken in over HTTP."""
_ENVELOPE_BYTES = 1 << 16
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


class Replies:
    """Takes what one target replies to `store`."""

    def __init__(
        self,
        store: Store,
        *,
        hops: int,
        trigger: str,
        url: str,
        metrics: "TriggerMetrics | None",
        tracing: "Tracing | None",
    ) -> None:
        self._store = store
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

    async def read(self, response: aiohttp.ClientResponse, mode: Mode) -> Reply:
        """The whole reply. Raises ReplyError for one that is compressed or too large, else as `egress.read()`."""
        if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            # Although none was asked for. Kept as it is, an event's data would not be what its type says.
            raise ReplyError(response.status, f"has the Content-Encoding {encoding!r}")
        limit, body = limit_of(mode), bytearray()
        await egress.read(response, limit + 1, into=body)
        if len(body) > limit:
            raise ReplyError(response.status, f"has more than {limit} bytes")
        return Reply(mode, response.status, response.raw_headers, bytes(body))

    async def take(self, reply: Reply, *, to: Event) -> None:
        """What was replied to an event is in the log, or is not worth it. Raises ReplyError."""
        try:
            found = _parse(reply)
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


def _parse(reply: Reply) -> list[Event]:
    if reply.mode == "batch":
        return wire.parse_batch(reply.body)
    if reply.mode == "structured":
        return [wire.parse_structured(reply.body)]
    return [wire.parse_binary(reply.headers, reply.body)]


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
