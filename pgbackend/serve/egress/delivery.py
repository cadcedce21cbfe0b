"""Sends events to HTTP targets and says what came of each attempt.

A `Delivery` is a dispatcher: it returns when the target answered 2xx and what it replied is in the log, and otherwise
raises what the subscription needs to know (`Reject`: final; `RetryAfter`: the target named a time; `Pause`: the target
is gone for good; `DeliveryError`: try again). The promise: a request ends within its timeout, whatever the target does,
and what is read of its response is bounded.

What went wrong is kept with the failure as the three attributes under which Knative hands on dead letters:
`knativeerrordest`, `knativeerrorcode`, `knativeerrordata`.
"""

import asyncio
import time
from base64 import b64encode
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from io import BytesIO
from time import monotonic
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from pgbackend.codec import wire
from pgbackend.codec.event import Event, attributes_with
from pgbackend.errors import EventError, Pause, Reject, RetryAfter
from pgbackend.serve.egress import connections as egress
from pgbackend.serve.egress.connections import Connector, StaleConnectionError
from pgbackend.serve.egress.replies import Replies, Reply, ReplyBudget, ReplyError, Store

if TYPE_CHECKING:
    from pgbackend.serve.operations.metrics import TriggerMetrics
    from pgbackend.serve.operations.tracing import Answered, Tracing

ATTEMPT = "Pgbackend-Attempt"
"""The header that says which try of the event a request is; the first is 1."""

_STRUCTURED = ("Content-Type", "application/cloudevents+json; charset=utf-8")
_RETRIED = frozenset({404, 408, 409, 413, 425, 429})
_ERROR_BYTES = 768  # 1,024 characters of base64, as much as Knative keeps
_DRAINED_BYTES = 1 << 16  # read to keep the connection; beyond that a new one is cheaper
_REASON_CHARACTERS = 200
_COPIED_BYTES = 1 << 20  # aiohttp warns of larger ones in one piece
_NO_ANSWER = 500  # as Knative has it where no status arrived
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
_NO_CONTENT_TYPE = ("Content-Type",)

Details = Mapping[str, str]


class DeliveryError(Exception):
    """An attempt failed and may succeed later."""

    def __init__(self, reason: str, *, details: Details, status: int | None) -> None:
        """`status` is what the target answered, or what a bad reply amounts to; None when no answer came."""
        super().__init__(reason)
        self.details = dict(details)
        self.status = status


def open_session(*, deny_private: bool = False) -> aiohttp.ClientSession:
    """A client for all targets of a broker, which uses no proxy and keeps no cookies. The caller closes it.

    With `deny_private` it connects to public addresses only.
    """
    return aiohttp.ClientSession(
        connector=Connector(deny_private=deny_private),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # Written out, because leaving aiohttp's own away costs more: bodies are kept as they are, so never compressed.
        headers={"User-Agent": "pgbackend", "Accept": "*/*", "Accept-Encoding": "identity"},
        trust_env=False,
    )


class _Answer(NamedTuple):
    status: int
    said: bytes = b""
    """Of a failure: the beginning of its body."""
    retry_after: str | None = None
    reply: Reply | None = None


class Delivery:
    """Events to one URL; a dispatcher for `Backend.subscribe`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: URL,
        *,
        trigger: str,
        timeout: float = 30.0,
        mode: Literal["binary", "structured"] = "binary",
        header_coding: Literal["percent", "none"] = "percent",
        headers: Mapping[str, str] | None = None,
        reply: Store | None = None,
        hops: int = 255,
        replies: ReplyBudget | None = None,
        connections: int = 256,
        metrics: "TriggerMetrics | None" = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """`reply` stores the events of a response; without it, or beyond `hops` of them in a chain, they are dropped.

        `replies`: the bytes that replies may hold, which deliveries of a process share.
        `connections`: how many requests may be open at a time, over all shards. One that waits for its turn does not
        use up its timeout.
        """
        self._session = session
        self._url = url.with_user(None)
        self._shown = shown(url)
        self._trigger = trigger
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=None, sock_connect=None, sock_read=None)
        self._is_binary = mode == "binary"
        self._is_coded = header_coding == "percent"
        self._headers = (*_authorization(url), *(headers or {}).items())
        self._replies: Replies | None = None
        if reply is not None:
            self._replies = Replies(
                reply, hops=hops, trigger=trigger, url=self._shown, budget=replies, metrics=metrics, tracing=tracing
            )
        self._slots = asyncio.Semaphore(connections)
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, event: Event) -> None:
        """The target has the event, and the log what it replied. Raises as the module says when it is not so."""
        headers, body = self._write(event)
        async with self._slots:
            began = monotonic()
            try:
                if self._tracing is None:
                    await self._attempt(event, headers, body)
                else:
                    with self._tracing.send(event, headers, trigger=self._trigger, url=self._shown) as answered:
                        await self._attempt(event, headers, body, answered)
            except (DeliveryError, RetryAfter, Reject, Pause) as failure:
                if self._metrics is not None:
                    self._metrics.failed(monotonic() - began, _status_of(failure))
                raise
        if self._metrics is not None:
            self._metrics.delivered(monotonic() - began)

    # What is sent.

    def _write(self, event: Event) -> tuple[CIMultiDict[str], bytes]:
        attempt = (ATTEMPT, str(event.attempt))
        if self._is_binary:
            try:
                headers, body = wire.write_binary(event, coded=self._is_coded)
            except EventError:
                pass  # names from plain SQL, content types: what only the structured mode can carry
            else:
                return CIMultiDict((*headers, attempt, *self._headers)), body
        return CIMultiDict((_STRUCTURED, attempt, *self._headers)), wire.write_structured(event)

    async def _attempt(
        self, event: Event, headers: CIMultiDict[str], body: bytes, answered: "Answered | None" = None
    ) -> None:
        try:
            async with AsyncExitStack() as held:
                answer = await self._send(headers, body, held=held)
                if answered is not None:
                    answered(answer.status)
                if not 200 <= answer.status < 300:
                    self._fail(answer)
                if answer.reply is not None and self._replies is not None:
                    await self._replies.take(answer.reply, to=event)
        except ReplyError as error:
            reason = f"{self._shown} {error}"
            raise DeliveryError(reason, details=self._details(error.code, str(error)), status=error.code) from error

    async def _send(
        self, headers: CIMultiDict[str], body: bytes, *, held: AsyncExitStack, again: bool = True
    ) -> _Answer:
        """The target's answer; `held` keeps room for a reply. DeliveryError without one, Reject if it can't be sent."""
        deadline = asyncio.get_running_loop().time() + (self._timeout.total or 0.0)
        try:
            async with self._session.post(
                self._url,
                data=None if not body else body if len(body) <= _COPIED_BYTES else BytesIO(body),
                headers=headers,
                # No content type is invented where the event has none.
                skip_auto_headers=None if "Content-Type" in headers else _NO_CONTENT_TYPE,
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                return await self._read(response, held, deadline)
        except StaleConnectionError as error:
            if again:
                # No failed attempt: the target closed an idle connection just when it was used again. Once, and over a
                # new one: its others may be as stale; or this event is what it dies of, one process after the other.
                with egress.new_connection():
                    return await self._send(headers, body, held=held, again=False)
            raise self._unanswered(error) from None
        except _BROKEN as error:
            raise self._unanswered(error) from None
        except ValueError as error:
            # aiohttp writes no header that would break out of its line.
            raise Reject(f"{self._shown}: cannot be sent: {error}", details=self._details(400, "")) from None

    # What comes back.

    async def _read(self, response: aiohttp.ClientResponse, held: AsyncExitStack, deadline: float) -> _Answer:
        status, said = response.status, bytearray()
        if not 200 <= status < 300:
            with suppress(*_BROKEN):  # the status is the verdict, whatever becomes of the body
                await egress.read(response, _ERROR_BYTES, into=said)
            return _Answer(status, bytes(said), retry_after=response.headers.get("Retry-After"))
        if self._replies is not None and (mode := self._replies.mode_of(response.headers)) is not None:
            try:
                return _Answer(status, reply=await self._replies.read(response, mode, held=held, deadline=deadline))
            except _BROKEN as error:
                raise ReplyError(status, f"broke off: {self._why(error)}") from None
        if not response.content.at_eof():
            with suppress(*_BROKEN):
                await egress.read(response, _DRAINED_BYTES, into=said)
        return _Answer(status)

    def _fail(self, answer: _Answer) -> NoReturn:
        status = answer.status
        details = self._details(status, answer.said)
        reason = f"{self._shown} answered {status}{_phrase(status)}"
        if status in _RETRIED or 500 <= status < 600:
            if (delay := _retry_after(answer.retry_after)) is not None:
                raise RetryAfter(reason, delay=delay, details=details)
            raise DeliveryError(reason, details=details, status=status)
        if status == 410:
            raise Pause(f"{reason}; change the URL of trigger {self._trigger} to go on", details=details)
        raise Reject(reason, details=details)

    def _unanswered(self, error: Exception) -> DeliveryError:
        reason = self._why(error)
        details = self._details(_NO_ANSWER, f"dispatch error: {reason}")
        return DeliveryError(f"{self._shown}: {reason}", details=details, status=None)

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no response within {self._timeout.total:g} s"
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return "the target closed the connection without an answer"
        text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
        # What is not HTTP is quoted in full, over several lines.
        return " ".join(text.split())[:_REASON_CHARACTERS] or type(error).__name__

    def _details(self, status: int, said: bytes | str) -> Details:
        details = {"knativeerrordest": self._shown, "knativeerrorcode": str(status)}
        if isinstance(said, str):
            said = said.encode(errors="backslashreplace")  # it may quote what is no text
        if said:
            details["knativeerrordata"] = b64encode(said[:_ERROR_BYTES]).decode()
        return details


class DeadLetterDelivery:
    """Given-up events to the `deadLetterURL`, each with why; a `dead_letter` dispatcher for `Backend.subscribe`."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    async def __call__(self, event: Event) -> None:
        """As `Delivery`, of the event with the attributes `knativeerror…` that its failure carries. Never pauses."""
        failure = event.failure
        details = {} if failure is None else failure.details
        extra = {name: value for name, value in details.items() if name.startswith("knativeerror")}
        try:
            await self._delivery(attributes_with(event, extra))
        except (Pause, EventError) as final:
            # Gone, or an event from plain SQL with names that no attribute has: `dead_letters` takes it.
            raise Reject(str(final), details=getattr(final, "details", None)) from None


async def refuse_without_target(_event: Event) -> None:
    """A dispatcher for a trigger without a URL: each event goes the way of dead letters at once."""
    reason = "the trigger has no target URL"
    raise Reject(reason, details={"knativeerrordata": b64encode(reason.encode()).decode()})


def _authorization(url: URL) -> tuple[tuple[str, str], ...]:
    """Basic authorization by the user of a URL, in UTF-8 (RFC 7617); aiohttp's own takes Latin-1 only."""
    if url.user is None and url.password is None:
        return ()
    return (("Authorization", "Basic " + b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()),)


def shown(url: URL) -> str:
    """The URL for logs and third parties: without user, password and query, where tokens stand."""
    return str(url.with_user(None).with_query(None).with_fragment(None))


def _status_of(failure: DeliveryError | RetryAfter | Reject | Pause) -> int | None:
    return failure.status if isinstance(failure, DeliveryError) else int(failure.details["knativeerrorcode"])


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _retry_after(text: str | None) -> float | None:
    """Seconds from now that a Retry-After header asks for, in either of its forms; None without a usable one."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:18])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # A date without a zone, as obsolete forms have it, is GMT.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - time.time())
