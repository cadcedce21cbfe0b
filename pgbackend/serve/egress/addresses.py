"""Public addresses, and sockets that connect to no others: what `--deny-private-targets` does.

The promise: no socket connects to an address that is not public, whatever name or literal led to it.
"""

import errno
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any


def public_socket(found: tuple[Any, ...]) -> socket.socket:
    """A socket for this result of `getaddrinfo`. Raises PermissionError when its address is not public.

    `connect()` gets the very address that is checked here, so it does not matter what the name resolves to next.
    """
    family, kind, protocol, _, (host, *_) = found
    if not is_public(host):
        raise PermissionError(errno.EACCES, f"{host} is not a public address, and --deny-private-targets is on")
    return socket.socket(family=family, type=kind, proto=protocol)


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
        embedded = _embedded_ipv4(address)
        if embedded is None:
            return address in _GLOBAL_UNICAST and address.is_global
        address = embedded
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOUD)


_EMBEDS_IPV4 = (  # networks of IPv6 addresses that embed an IPv4 address, and the bits to the right of it
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # translated
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("::/96"), 0),  # compatible (obsolete)
    (IPv6Network("2002::/16"), 80),  # 6to4
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Public numbers that the cloud answers inside a machine: Azure's platform, Oracle's metadata.
_CLOUD = (ip_network("168.63.129.16/32"), ip_network("192.0.0.0/24"))


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    for network, shift in _EMBEDS_IPV4:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
    return None
