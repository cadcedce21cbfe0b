"""The web console: what a log and its subscriptions do, in a browser, and the steering of them.

`pgbackend serve` has it at `/console`, and `app(backend)` is an ASGI application to mount in one of your own. It uses
the public calls of `Backend`, and readings of its own. The promise: without credentials, or a decision of the
application around it, nobody but this machine can look.
"""

from pgbackend.backend import Backend
from pgbackend.console.access import Access, Authorize, Basic, Decided, Local
from pgbackend.console.application import Console
from pgbackend.errors import ConfigError

__all__ = ["app"]


def app(
    backend: Backend,
    *,
    user: str | None = None,
    password: str | None = None,
    authorize: Authorize | None = None,
    actions: bool = True,
) -> Console:
    """The console of a backend, as an ASGI application to mount: `Mount("/queue", pgbackend.console.app(backend))`.

    `user`, `password`: requests need them, by HTTP Basic. `authorize`: a function, plain or async, of Starlette's
    Request; only requests for which it returns True may use the console. With neither, only requests from this machine
    may, that are addressed to localhost and came through no proxy.
    `actions=False`: the console shows, and changes nothing.

    The backend must be initialized when requests come; before, and once it is stopped, the answer is 503. Raises
    ConfigError for a user without a password or the reverse, for a user with a colon, and for both ways at once.
    """
    return Console(backend, access=_access(user, password, authorize), actions=actions)


def _access(user: str | None, password: str | None, authorize: Authorize | None) -> Access:
    if user is None and password is None:
        if authorize is not None:
            return Decided(authorize)
        return Local("To open it to others, pass `user` and `password`, or `authorize`, to pgbackend.console.app().")
    if authorize is not None:
        raise ConfigError("The console takes `authorize`, or `user` and `password`, not both.")
    if not user or not password or ":" in user:
        raise ConfigError("The console needs `user` and `password`, neither of them empty, and no colon in the user.")
    return Basic(user, password)
