"""Sockets to PostgreSQL: opened without asyncio's default executor, and never shared with a forked child.

asyncio looks names up in its default executor. Handlers may fill that with their own work, and then no connection could
be opened until they end. So each name is looked up in a thread of its own.

A child that a handler forks inherits every socket. While the child lives, PostgreSQL would take a dead worker for a
living one. So the child's copies are replaced by /dev/null: nothing is sent on them, and the parent's sockets are not
touched. The event loop's selector stays as it is, because the child shares it with the parent.
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
_Connected = tuple[asyncio.Transport, asyncio.BaseProtocol]

_ours: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
_forks = 0


def forks() -> int:
    """How many forks lie between the process that imported pgbackend and this one.

    A number that has changed means that this is a child, which cannot use anything that was open before.
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
            # Not closed: the number would be reused for another file, which the socket object would close later.
            os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


os.register_at_fork(after_in_child=_forget_sockets)


class Loop:
    """The running event loop as asyncpg gets it, with other methods to connect."""

    def __init__(self) -> None:
        self.running = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.running, name)

    async def create_connection(self, protocol: _Protocol, host: str, port: int, **options: Any) -> _Connected:
        """Connect to the first address of the host that answers. Raises the last one's OSError when none does."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        error: OSError | None = None
        for family, kind, protocol_number, _, address in await _find_addresses(host, port):
            try:
                wire = await self._connect(socket.socket(family, kind, protocol_number), address)
            except OSError as refusal:
                error = refusal
            else:
                return await self._wrap(protocol, wire, options)
        raise error or OSError(f"{host} has no address")

    async def create_unix_connection(self, protocol: _Protocol, path: str) -> _Connected:
        """Connect to a Unix socket."""
        return await self._wrap(protocol, await self._connect(socket.socket(socket.AF_UNIX), path), {})

    async def _connect(self, wire: socket.socket, address: Any) -> socket.socket:
        # Before the first await: a fork may happen meanwhile.
        _ours.add(wire)
        try:
            wire.setblocking(False)
            await self.running.sock_connect(wire, address)
        except BaseException:
            wire.close()
            raise
        return wire

    async def _wrap(self, protocol: _Protocol, wire: socket.socket, options: dict[str, Any]) -> _Connected:
        def make() -> asyncio.BaseProtocol:
            made = protocol()
            # asyncpg's future for the answer to its request for TLS. Its error would stay unretrieved when the caller
            # is cancelled while this connects.
            if isinstance(answer := getattr(made, "on_data", None), asyncio.Future):
                answer.add_done_callback(_retrieve)
            return made

        try:
            return await self.running.create_connection(make, sock=wire, **options)
        except BaseException:
            wire.close()
            raise


def _retrieve(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()


async def _find_addresses(host: str, port: int) -> list[Any]:
    with suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return await in_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), name=f"find {host}")


async def in_thread(call: Callable[[], _Result], *, name: str) -> _Result:
    """The result of `call()`, run in a daemon thread of its own; raises what it raises.

    A cancelled caller leaves the thread running.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - the caller's to handle
            _resolve(loop, answer, error)
        else:
            _resolve(loop, answer, result)

    threading.Thread(target=run, name=f"pgbackend {name}", daemon=True).start()
    return await answer


def _resolve(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Any]", outcome: object) -> None:
    def resolve() -> None:
        if answer.done():
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(resolve)
