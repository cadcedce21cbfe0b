"""Which hosts a request may name as the one it is for.

A page of any web site can have its own name lead to 127.0.0.1 (DNS rebinding), and its reader's browser then sends
events to a broker that listens there for this machine alone. The Host header tells: it still has the page's name. So a
broker on a loopback address takes only names of its own, and those that `--allowed-host` adds.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from pgbackend.errors import ConfigError

ANY = "*"

_LONGEST = 300
_NO_HOST = (400, "Host: expected a name or an address, and maybe a port.")
# RFC 3986: a name, an IPv4 address, or an IPv6 address in brackets, and maybe a port.
_host = re.compile(
    rb"(?P<host>(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?"
).fullmatch
_authority = re.compile(rb"[a-z][a-z0-9+.-]*://([^/?#]*)", re.IGNORECASE).match


class Hosts:
    """The hosts of a broker that listens at `bound`: its own, and those of `allowed`, of which `*` is any.

    Every host will do where `bound` is no loopback address and nothing is allowed by name. `name`: what `bound` was
    called when it was asked for.
    """

    def __init__(self, bound: str, allowed: Sequence[str] = (), *, name: str = "") -> None:
        self._any = ANY in allowed or not (allowed or ip_address(bound).is_loopback)
        self._names = {_plain(host) for host in (*allowed, name)}
        self._known = lru_cache(maxsize=256)(self._look)

    def problem(self, host: bytes, local: str) -> tuple[int, str] | None:
        """Status and words for a request that names this host at the address `local`; None when all is well."""
        return _NO_HOST if len(host) > _LONGEST else self._known(host, local)

    def _look(self, host: bytes, local: str) -> tuple[int, str] | None:
        if (found := _host(host)) is None:
            return _NO_HOST
        plain = _plain(found["host"].decode())
        if host.startswith(b"[") and not _is_address(plain):
            return _NO_HOST
        if self._any or plain in self._names or _is_own(plain, local):
            return None
        return 421, (
            f"Host {plain[:100]!r} is none of this broker's. Send to localhost, or allow the name with "
            f"`pgbackend serve --allowed-host {plain[:100]}`."
        )


def host_of_target(target: bytes) -> bytes | None:
    """The host of a request target that is a whole URL, which counts instead of the header; None of any other."""
    found = None if target.startswith(b"/") else _authority(target)
    return None if found is None else found[1]


def checked_host(text: str) -> str:
    """A host that may be allowed: `*`, or a name or an address without a port. Raises ConfigError."""
    bracketed = f"[{text}]" if ":" in text and not text.startswith("[") else text
    found = _host(bracketed.encode())
    if text != ANY and (found is None or found["host"] != bracketed.encode()):
        raise ConfigError(f"Allowed host {text!r} is no host: expected a name or an address without a port, or *.")
    return text


def _plain(host: str) -> str:
    """The one form of a name or an address: lower case, no brackets, no dot at the end."""
    plain = host.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        address = ip_address(plain)
    except ValueError:
        return plain
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _is_address(plain: str) -> bool:
    try:
        ip_address(plain)
    except ValueError:
        return False
    return True


def _is_own(plain: str, local: str) -> bool:
    """A name of this machine for itself, or the address that the connection came to."""
    if plain == "localhost" or plain.endswith(".localhost") or plain == _plain(local):
        return True
    return _is_address(plain) and ip_address(plain).is_loopback
