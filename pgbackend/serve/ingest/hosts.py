"""Which hosts a request may be addressed to, by its Host header or by a target that is a whole URL.

`protocol` checks each request before it is read further. The promise: a web page cannot send events to a broker on a
loopback address. Any site can let its own name lead to 127.0.0.1 (DNS rebinding), but the browser still sends that name
as the Host. So such a broker accepts only its own names, and those that `--allowed-host` adds.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from pgbackend.errors import ConfigError
from pgbackend.serve.ingest.responses import Problem

ANY = "*"

_LONGEST = 300
_INVALID = (400, "Header Host is invalid: expected a name or an address, and optionally a port.")
# RFC 3986: a name, an IPv4 address, or an IPv6 address in brackets, and optionally a port.
_host = re.compile(
    rb"(?P<host>(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?"
).fullmatch
_authority = re.compile(rb"[a-z][a-z0-9+.-]*://([^/?#]*)", re.IGNORECASE).match

_Refusal = tuple[int, str]


class Hosts:
    """The hosts of a broker that listens at the address `bound`: its own and those of `allowed`; `*` allows any.

    If `bound` is not a loopback address and `allowed` is empty, any host is accepted. `name` is what the operator
    called `bound`.
    """

    def __init__(self, bound: str, allowed: Sequence[str] = (), *, name: str = "") -> None:
        self._any = ANY in allowed or not (allowed or ip_address(bound).is_loopback)
        self._names = {_plain(host) for host in (*allowed, name)}
        self._known = lru_cache(maxsize=256)(self._check)

    def problem(self, header: bytes | None, target: bytes, *, local: str, required: bool = True) -> Problem | None:
        """The reason to refuse the host of a request at the address `local`; None if it is accepted.

        `header` is the Host header: None without one, which is accepted unless `required`; empty if there are several.
        """
        refusal: _Refusal | None
        if header is None:
            refusal = (400, "Header Host is missing.") if required else None
        elif not header:
            refusal = 400, "Header Host is empty or duplicated."
        else:
            refusal = self._refusal(header, local)
        # The host of a target counts instead of the header's, which must be valid all the same.
        if not target.startswith(b"/") and (refusal is None or refusal[0] != 400) and (found := _authority(target)):
            refusal = self._refusal(found[1], local)
        return None if refusal is None else Problem(*refusal)

    def _refusal(self, host: bytes, local: str) -> _Refusal | None:
        return _INVALID if len(host) > _LONGEST else self._known(host, local)

    def _check(self, host: bytes, local: str) -> _Refusal | None:
        if (found := _host(host)) is None:
            return _INVALID
        plain = _plain(found["host"].decode())
        if host.startswith(b"[") and not _is_address(plain):
            return _INVALID
        if self._any or plain in self._names or _is_own(plain, local):
            return None
        return 421, (
            f"Host {plain[:100]!r} does not belong to this broker. Send to localhost, or allow the name with "
            f"`pgbackend serve --allowed-host {plain[:100]}`."
        )


def checked_host(text: str) -> str:
    """`text`, which is a host to allow: `*`, or a name or an address without a port. Raises ConfigError if not."""
    bracketed = f"[{text}]" if ":" in text and not text.startswith("[") else text
    found = _host(bracketed.encode())
    if text != ANY and (found is None or found["host"] != bracketed.encode()):
        raise ConfigError(f"Allowed host {text!r} is not a host: expected a name or an address without a port, or *.")
    return text


def _plain(host: str) -> str:
    """The canonical form of a name or an address: lower case, no brackets, no dot at the end."""
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
    """Whether this is a name of the machine for itself, or the address that the connection came to."""
    if plain == "localhost" or plain.endswith(".localhost") or plain == _plain(local):
        return True
    return _is_address(plain) and ip_address(plain).is_loopback
