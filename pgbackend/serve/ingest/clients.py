"""Budgets that all clients share, and the address by which a client counts.

`listener` counts connections in a `Budget`, `protocol` the memory of heads, `handler` that of bodies. The promise: one
address, or a few, cannot use up a budget, so something is always left for the others.
"""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address


class Budget:
    """An amount that all clients share. No address may hold more than it leaves for the others.

    So the first greedy address gets a half, the next a quarter. All clients of a reverse proxy have its address: a
    fixed share would be too small for them, or too large for ten attackers.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        """By all addresses. `Ingest.take_whole` adds to it what is held too briefly to count for an address."""
        self._by_address: dict[str, int] = {}

    def take(self, address: str, amount: int, *, share: int = 1) -> bool:
        """Whether `address` may hold `amount` more, at most `share` times what is left; if so, it does."""
        own = self._by_address.get(address, 0) + amount
        if own > share * (self.total - self.held - amount):
            return False
        self.held += amount
        self._by_address[address] = own
        return True

    def give_back(self, address: str, amount: int) -> None:
        """`address` holds `amount` less."""
        self.held -= amount
        own = self._by_address.get(address, 0) - amount
        if own:
            self._by_address[address] = own
        else:
            self._by_address.pop(address, None)


class Holding:
    """The part of a budget that one connection, or one request, of `address` holds."""

    __slots__ = ("_address", "_budget", "amount")

    def __init__(self, budget: Budget, address: str) -> None:
        self._budget = budget
        self._address = address
        self.amount = 0

    def grow(self, amount: int, *, share: int = 1) -> bool:
        """Whether the budget allows `amount` more, as in `Budget.take`; if so, it is held."""
        if not self._budget.take(self._address, amount, share=share):
            return False
        self.amount += amount
        return True

    def resize(self, amount: int) -> bool:
        """Whether the budget allows `amount` in all; if so, that much is held."""
        if amount > self.amount:
            return self.grow(amount - self.amount)
        self._budget.give_back(self._address, self.amount - amount)
        self.amount = amount
        return True

    def release(self) -> None:
        """Nothing is held any more."""
        self.resize(0)


@lru_cache(maxsize=4096)
def address_of(host: str) -> str:
    """The IPv4 address, or the /64 of an IPv6 address: providers give each customer a whole /64.

    >>> address_of("192.0.2.1"), address_of("::ffff:192.0.2.1"), address_of("2001:db8::7:1"), address_of("fe80::1%eth0")
    ('192.0.2.1', '192.0.2.1', '2001:db8::/64', 'fe80::/64')
    """
    address = ip_address(host)
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
