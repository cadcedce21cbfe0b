"""The sockets that a broker serves on: `app` binds them before anything else, so that a port in use is told at once."""

import errno
import socket
from dataclasses import dataclass

from pgbackend.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ports:
    """The sockets of a broker; it has an admin port only if one was asked for."""

    events: socket.socket
    admin: socket.socket | None = None

    def close(self) -> None:
        for bound in filter(None, (self.events, self.admin)):
            bound.close()


def bind(host: str, port: int, *, option: str = "--port") -> socket.socket:
    """A socket bound to that address, not listening yet. Raises ConfigError, which names `option` as the way out."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # If a name has both, IPv4 first: clients that know only one try that.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"Host {host!r} has no address: {error.strerror}. Choose another with --host.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, option, error) from None
    bound.setblocking(False)
    return bound


def cannot_listen(host: str, port: int, option: str, error: OSError) -> ConfigError:
    """The error for a socket that cannot be bound, or cannot listen."""
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"Host {host!r} is not an address of this machine. Choose another with --host.")
    reason = "it is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    return ConfigError(f"Cannot listen on port {port} of {host}: {reason}. Choose another with {option}.")
