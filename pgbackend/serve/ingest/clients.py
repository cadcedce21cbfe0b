"""Budgets of memory and connections for all clients, shared by their addresses.

`listener` counts connections in a `Budget`, `connection` the bytes of heads, `ingest` those of bodies. The promise: one
address, or a few, cannot use up a budget, so that there is always something left for the others.
"""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address


class Budget:
    """So much of something for all clients together. No address may hold more than what is left for the others.

    So the first that takes all it can gets a half, the next a quarter. A reverse proxy, all of whose clients have one
    address, has room in that; a fixed share would be too small for it, or too large for ten attackers.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        """By all of them. The ingest adds what it holds for so short a time that no address matters."""
        self._by_address: dict[str, int] = {}

    def take(self, address: str, amount: int, *, share: int = 1) -> bool:
        """Whether `address` may hold so much more; then it does. `share`: how many times what is left."""
        own = self._by_address.get(address, 0) + amount
        if own > share * (self.total - self.held - amount):
            return False
        self.held += amount
        self._by_address[address] = own
        return True

    def give_back(self, address: str, amount: int) -> None:
        """`address` holds so much less."""
        self.held -= amount
        own = self._by_address.get(address, 0) - amount
        if own:
            self._by_address[address] = own
        else:
            self._by_address.pop(address, None)


@lru_cache(maxsize=4096)
def address_of(host: str) -> str:
    """The IPv4 address, or the /64 of an IPv6 one: providers give a customer a whole /64, so it counts as one client.

    >>> address_of("192.0.2.1"), address_of("::ffff:192.0.2.1"), address_of("2001:db8::7:1"), address_of("fe80::1%eth0")
    ('192.0.2.1', '192.0.2.1', '2001:db8::/64', 'fe80::/64')
    """
    address = ip_address(host)
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
