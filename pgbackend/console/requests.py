"""Checks the input of requests to the console: parameters of paths and queries, and the members of JSON bodies.

`api` and `actions` read requests with it. The promise: what comes out can be asked of PostgreSQL as it is; a request
that is wrong is told what was expected.
"""

from datetime import datetime
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from pgbackend.console.problems import Problem
from pgbackend.model import MAX_POSITION
from pgbackend.subscriptions.definitions import not_found
from pgbackend.subscriptions.places import Place

BODY_BYTES = 1 << 16

_TEXT = 4096
"""The most characters of a filter."""
_DIGITS = 19


class Body:
    """The members of a request's JSON body."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = members

    @classmethod
    async def read(cls, request: Request, *names: str) -> "Body":
        """The body, which is an object with no other members. Raises Problem."""
        content = bytearray()
        try:
            async for piece in request.stream():
                content += piece
                if len(content) > BODY_BYTES:
                    raise Problem(413, f"The body is too large: expected at most {BODY_BYTES} bytes.")
        except ClientDisconnect:
            raise Problem(400, "The client went away before the end of the body.") from None
        try:
            members = orjson.loads(content or b"{}")
        except orjson.JSONDecodeError as error:
            raise Problem(400, f"The body is not JSON: {error}.") from None
        if not isinstance(members, dict):
            raise Problem(400, "The body is not a JSON object.")
        if unknown := sorted(members.keys() - set(names)):
            expected = ", ".join(names) or "none"
            raise Problem(400, f"The body has the member {unknown[0][:80]!r}: expected {expected}.")
        return cls(members)

    def text(self, name: str) -> str:
        """A member that is text. Raises Problem."""
        found = self.optional_text(name)
        if found is None:
            raise Problem(400, f"{name} is missing: expected text.")
        return found

    def optional_text(self, name: str) -> str | None:
        """A member that is text, or missing. Raises Problem."""
        found = self._members.get(name)
        if found is not None and not isinstance(found, str):
            raise Problem(400, f"{name} is not text.")
        return found

    def optional_number(self, name: str) -> int | None:
        """A member that is a position as text, or missing. Raises Problem."""
        found = self.optional_text(name)
        return None if found is None else checked_number(found, name, low=1, high=MAX_POSITION)

    def numbers(self, name: str) -> list[int] | None:
        """A member that is a list of ids as texts, or missing. Raises Problem."""
        found = self._members.get(name)
        if found is None:
            return None
        if not isinstance(found, list) or not found:
            raise Problem(400, f"{name} is not a list of ids.")
        return [checked_number(one, name, low=1, high=MAX_POSITION) for one in found]


def place_of(text: str) -> Place:
    """The place that a text names. Raises Problem.

    >>> place_of("latest"), place_of("17"), place_of("2026-01-01T12:00:00Z").isoformat()
    ('latest', 17, '2026-01-01T12:00:00+00:00')
    """
    if text in ("earliest", "latest"):
        return "earliest" if text == "earliest" else "latest"
    if text.isascii() and text.isdigit():
        return checked_number(text, "place", low=0, high=MAX_POSITION)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise Problem(
            400, f"{text[:80]!r} is no place: expected earliest, latest, a position, or a date of ISO 8601."
        ) from None
    if date.tzinfo is None:
        raise Problem(400, f"{text[:80]!r} has no time zone: add Z for UTC, or an offset such as +02:00.")
    return date


def checked_name(name: str) -> str:
    """The name of a subscription that PostgreSQL can look up. Raises SubscriptionNotFoundError."""
    if "\0" in name:
        raise not_found(name)
    return name


def name_of(request: Request) -> str:
    """The subscription of the path. The query's name comes before it: no URL can have `.` or `..` in its path."""
    return checked_name(request.query_params.get("name", request.path_params["name"]))


def position_of(request: Request) -> int:
    text: str = request.path_params["position"]
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and 1 <= int(text) <= MAX_POSITION):
        raise Problem(404, f"{text[:80]!r} is no position of an event.")
    return int(text)


def optional_text(request: Request, name: str) -> str | None:
    text = request.query_params.get(name)
    return checked_text(text, name) if text else None


def checked_text(text: str, name: str) -> str:
    if "\0" in text or len(text) > _TEXT:
        raise Problem(400, f"{name} has a NUL, or more than {_TEXT} characters.")
    return text


def checked_number(text: object, name: str, *, low: int, high: int, default: int | None = None) -> int:
    if text is None and default is not None:
        return default
    if (
        isinstance(text, str)
        and text.isascii()
        and text.isdigit()
        and len(text) <= _DIGITS
        and low <= int(text) <= high
    ):
        return int(text)
    raise Problem(400, f"{name} is {text!r:.80}: expected a whole number from {low} to {high}, as text.")


async def letters_of(request: Request) -> tuple[list[int] | None, str | None, str | None]:
    """The dead letters that a body names: by their ids, a subscription, a failure group. Raises Problem."""
    body = await Body.read(request, "ids", "subscription", "group")
    ids, subscription, group = body.numbers("ids"), body.optional_text("subscription"), body.optional_text("group")
    if ids is None and subscription is None and group is None:
        raise Problem(400, "The body names no dead letters: expected ids, a subscription or a group.")
    for text, name in ((subscription, "subscription"), (group, "group")):
        if text is not None:
            checked_text(text, name)
    return ids, subscription, group
