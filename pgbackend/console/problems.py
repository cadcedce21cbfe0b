"""Answers of the console when it refuses or cannot do something: problems as in RFC 9457.

`application` turns each error into one with `problem_of`. The promise: an error of pgbackend gets the status that fits
it and keeps its text, which says what to do; a bug is logged, and its text stays in the log.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pgbackend import facts
from pgbackend.errors import (
    ConfigError,
    ConnectionLostError,
    DatabaseError,
    EventNotFoundError,
    EventSettledError,
    NotRunningError,
    PgBackendError,
    SubscriptionBusyError,
    SubscriptionNotFoundError,
)
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE

_RETRY = {"retry-after": "1"}


class Problem(Exception):  # noqa: N818 - an answer, not an error
    """The request is answered with this status and told why."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {"cache-control": "no-store", **(headers or {})}

    def response(self, request: Request) -> Response:
        """The answer: a problem in JSON, or plain text for a page that a browser was to show."""
        phrase = HTTPStatus(self.status).phrase
        if "text/html" in request.headers.get("accept", ""):
            return PlainTextResponse(f"{self.status} {phrase}\n\n{self.detail}\n", self.status, self.headers)
        body = orjson.dumps({"title": phrase, "status": self.status, "detail": self.detail})
        return Response(body, self.status, self.headers, "application/problem+json")


def problem_of(error: Exception) -> Problem:
    """The answer for an error."""
    match error:
        case Problem():
            return error
        case HTTPException():  # Starlette's, for paths and methods that have nothing
            return _not_there(error)
        case ConfigError():
            return Problem(400, str(error))
        case SubscriptionNotFoundError() | EventNotFoundError():
            return Problem(404, str(error))
        case EventSettledError() | SubscriptionBusyError():
            return Problem(409, str(error))
        case NotRunningError():
            return Problem(503, str(error), headers=_RETRY)
        case DatabaseError() if error.sqlstate == INSUFFICIENT_PRIVILEGE:
            return Problem(403, f"The database role of this process may not do that: {error}")
        case DatabaseError():
            return Problem(503, str(error), headers=_RETRY)
        case PgBackendError():
            return Problem(500, str(error))
    facts.emit("console failed", level=logging.ERROR, exc_info=error, error=error)
    return Problem(500, "The console failed. The log of its process says why.")


def unavailable(seconds: float) -> ConnectionLostError:
    """The error of a reading that PostgreSQL did not answer in time."""
    return ConnectionLostError(
        f"PostgreSQL did not answer within {seconds:g} s. Check that it runs, can be reached, and is not overloaded."
    )


def _not_there(error: HTTPException) -> Problem:
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "GET").split(", ")))
        return Problem(405, f"This path is for {allow}.", headers={"allow": allow})
    return Problem(404, "The console has nothing at this path.")
