"""The console's JSON API as far as it reads: a handler for each path below `api/` that changes nothing.

`application` routes to it once the request may look. `requests` checks what is asked for, `readings` reads it, and
`shapes` makes JSON of it. The promise: nothing here changes the log, whatever comes.
"""

import orjson
from starlette.requests import Request
from starlette.responses import Response

from pgbackend.backend import Backend
from pgbackend.console import shapes
from pgbackend.console.problems import Problem
from pgbackend.console.readings import Readings, Wanted, pattern_of
from pgbackend.console.requests import (
    Body,
    checked_name,
    checked_number,
    checked_text,
    letters_of,
    name_of,
    optional_text,
    place_of,
    position_of,
)
from pgbackend.model import MAX_POSITION

_PAGE, _LONGEST_PAGE = 100, 500


class Api:
    """The handlers, for one backend. `actions`: whether the page may offer any."""

    def __init__(self, backend: Backend, readings: Readings, *, actions: bool) -> None:
        self.actions = actions
        self._backend = backend
        self._readings = readings

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
        return answer(shapes.subscription(await self._readings.subscription(name_of(request))))

    async def events(self, request: Request) -> Response:
        """A page of events, the newest first."""
        query = request.query_params
        patterns = {
            name: pattern_of(checked_text(query[name], name))
            for name in ("type", "source", "subject", "id")
            if query.get(name)
        }
        wanted = Wanted(
            before=checked_number(query.get("before"), "before", low=0, high=MAX_POSITION, default=MAX_POSITION),
            after=checked_number(query.get("after"), "after", low=0, high=MAX_POSITION, default=0),
            limit=checked_number(query.get("limit"), "limit", low=1, high=_LONGEST_PAGE, default=_PAGE),
            search=checked_text(query["search"], "search") if query.get("search") else None,
            **patterns,
        )
        return answer(shapes.events(await self._readings.events(wanted)))

    async def event(self, request: Request) -> Response:
        """One event with its state in each subscription."""
        position = position_of(request)
        story = await self._readings.event(position)
        if story is None:
            raise no_event(position)
        return answer(shapes.event(story))

    async def data(self, request: Request) -> Response:
        """The data of one event, to be saved."""
        position = position_of(request)
        data = await self._readings.data(position)
        if data is None:
            raise no_event(position)
        headers = {"content-disposition": f'attachment; filename="event-{position}"', "cache-control": "no-store"}
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def groups(self, request: Request) -> Response:
        """The failure groups of the dead letters."""
        return answer(shapes.groups(await self._readings.groups(optional_text(request, "subscription"))))

    async def letters(self, request: Request) -> Response:
        """A page of dead letters, the oldest first."""
        query = request.query_params
        limit = checked_number(query.get("limit"), "limit", low=1, high=_LONGEST_PAGE, default=_PAGE)
        rows = await self._readings.letters(
            checked_number(query.get("after"), "after", low=0, high=MAX_POSITION, default=0),
            limit + 1,
            subscription=optional_text(request, "subscription"),
            group=optional_text(request, "group"),
        )
        return answer(shapes.letters(rows, limit))

    async def preview_seek(self, request: Request) -> Response:
        """The numbers of events that a seek would bring again and skip."""
        body = await Body.read(request, "subscription", "place")
        found = await self._readings.preview_seek(checked_name(body.text("subscription")), place_of(body.text("place")))
        return answer({"position": str(found.position), "again": found.again, "skipped": found.skipped})

    async def preview_letters(self, request: Request) -> Response:
        """How many dead letters an action would be about."""
        ids, subscription, group = await letters_of(request)
        letters, due = await self._readings.count_letters(ids, subscription=subscription, group=group)
        return answer({"letters": letters, "due": due})


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
