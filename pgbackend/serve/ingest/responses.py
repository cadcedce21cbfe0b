"""Answers to clients: ASGI's types, problems as RFC 9457 describes them, and how both are sent.

A refusal says what happened, to which event, and what to do. The promise: "Nothing was stored" is said only if that is
certain.
"""

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pgbackend import facts
from pgbackend.errors import DatabaseError, EventError, NotRunningError, ProduceTimeoutError, ProduceUncertainError

if TYPE_CHECKING:
    from pgbackend.codec.event import Event

# ASGI's own words; its mappings hold values of many types.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

Header = tuple[bytes, bytes]
Headers = Sequence[Header]

STOPPING = "The broker is stopping. Nothing was stored; send the request again."

_RETRY = (b"retry-after", b"1")


class Problem(Exception):  # noqa: N818 - an answer, not an error
    """The request is answered with this status and told why."""

    def __init__(self, status: int, detail: str, *headers: Header) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = ((b"content-type", b"application/problem+json"), *headers)

    def body(self) -> bytes:
        problem = {"title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail}
        return json.dumps(problem).encode()


class Repeated(Problem):
    """The events of the request are in the log, but this many were in it before. The answer is 202, and says so."""

    def __init__(self, events: int) -> None:
        super().__init__(202, "")
        self.headers = ((b"pgbackend-duplicates", b"%d" % events),)

    def body(self) -> bytes:
        return b""


def unavailable(detail: str) -> Problem:
    """A 503 that says when to try again."""
    return Problem(503, detail, _RETRY)


def not_stored(error: Exception, event: "Event | None") -> Problem:
    """The answer to a sender whose events could not be committed; `event`: the only one, if there is one."""
    if isinstance(error, ProduceUncertainError):
        return unavailable(
            "The outcome is unknown: the connection to PostgreSQL was lost during the commit. The events may be stored "
            "or not. If you send them again, they may be stored twice, with the same source and id."
        )
    if isinstance(error, NotRunningError):
        return unavailable(STOPPING)
    if isinstance(error, ProduceTimeoutError):
        return unavailable(f"Nothing was stored; send the request again. {error}")
    which = "The batch" if event is None else f"Event {event.id[:80]!r} of {event.source[:80]!r}"
    # SQLSTATE classes 22 and 23: PostgreSQL refuses the data itself.
    refuses_data = isinstance(error, DatabaseError) and (error.sqlstate or "")[:2] in ("22", "23")
    if isinstance(error, EventError) or refuses_data:
        return Problem(400, f"{which} was refused: {error}")
    if isinstance(error, DatabaseError):
        return unavailable(f"Nothing was stored; send the request again. {error}")
    return unexpected(error, event)


def unexpected(error: BaseException, event: "Event | None" = None) -> Problem:
    """A 500 for a bug, which is logged."""
    about = {} if event is None else {"event_id": event.id, "event_source": event.source}
    facts.emit("ingest failed", level=logging.ERROR, exc_info=error, error=error, **about)
    return Problem(500, "The broker failed. Its log says why.")


async def respond(send: Send, status: int, body: bytes, *headers: Header) -> None:
    """The whole answer is sent."""
    headers = (*headers, (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
