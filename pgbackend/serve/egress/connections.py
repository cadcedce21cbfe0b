"""The connections of a broker process to all its targets: one pool.

`exchange` sends requests over them. The pool has no limit of its own: each dispatcher has one, and in a shared limit
one slow target would use up the timeouts of the others.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from yarl import URL

from pgbackend.serve.egress.addresses import public_socket
from pgbackend.serve.egress.protocol import TargetConnection

_KEEPALIVE = 15.0
"""Seconds after which an idle connection is closed: nothing is kept of targets that a reload has removed."""
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)


class Pool(aiohttp.TCPConnector):
    """A pool of `TargetConnection`s; it uses no proxy. With `deny_private` it connects to public addresses only."""

    def __init__(self, *, deny_private: bool = False, keepalive: float = _KEEPALIVE) -> None:
        super().__init__(limit=0, keepalive_timeout=keepalive, socket_factory=public_socket if deny_private else None)
        self._factory = partial(TargetConnection, loop=self._loop)  # type: ignore[assignment]  # a subclass of aiohttp's

    async def __aenter__(self) -> Self:
        """Aiohttp's own, which says more of the type."""
        return self

    def request_to(self, url: URL) -> aiohttp.ClientRequest:
        """A request for `take`, which reads from it where to connect to. It is never sent."""
        return aiohttp.ClientRequest("POST", url, loop=self._loop)

    async def take(self, request: aiohttp.ClientRequest, key: ConnectionKey, *, deadline: float) -> Connection:
        """A connection to where the request goes, whose key is `key`.

        Raises aiohttp's errors, and TimeoutError at the `deadline` of the loop's clock.
        """
        if (idle := await self._get(key, [])) is not None:
            return idle
        async with asyncio.timeout_at(deadline):
            return await self.connect(request, traces=[], timeout=_NO_TIMEOUT)

    def _get(self, *of: Any) -> Coroutine[Any, Any, Connection | None]:
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
