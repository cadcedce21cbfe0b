"""The console as an ASGI application: routes, access, and the headers that keep its page harmless.

A request goes through `Console.__call__`: access, the rules for requests of other sites, then a handler of `api` or
`actions`, or a file of `assets`. The promise: each answer has the headers of `_HEADERS`, with which a browser runs no
script but the console's own, asks no other host, and shows the page in no frame; and no answer has a header of CORS.
"""

from pathlib import Path
from urllib.parse import quote

from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from pgbackend.backend import Backend
from pgbackend.console import assets
from pgbackend.console.access import Access, check_action, check_reading
from pgbackend.console.actions import Actions
from pgbackend.console.api import Api
from pgbackend.console.problems import Problem, problem_of
from pgbackend.console.readings import Readings

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class _AnyText(Convertor[str]):
    """A parameter of a path that may have slashes and line breaks, as names of subscriptions may."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("pgbackend_text", _AnyText())


class Console:
    """The application. `access` says who may look, `actions` whether requests may change something."""

    def __init__(self, backend: Backend, *, access: Access, actions: bool, directory: Path = assets.DIRECTORY) -> None:
        self._access = access
        readings = Readings(backend)
        self._api = api = Api(backend, readings, actions=actions)
        self._actions = acts = Actions(backend, readings, allowed=actions)
        self._assets = assets.load(directory)
        name, position = "{name:pgbackend_text}", "{position}"
        self._router = Router(
            [
                Route("/api/overview", api.overview),
                Route("/api/history", api.history),
                Route(f"/api/subscriptions/{name}", api.subscription),
                Route("/api/events", api.events),
                Route(f"/api/events/{position}", api.event),
                Route(f"/api/events/{position}/data", api.data),
                Route("/api/dead-letter-groups", api.groups),
                Route("/api/dead-letters", api.letters),
                Route("/api/preview/seek", api.preview_seek, methods=["POST"]),
                Route("/api/preview/dead-letters", api.preview_letters, methods=["POST"]),
                Route(f"/api/subscriptions/{name}/pause", acts.pause, methods=["POST"]),
                Route(f"/api/subscriptions/{name}/resume", acts.resume, methods=["POST"]),
                Route(f"/api/subscriptions/{name}/retry", acts.retry, methods=["POST"]),
                Route(f"/api/subscriptions/{name}/seek", acts.seek, methods=["POST"]),
                Route(f"/api/subscriptions/{name}/skip", acts.skip, methods=["POST"]),
                Route("/api/dead-letters/redeliver", acts.redeliver, methods=["POST"]),
                Route("/api/dead-letters/purge", acts.purge, methods=["POST"]),
                Route("/{path:path}", self._file),
            ],
            redirect_slashes=False,
        )

    def configure(self, *, access: Access, actions: bool) -> None:
        """From the next request on, these rules apply."""
        self._access = access
        self._api.actions = self._actions.allowed = actions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The request is answered."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        request = Request(scope, receive)
        try:
            await self._access.check(request)
            if scope["method"] == "POST":
                check_action(request)
            elif _path_of(scope).startswith("/api/"):
                check_reading(request)
            if _path_of(scope) == "" and scope.get("root_path"):
                response = _redirect(scope)
                await response(scope, receive, send_with_headers)
                return
            await self._router(self._own(scope), receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - a bug must be answered, too, and leave its trace
            await problem_of(error).response(request)(scope, receive, send_with_headers)

    def _own(self, scope: Scope) -> Scope:
        """The scope for routing here: errors are raised, and not handled by the application around."""
        return {**scope, "app": self, "router": self._router, "starlette.exception_handlers": ({}, {})}

    async def _file(self, request: Request) -> Response:
        asset = self._assets.get(request.path_params["path"] or assets.INDEX)
        if asset is None:
            raise Problem(404, "The console has nothing at this path.")
        return asset.response(request)


def _path_of(scope: Scope) -> str:
    """The path from where the console is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _redirect(scope: Scope) -> Response:
    """To the same path with a slash at its end, so that the page's relative links are below it."""
    last = quote(scope["root_path"].rpartition("/")[2])
    return Response(status_code=307, headers={"location": f"{last}/", "cache-control": "no-store"})
