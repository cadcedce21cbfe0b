"""Decides what the answer of a target means for its event. Nothing here does I/O.

    2xx ───────────────────────────────────▶ delivered
    404, 408, 409, 413, 425, 429, 5xx ─────▶ TargetError: retry; RetryAfter if the target names a time
    no answer, a bad reply ────────────────▶ TargetError: retry
    410 ───────────────────────────────────▶ Pause: the trigger waits
    any other ─────────────────────────────▶ Reject: give up

Each failure carries the three attributes with which Knative forwards dead letters: `knativeerrordest` (the URL),
`knativeerrorcode` (the status) and `knativeerrordata` (the beginning of the answer's body in base64).
"""

import time
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

import aiohttp
from yarl import URL

from pgbackend.errors import Pause, Reject, RetryAfter

BODY_BYTES = 768
"""The part of a failure's body that is kept: 1,024 characters of base64, as Knative keeps."""
_RETRIED = frozenset({404, 408, 409, 413, 425, 429})
_REASON_CHARACTERS = 200
_NO_ANSWER = 500  # as Knative reports a dispatch without an answer

Details = Mapping[str, str]


class TargetError(Exception):
    """The target did not take the event; a retry may succeed."""

    def __init__(self, reason: str, *, details: Details, status: int | None) -> None:
        """`status` is the answer's, or that which a bad reply amounts to; None when no answer came."""
        super().__init__(reason)
        self.details = dict(details)
        self.status = status


Failure = TargetError | RetryAfter | Reject | Pause


class Answer(NamedTuple):
    """The answer of a target."""

    status: int
    body: bytes = b""
    """The beginning of a failure's body; empty for a success."""
    retry_after: str | None = None

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


def failure_of(answer: Answer, *, url: str, trigger: str) -> Failure:
    """The failure that an answer other than 2xx means. `url` is what people may see of it: `public_url()`."""
    status = answer.status
    details = _details(url, status, answer.body)
    reason = f"{url} answered {status}{_phrase(status)}"
    if status in _RETRIED or 500 <= status < 600:
        if (delay := _retry_after(answer.retry_after)) is not None:
            return RetryAfter(reason, delay=delay, details=details)
        return TargetError(reason, details=details, status=status)
    if status == 410:
        resume = f"change the URL of trigger {trigger}, or run `pgbackend subscriptions resume {trigger}`"
        return Pause(f"{reason}; {resume}", details=details)
    return Reject(reason, details=details)


def no_answer(reason: str, *, url: str) -> TargetError:
    """The failure of a dispatch that got no answer."""
    return TargetError(f"{url}: {reason}", details=_details(url, _NO_ANSWER, f"dispatch error: {reason}"), status=None)


def bad_reply(status: int, reason: str, *, url: str) -> TargetError:
    """The failure of a dispatch whose reply cannot be read or stored, which amounts to `status`."""
    return TargetError(f"{url} {reason}", details=_details(url, status, reason), status=status)


def cannot_be_sent(error: Exception, *, url: str) -> Reject:
    """The failure of an event that no request can carry."""
    return Reject(f"{url}: cannot be sent: {error}", details=_details(url, 400, ""))


def status_of(failure: Failure) -> int | None:
    """The status that a failure was answered with, or amounts to; None when no answer came."""
    return failure.status if isinstance(failure, TargetError) else int(failure.details["knativeerrorcode"])


def why_broken(error: Exception, *, timeout: float) -> str:
    """The reason, in one short line, why a request or its response broke off."""
    if isinstance(error, TimeoutError):
        return f"no response within {timeout:g} s"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the target closed the connection without an answer"
    # aiohttp quotes malformed HTTP in full, over several lines.
    return " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__


def public_url(url: URL) -> str:
    """The URL for logs and third parties: without user, password, query and fragment, which may hold secrets."""
    return str(url.with_user(None).with_query(None).with_fragment(None))


def _details(url: str, status: int, data: bytes | str) -> Details:
    details = {"knativeerrordest": url, "knativeerrorcode": str(status)}
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")  # it may quote lone surrogates
    if data:
        details["knativeerrordata"] = b64encode(data[:BODY_BYTES]).decode()
    return details


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _retry_after(text: str | None) -> float | None:
    """The seconds from now in a Retry-After header, which has seconds or a date; None when it has neither."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:18])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # Obsolete forms of a date have no zone and mean GMT.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - time.time())
