"""The console's JSON API: a handler for each path below `api/`, which reads or does one thing.

`application` routes to it once the request may look. What a request asks for is checked here, what it gets is read by
`readings` and shaped by `shapes`; actions are the backend's own calls. The promise: a request that is wrong changes
nothing, and is told what was expected.
"""

from datetime import datetime
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pgbackend.backend import Backend
from pgbackend.console import shapes
from pgbackend.console.problems import Problem
from pgbackend.console.readings import Readings, Wanted, pattern_of
from pgbackend.model import MAX_POSITION
from pgbackend.subscriptions.definitions import not_found
from pgbackend.subscriptions.places import Place

BODY_BYTES = 1 << 16

_PAGE, _LONGEST_PAGE = 100, 500
_TEXT = 4096
"""The most characters of a filter."""
_DIGITS = 19


class Api:
    """The handlers, for one backend."""

    def __init__(self, backend: Backend, *, actions: bool) -> None:
        self.actions = actions
        """Whether requests may change something."""
        self._backend = backend
        self._readings = Readings(backend)

    # Reading

    async def overview(self, _request: Request) -> Response:
        """The log, the subscriptions and the workers."""
        found = await self._readings.overview()
        return answer(shapes.overview(found, self._backend.info(), actions=self.actions))

    async def history(self, request: Request) -> Response:
        """The last hour by minutes."""
        name = request.query_params.get("subscription")
        return answer(shapes.history(await self._readings.history(None if name is None else checked_name(name))))

    async def subscription(self, request: Request) -> Response:
        """One subscription."""
        return answer(shapes.subscription(await self._readings.subscription(_name(request))))

    async def events(self, request: Request) -> Response:
        """A page of events, the newest first."""
        query = request.query_params
        patterns = {
            name: pattern_of(_checked_text(query[name], name))
            for name in ("type", "source", "subject", "id")
            if query.get(name)
        }
        wanted = Wanted(
            before=_number(query.get("before"), "before", low=0, high=MAX_POSITION, default=MAX_POSITION),
            after=_number(query.get("after"), "after", low=0, high=MAX_POSITION, default=0),
            limit=_number(query.get("limit"), "limit", low=1, high=_LONGEST_PAGE, default=_PAGE),
            search=_checked_text(query["search"], "search") if query.get("search") else None,
            **patterns,
        )
        return answer(shapes.events(await self._readings.events(wanted)))

    async def event(self, request: Request) -> Response:
        """One event with its state in each subscription."""
        position = _position(request)
        story = await self._readings.event(position)
        if story is None:
            raise no_event(position)
        return answer(shapes.event(story))

    async def data(self, request: Request) -> Response:
        """The data of one event, to be saved."""
        position = _position(request)
        data = await self._readings.data(position)
        if data is None:
            raise no_event(position)
        headers = {"content-disposition": f'attachment; filename="event-{position}"', "cache-control": "no-store"}
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def groups(self, request: Request) -> Response:
        """The failure groups of the dead letters."""
        return answer(shapes.groups(await self._readings.groups(_optional(request, "subscription"))))

    async def letters(self, request: Request) -> Response:
        """A page of dead letters, the oldest first."""
        query = request.query_params
        limit = _number(query.get("limit"), "limit", low=1, high=_LONGEST_PAGE, default=_PAGE)
        rows = await self._readings.letters(
            _number(query.get("after"), "after", low=0, high=MAX_POSITION, default=0),
            limit + 1,
            subscription=_optional(request, "subscription"),
            group=_optional(request, "group"),
        )
        return answer(shapes.letters(rows, limit))

    # Previews

    async def preview_seek(self, request: Request) -> Response:
        """What a seek would bring again and skip."""
        body = await Body.read(request, "subscription", "place")
        found = await self._readings.preview_seek(checked_name(body.text("subscription")), place_of(body.text("place")))
        return answer({"position": str(found.position), "again": found.again, "skipped": found.skipped})

    async def preview_letters(self, request: Request) -> Response:
        """How many dead letters an action would be about."""
        ids, subscription, group = await _letters(request)
        letters, due = await self._readings.count_letters(ids, subscription=subscription, group=group)
        return answer({"letters": letters, "due": due})

    # Actions

    async def pause(self, request: Request) -> Response:
        """The subscription is paused."""
        body = await self._action(request, "reason")
        await self._backend.pause(_name(request), reason=body.optional_text("reason"))
        return self._done("Paused.")

    async def resume(self, request: Request) -> Response:
        """The subscription goes on."""
        await self._action(request)
        await self._backend.resume(_name(request))
        return self._done("Resumed.")

    async def retry(self, request: Request) -> Response:
        """Failed events are due now."""
        body = await self._action(request, "position")
        count = await self._backend.retry_now(_name(request), position=body.optional_number("position"))
        return self._done(f"{_events(count)} due now.", count)

    async def seek(self, request: Request) -> Response:
        """The subscription is elsewhere."""
        body = await self._action(request, "place")
        place = body.text("place")
        await self._backend.seek(_name(request), place_of(place))
        return self._done(f"Moved to {place}.")

    async def skip(self, request: Request) -> Response:
        """The event is a dead letter of the subscription."""
        body = await self._action(request, "position")
        position = body.optional_number("position")
        if position is None:
            raise Problem(400, "position is missing: expected the position of the event to skip.")
        await self._backend.skip(_name(request), position)
        return self._done(f"Skipped the event at position {position}: it is a dead letter now.", 1)

    async def redeliver(self, request: Request) -> Response:
        """Dead letters are dispatched again."""
        self._check_actions()
        ids, subscription, group = await _letters(request)
        count = await self._backend.redeliver(*ids or (), subscription=subscription, group=group)
        return self._done(f"{_letters_text(count)} dispatched again.", count)

    async def purge(self, request: Request) -> Response:
        """Dead letters are deleted."""
        self._check_actions()
        ids, subscription, group = await _letters(request)
        count = await self._backend.purge_dead_letters(*ids or (), subscription=subscription, group=group)
        return self._done(f"{_letters_text(count)} deleted.", count)

    async def _action(self, request: Request, *names: str) -> "Body":
        self._check_actions()
        return await Body.read(request, *names)

    def _check_actions(self) -> None:
        if not self.actions:
            raise Problem(403, "Actions are switched off: this console only shows. Nothing has changed.")

    def _done(self, text: str, count: int | None = None) -> Response:
        self._readings.forget()
        return answer({"done": text, "count": count})


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
        return None if found is None else _number(found, name, low=1, high=MAX_POSITION)

    def numbers(self, name: str) -> list[int] | None:
        """A member that is a list of ids as texts, or missing. Raises Problem."""
        found = self._members.get(name)
        if found is None:
            return None
        if not isinstance(found, list) or not found:
            raise Problem(400, f"{name} is not a list of ids.")
        return [_number(one, name, low=1, high=MAX_POSITION) for one in found]


def answer(value: shapes.Json) -> Response:
    """The value as JSON, not to be stored."""
    return Response(orjson.dumps(value), headers={"cache-control": "no-store"}, media_type="application/json")


def no_event(position: int) -> Problem:
    """There is nothing at this position."""
    return Problem(
        404,
        f"There is no event at position {position}: the position was never used, its transaction was rolled back or is "
        "still open, or retention has dropped it.",
    )


def place_of(text: str) -> Place:
    """The place that a text names. Raises Problem.

    >>> place_of("latest"), place_of("17"), place_of("2026-01-01T12:00:00Z").isoformat()
    ('latest', 17, '2026-01-01T12:00:00+00:00')
    """
    if text in ("earliest", "latest"):
        return "earliest" if text == "earliest" else "latest"
    if text.isascii() and text.isdigit():
        return _number(text, "place", low=0, high=MAX_POSITION)
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


def _name(request: Request) -> str:
    """The subscription of the path. The query's name comes before it: no URL can have `.` or `..` in its path."""
    return checked_name(request.query_params.get("name", request.path_params["name"]))


def _position(request: Request) -> int:
    text: str = request.path_params["position"]
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and 1 <= int(text) <= MAX_POSITION):
        raise Problem(404, f"{text[:80]!r} is no position of an event.")
    return int(text)


def _optional(request: Request, name: str) -> str | None:
    text = request.query_params.get(name)
    return _checked_text(text, name) if text else None


def _checked_text(text: str, name: str) -> str:
    if "\0" in text or len(text) > _TEXT:
        raise Problem(400, f"{name} has a NUL, or more than {_TEXT} characters.")
    return text


def _number(text: object, name: str, *, low: int, high: int, default: int | None = None) -> int:
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


async def _letters(request: Request) -> tuple[list[int] | None, str | None, str | None]:
    """The dead letters that a body names: by their ids, a subscription, a failure group. Raises Problem."""
    body = await Body.read(request, "ids", "subscription", "group")
    ids, subscription, group = body.numbers("ids"), body.optional_text("subscription"), body.optional_text("group")
    if ids is None and subscription is None and group is None:
        raise Problem(400, "The body names no dead letters: expected ids, a subscription or a group.")
    for text, name in ((subscription, "subscription"), (group, "group")):
        if text is not None:
            _checked_text(text, name)
    return ids, subscription, group


def _events(count: int) -> str:
    return "1 event is" if count == 1 else f"{count:,} events are"


def _letters_text(count: int) -> str:
    return "1 dead letter is" if count == 1 else f"{count:,} dead letters are"
