"""Sockets to PostgreSQL: found by name without the event loop's own threads, and never shared with a forked child.

asyncio looks names up in its default executor. Handlers fill that with work of their own, and then no connection would
be made until they have ended. So each name is looked up in a thread of its own.

A child that a handler forked inherits every socket. As long as it lives, PostgreSQL would take a dead worker for alive.
So the child's copies are replaced by /dev/null: nothing is sent on them, and what the parent has is not touched. The
event loop's selector stays as it is, because the child shares it with the parent.
"""

import asyncio
import os
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Protocol = Callable[[], asyncio.BaseProtocol]
_Made = tuple[asyncio.Transport, asyncio.BaseProtocol]

_ours: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
_forks = 0


def forks() -> int:
    """How many times this process was forked from another one since pgbackend was imported.

    Another number than before means that this is a child, in which nothing that was open before can be used.
    """
    return _forks


def _forget_sockets() -> None:
    global _forks  # noqa: PLW0603 - process-wide by nature
    _forks += 1
    inherited = [wire.fileno() for wire in _ours if wire.fileno() >= 0]
    _ours.clear()
    if inherited:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in inherited:
            # Not closed: the number would go to something else, which the socket object closes later.
            os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


os.register_at_fork(after_in_child=_forget_sockets)


class Loop:
    """An event loop as asyncpg is given it: the running one, but for how it connects."""

    def __init__(self) -> None:
        self.running = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.running, name)

    async def create_connection(self, protocol: _Protocol, host: str, port: int, **options: Any) -> _Made:
        """Connect to the first address of the host that answers. Raises OSError, of the last one, when none does."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        error: OSError | None = None
        for family, kind, number, _, address in await _find(host, port):
            try:
                wire = await self._connected(socket.socket(family, kind, number), address)
            except OSError as refusal:
                error = refusal
            else:
                return await self._made(protocol, wire, options)
        raise error or OSError(f"{host} has no address")

    async def create_unix_connection(self, protocol: _Protocol, path: str) -> _Made:
        """Connect to a Unix socket."""
        return await self._made(protocol, await self._connected(socket.socket(socket.AF_UNIX), path), {})

    async def _connected(self, wire: socket.socket, address: Any) -> socket.socket:
        # Before it connects: a fork may happen meanwhile.
        _ours.add(wire)
        try:
            wire.setblocking(False)
            await self.running.sock_connect(wire, address)
        except BaseException:
            wire.close()
            raise
        return wire

    async def _made(self, protocol: _Protocol, wire: socket.socket, options: dict[str, Any]) -> _Made:
        try:
            return await self.running.create_connection(protocol, sock=wire, **options)
        except BaseException:
            wire.close()
            raise


async def _find(host: str, port: int) -> list[Any]:
    """The addresses of a host."""
    with suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return await in_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), name=f"find {host}")


async def in_thread(call: Callable[[], _Result], *, name: str) -> _Result:
    """What the call returns or raises, in a thread of its own, which nobody has to wait for and nothing else can fill.

    A caller that is cancelled leaves it running.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - the caller's to handle
            _tell(loop, answer, error)
        else:
            _tell(loop, answer, result)

    threading.Thread(target=run, name=f"pgbackend {name}", daemon=True).start()
    return await answer


def _tell(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Any]", outcome: object) -> None:
    def tell() -> None:
        if answer.done():
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(tell)
