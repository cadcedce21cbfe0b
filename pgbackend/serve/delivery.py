"""Sends events to HTTP targets and says what came of each attempt.

A `Delivery` is a dispatcher: it returns when the target answered 2xx, and otherwise raises what the subscription's
retry policy needs to know (`Reject`: final; `RetryAfter`: the target named a time; `DeliveryError`: try again). The
promise: an attempt ends within its timeout, whatever the target does, and reads a bounded part of a response.

What went wrong is kept with the failure as the three attributes under which Knative hands on dead letters:
`knativeerrordest`, `knativeerrorcode`, `knativeerrordata`.
"""

import logging
import time
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from io import BytesIO
from types import SimpleNamespace
from typing import Literal

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from pgbackend import codec, facts
from pgbackend.codec import Event
from pgbackend.errors import EventError, Reject, RetryAfter

_RETRIED = frozenset({404, 408, 409, 413, 425, 429})
_ERROR_BYTES = 768  # 1,024 characters of base64, as much as Knative keeps
_DRAINED_BYTES = 1 << 16  # read to keep the connection; beyond that a new one is cheaper
_COPIED_BYTES = 1 << 20  # aiohttp warns of larger ones in one piece
_NO_AUTO_HEADERS = ("Accept", "Accept-Encoding", "Content-Type")

Details = Mapping[str, str]


class DeliveryError(Exception):
    """An attempt failed and may succeed later."""

    def __init__(self, reason: str, *, details: Details) -> None:
        super().__init__(reason)
        self.details = dict(details)


def open_session() -> aiohttp.ClientSession:
    """A client for all targets of a broker. The caller closes it.

    It has no limit of connections: how many are open is what the subscriptions' `concurrency` allows, and a pool that
    deliveries wait for would let one slow target use up the timeouts of the others on its host.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trace_configs=[_tracing()],
        headers={"User-Agent": "pgbackend"},
        skip_auto_headers=_NO_AUTO_HEADERS,
    )


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
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._session = session
        self._url = url
        self._shown = shown(url)
        self._trigger = trigger
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=None, sock_connect=None, sock_read=None)
        self._is_binary = mode == "binary"
        self._headers = dict(headers or {})
        self._gone = False

    async def __call__(self, event: Event) -> None:
        """The target has the event. Raises Reject, RetryAfter or DeliveryError when it does not."""
        headers, body = self._write(event)
        try:
            status, asked, said = await self._send(headers, body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = f"no response within {self._timeout.total:g} s" if isinstance(error, TimeoutError) else str(error)
            reason = reason or type(error).__name__
            # 500 is what Knative says where no status arrived.
            details = self._details(500, f"dispatch error: {reason}".encode())
            raise DeliveryError(f"{self._shown}: {reason}", details=details) from None
        except ValueError as error:
            # aiohttp writes no header that would break out of its line.
            raise Reject(f"{self._shown}: cannot be sent: {error}", details=self._details(400, b"")) from None
        if 200 <= status < 300:
            self._gone = False
            return
        self._fail(status, asked, said)

    def _write(self, event: Event) -> tuple[CIMultiDict[str], bytes]:
        if self._is_binary:
            try:
                headers, body = codec.write_binary(event)
            except EventError:
                pass  # names from plain SQL, content types: what only the structured mode can carry
            else:
                return CIMultiDict([*headers, *self._headers.items()]), body
        headers = [("Content-Type", "application/cloudevents+json; charset=utf-8"), *self._headers.items()]
        return CIMultiDict(headers), codec.write_structured(event)

    async def _send(self, headers: CIMultiDict[str], body: bytes) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and, unless it was delivered, the beginning of the response's body."""
        connection = SimpleNamespace(reused=False)
        try:
            return await self._post(headers, body, connection)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not connection.reused:
                raise
        # The target had closed an idle connection just when it was used again: that is no failed attempt.
        return await self._post(headers, body, SimpleNamespace(reused=False))

    async def _post(
        self, headers: CIMultiDict[str], body: bytes, connection: SimpleNamespace
    ) -> tuple[int, str | None, bytes]:
        async with self._session.post(
            self._url,
            data=None if not body else body if len(body) <= _COPIED_BYTES else BytesIO(body),
            headers=headers,
            timeout=self._timeout,
            allow_redirects=False,
            trace_request_ctx=connection,
        ) as response:
            delivered = 200 <= response.status < 300
            said = bytearray()
            try:
                limit = _DRAINED_BYTES if delivered else _ERROR_BYTES
                while len(said) < limit and (some := await response.content.read(limit - len(said))):
                    said += some
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass  # the status is the verdict, however the body ends
            return response.status, response.headers.get("Retry-After"), bytes(said)

    def _fail(self, status: int, asked: str | None, said: bytes) -> None:
        details = self._details(status, said)
        reason = f"{self._shown} answered {status}{_phrase(status)}"
        if status in _RETRIED or status >= 500:
            if (delay := _retry_after(asked)) is not None:
                raise RetryAfter(reason, delay=delay, details=details)
            raise DeliveryError(reason, details=details)
        if status == 410 and not self._gone:
            self._gone = True
            facts.emit("target is gone", level=logging.WARNING, trigger=self._trigger, url=self._shown, status=410)
        raise Reject(reason, details=details)

    def _details(self, status: int, said: bytes) -> Details:
        details = {"knativeerrordest": self._shown, "knativeerrorcode": str(status)}
        if said:
            details["knativeerrordata"] = b64encode(said[:_ERROR_BYTES]).decode()
        return details


class DeadLetterDelivery:
    """Given-up events to the `deadLetterURL`, each with why; a `dead_letter` dispatcher for `Backend.subscribe`."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    async def __call__(self, event: Event) -> None:
        """As `Delivery`, of the event with the attributes `knativeerror…` that its failure carries."""
        failure = event.failure
        details = {} if failure is None else failure.details
        extra = {name: value for name, value in details.items() if name.startswith("knativeerror")}
        await self._delivery(codec.attributes_with(event, extra))


async def refuse_without_target(_event: Event) -> None:
    """A dispatcher for a trigger without a URL: each event goes the way of dead letters at once."""
    reason = "the trigger has no target URL"
    raise Reject(reason, details={"knativeerrordata": b64encode(reason.encode()).decode()})


def shown(url: URL) -> str:
    """The URL for logs and third parties: without user, password and query, where tokens stand."""
    return str(url.with_user(None).with_query(None).with_fragment(None))


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


def _tracing() -> aiohttp.TraceConfig:
    """Tells `_send` whether a request went out on a connection that had been idle."""

    async def reused(
        _session: aiohttp.ClientSession, context: SimpleNamespace, _: aiohttp.TraceConnectionReuseconnParams
    ) -> None:
        context.trace_request_ctx.reused = True

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(reused)
    return config
