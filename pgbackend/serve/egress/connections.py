"""The connections of a broker process to all its targets: one session, one pool.

`dispatcher` sends through a session from `open_session()`. The pool has no limit of its own: each dispatcher has one,
and in a shared limit one slow target would use up the timeouts of the others.
"""

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import aiohttp

from pgbackend.serve.egress.addresses import public_socket
from pgbackend.serve.egress.protocol import TargetConnection

_KEEPALIVE = 15.0
"""Seconds after which an idle connection is closed: nothing is kept of targets that a reload has removed."""


def open_session(*, deny_private: bool = False) -> aiohttp.ClientSession:
    """A client for all targets, which uses no proxy and keeps no cookies. The caller closes it.

    With `deny_private` it connects to public addresses only.
    """
    return aiohttp.ClientSession(
        connector=Pool(deny_private=deny_private),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # It is cheaper to override aiohttp's default headers than to leave them out. Bodies must come uncompressed.
        headers={"User-Agent": "pgbackend", "Accept": "*/*", "Accept-Encoding": "identity"},
        trust_env=False,
    )


class Pool(aiohttp.TCPConnector):
    """A pool of `TargetConnection`s."""

    def __init__(self, *, deny_private: bool = False, keepalive: float = _KEEPALIVE) -> None:
        super().__init__(limit=0, keepalive_timeout=keepalive, socket_factory=public_socket if deny_private else None)
        self._factory = partial(TargetConnection, loop=self._loop)  # type: ignore[assignment]  # a subclass of aiohttp's

    def _get(self, *of: Any) -> Coroutine[Any, Any, aiohttp.connector.Connection | None]:
        """An idle connection, unless the request wants a new one."""
        return _none() if _only_new.get() else super()._get(*of)


_only_new = ContextVar("only_new", default=False)


@contextmanager
def new_connection() -> Iterator[None]:
    """Requests within it use new connections."""
    token = _only_new.set(True)
    try:
        yield
    finally:
        _only_new.reset(token)


async def _none() -> None:
    pass
