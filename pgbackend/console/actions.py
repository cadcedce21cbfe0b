"""The console's actions: POSTs that change something, each by one call of the backend.

`application` routes to it once the request may look, and cannot have come from a page of another origin. The promise:
while actions are switched off, and for a request that is wrong, nothing changes; the log says of each action what was
done, and from which address.
"""

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.console.api import answer
from pgbackend.console.problems import Problem
from pgbackend.console.readings import Readings
from pgbackend.console.requests import Body, letters_of, name_of, place_of


class Actions:
    """The handlers, for one backend. `allowed`: whether they may change something."""

    def __init__(self, backend: Backend, readings: Readings, *, allowed: bool) -> None:
        self.allowed = allowed
        self._backend = backend
        self._readings = readings

    async def pause(self, request: Request) -> Response:
        """The subscription is paused."""
        body = await self._action(request, "reason")
        await self._backend.pause(name_of(request), reason=body.optional_text("reason"))
        return self._done(request, "Paused.")

    async def resume(self, request: Request) -> Response:
        """The subscription goes on."""
        await self._action(request)
        await self._backend.resume(name_of(request))
        return self._done(request, "Resumed.")

    async def retry(self, request: Request) -> Response:
        """Failed events are due now."""
        body = await self._action(request, "position")
        count = await self._backend.retry_now(name_of(request), position=body.optional_number("position"))
        return self._done(request, f"{_events(count)} due now.", count)

    async def seek(self, request: Request) -> Response:
        """The subscription is elsewhere."""
        body = await self._action(request, "place")
        place = body.text("place")
        await self._backend.seek(name_of(request), place_of(place))
        return self._done(request, f"Moved to {place}.")

    async def skip(self, request: Request) -> Response:
        """The event is a dead letter of the subscription."""
        body = await self._action(request, "position")
        position = body.optional_number("position")
        if position is None:
            raise Problem(400, "position is missing: expected the position of the event to skip.")
        await self._backend.skip(name_of(request), position)
        return self._done(request, f"Skipped the event at position {position}: it is a dead letter now.", 1)

    async def redeliver(self, request: Request) -> Response:
        """Dead letters are dispatched again."""
        self._check_actions()
        ids, subscription, group = await letters_of(request)
        count = await self._backend.redeliver(*ids or (), subscription=subscription, group=group)
        return self._done(request, f"{_letters_text(count)} dispatched again.", count)

    async def purge(self, request: Request) -> Response:
        """Dead letters are deleted."""
        self._check_actions()
        ids, subscription, group = await letters_of(request)
        count = await self._backend.purge_dead_letters(*ids or (), subscription=subscription, group=group)
        return self._done(request, f"{_letters_text(count)} deleted.", count)

    async def _action(self, request: Request, *names: str) -> "Body":
        self._check_actions()
        return await Body.read(request, *names)

    def _check_actions(self) -> None:
        if not self.allowed:
            raise Problem(403, "Actions are switched off: this console only shows. Nothing has changed.")

    def _done(self, request: Request, text: str, count: int | None = None) -> Response:
        # The query has the name of a subscription that no path can have.
        target = quote(request.url.path) + (f"?{request.url.query}" if request.url.query else "")
        facts.emit("console action", request=target, client=request.client and request.client.host, done=text)
        self._readings.forget()
        return answer({"done": text, "count": count})


def _events(count: int) -> str:
    return "1 event is" if count == 1 else f"{count:,} events are"


def _letters_text(count: int) -> str:
    return "1 dead letter is" if count == 1 else f"{count:,} dead letters are"
