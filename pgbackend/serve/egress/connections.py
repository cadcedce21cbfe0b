"""Connections to targets: whom they may reach, when they are used again, and how much of an answer they take at once.

The promise: with `deny_private` no socket connects to an address that is not a public one, whatever name or literal led
to it; and a connection gives each request its own answer, or an error.
"""

import errno
import os
import re
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

_INTERIM_ANSWERS = 8
"""Informational (1xx) answers to one request; beyond that they are a flood. Go's client takes 5."""
_EMPTY_LINES = 8
"""Bytes of line ends before a status line. Some servers send one line end too many after a body."""
_HEAD_BYTES = 1 << 16
"""From the request to the end of its answer's head, interim answers included."""
_FRAMING_BYTES = 1 << 16
"""Head, chunk sizes and trailers of an answer, beyond one byte of them for each byte of its body."""
_PIECE_BYTES = 1 << 14
"""Of a body at a time: in 256 KiB the parser finds 40,000 chunks, or answers that nobody asked for, and takes 0.1 s."""

_empty_lines = re.compile(rb"[\r\n]*").match
_end_of_head = re.compile(rb"\n\r?\n").search


def resolve_many_names() -> None:
    """From now on 32 names can be looked up at a time, unless the environment says otherwise.

    To be called before the first is: uvloop's threads are started then, 4 as a rule, and half of them may wait for
    names. Two that no name server answers for would keep every other target waiting for a new connection.
    """
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")


class Connector(aiohttp.TCPConnector):
    """A pool of connections to all targets.

    It has no limit of its own: each `Delivery` has one, and a pool that deliveries wait for would let one slow target
    use up the timeouts of the others on its host. Connections that nobody used for a quarter of a minute are closed,
    so that nothing is kept of targets that a reload has removed.
    """

    def __init__(self, *, deny_private: bool = False, keepalive_timeout: float = 15.0) -> None:
        super().__init__(
            limit=0, keepalive_timeout=keepalive_timeout, socket_factory=public_socket if deny_private else None
        )
        # aiohttp's own has no bounds for interim answers and takes what comes unasked for the next request's answer.
        self._factory = partial(_TargetConnection, loop=self._loop)  # type: ignore[assignment]  # is one of its kind

    def _get(self, *of: Any) -> Coroutine[Any, Any, aiohttp.connector.Connection | None]:
        """An idle connection, if there is one and it may be used."""
        return _none() if _only_new.get() else super()._get(*of)


_only_new = ContextVar("only_new", default=False)


@contextmanager
def new_connection() -> Iterator[None]:
    """Requests within it are sent over connections that were not used before."""
    token = _only_new.set(True)
    try:
        yield
    finally:
        _only_new.reset(token)


async def _none() -> None:
    pass


class StaleConnectionError(aiohttp.ServerDisconnectedError):
    """The target closed an idle connection just when it was used again: nothing says that it saw the request."""


class _TargetConnection(ResponseHandler):
    """One connection: an answer to each request, one after the other."""

    def __init__(self, loop: Any) -> None:
        super().__init__(loop)
        self._requests = 0
        self._answers = 0
        self._interim = 0
        self._received = 0
        """Bytes since the request."""
        self._empty = 0
        """Bytes of line ends that came before a status line."""
        self._head = b""
        """The last bytes of a head whose end has not come."""

    def set_response_params(self, **options: Any) -> None:
        # aiohttp calls it before it sends a request.
        self._requests += 1
        self._interim = self._received = self._empty = 0
        super().set_response_params(**options)

    def data_received(self, data: bytes) -> None:
        if not data:
            super().data_received(data)  # aiohttp goes on with what it held back
        start = 0
        while start < len(data) and self.exception() is None:
            if self._answers < self._requests:
                start = self._feed_head(data, start)
            elif self._is_answered():
                # Kept, it would be read as the answer to the next request, which the target has not seen.
                self._give_up("sends more than its answer")
            else:
                start = self._feed_body(data, start)

    def _feed_head(self, data: bytes, start: int) -> int:
        """Give the parser one head, or what is there of it; where the next one begins.

        One at a time: the parser makes an object of each interim answer before anybody can count them, and for what
        must not come behind an answer, such as the body of a 204, it would throw the answer away.
        """
        if not self._head:
            empty = _empty_lines(data, start)
            assert empty is not None  # noqa: S101 - it matches nothing as well
            self._empty += empty.end() - start
            if self._empty > _EMPTY_LINES:
                self._give_up("sends empty lines before its answer")
                return start
            start = empty.end()
        seam = _end_of_head(self._head + data[start : start + 2])
        if seam is not None:
            end = start + seam.end() - len(self._head)
        else:
            found = _end_of_head(data, start)
            end = len(data) if found is None else found.end()
        if start < end:
            whole = seam is not None or found is not None
            self._head = b"" if whole else (self._head + data[max(start, end - 2) : end])[-2:]
            self._received += end - start
            super().data_received(data[start:end])
        if self._answers < self._requests and self._received > _HEAD_BYTES and self.exception() is None:
            self._give_up(f"sends more than {_HEAD_BYTES} bytes before the body of its answer")
        return end

    def _feed_body(self, data: bytes, start: int) -> int:
        """Give the parser the next piece of a body; where the rest begins."""
        end = min(len(data), start + _PIECE_BYTES)
        self._received += end - start
        super().data_received(data[start:end])
        payload = self._payload
        # What the parser has not been through yet is no framing: it holds that back while nobody reads the body.
        if payload is None or self._reading_paused or self.exception() is not None:
            return end
        if self._received - 2 * payload.total_bytes > _FRAMING_BYTES:
            self._give_up("sends more framing than body", payload)
        return end

    def _is_answered(self) -> bool:
        """Whether the last request has its whole answer."""
        return 0 < self._requests == self._answers and (self._payload is None or self._payload.is_eof())

    def feed_data(self, data: Any, size: int = 0) -> None:
        status = data[0].code
        if self._answers == self._requests:
            # Kept, it would be read as the answer to the next request, which the target has not seen.
            self._give_up("answers without having been asked")
        elif 100 <= status < 200 and status != 101:
            self._interim += 1
            if self._interim > _INTERIM_ANSWERS:
                self._give_up("sends interim answers and no final one")
        else:
            self._answers += 1
        super().feed_data(data, size)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        was_idle = 0 < self._answers == self._requests - 1
        if was_idle and isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
            exc = StaleConnectionError(str(exc))
        super().set_exception(exc, *cause)

    def _give_up(self, reason: str, payload: aiohttp.StreamReader | None = None) -> None:
        error = aiohttp.ClientConnectionError(reason)
        if payload is not None:
            payload.set_exception(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()


async def read(response: aiohttp.ClientResponse, limit: int, *, into: bytearray) -> None:
    """The beginning of the body, `limit` bytes at most, is in `into`. Raises what aiohttp does when it breaks off."""
    while len(into) < limit and (some := await response.content.read(limit - len(into))):
        into += some


# Whom they may reach


def public_socket(found: tuple[Any, ...]) -> socket.socket:
    """A socket for this result of `getaddrinfo`. Raises PermissionError when its address is not a public one.

    This is the last stop before `connect()`, which is given the same address: what a name resolved to before, or
    resolves to next, does not matter.
    """
    family, kind, protocol, _, (host, *_) = found
    if not is_public(host):
        raise PermissionError(errno.EACCES, f"{host} is not a public address, and --deny-private-targets is on")
    return socket.socket(family=family, type=kind, proto=protocol)


# An IPv6 address can stand for one of IPv4: a network that all of these are in, and how far right the IPv4 bits end.
_STANDS_FOR_IPV4 = (
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # translated
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("::/96"), 0),  # compatible, of old
    (IPv6Network("2002::/16"), 80),  # 6to4
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Public by their numbers, yet answered by the machine's own cloud: Azure's platform, Oracle's metadata.
_OF_THE_CLOUD = (ip_network("168.63.129.16/32"), ip_network("192.0.0.0/24"))


def is_public(host: str) -> bool:
    """Whether it is an address of the public internet. Anything but the plain text of an address is not.

    >>> is_public("93.184.215.14"), is_public("10.0.0.1"), is_public("::ffff:127.0.0.1"), is_public("2130706433")
    (True, False, False, False)
    """
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        embedded = _ipv4_in(address)
        if embedded is None:
            return address in _GLOBAL_UNICAST and address.is_global
        address = embedded
    return address.is_global and not address.is_multicast and not any(address in network for network in _OF_THE_CLOUD)


def _ipv4_in(address: IPv6Address) -> IPv4Address | None:
    for network, shift in _STANDS_FOR_IPV4:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
    return None
