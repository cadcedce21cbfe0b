"""The fair share: which worker should run which shard, as every worker computes it from what all can see. Pure.

No worker decides for the others. Each reads the same rows, computes the same plan, and does its own part of it: it
claims the free shards that are its own in the plan, releases those that are another worker's, and asks for those that
it should get. A shard moves only if that brings two workers closer to each other. So a plan that has been carried out
leads to no further move, and shards do not go back and forth.

A worker releases a shard only for another one that asked a moment ago from its event loop. A worker whose dispatcher
blocks that loop is alive, but could not run what it is given. Workers may run different subscriptions; then a worker
may get one shard so that it can give another one to a third worker.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

ShardKey = tuple[str, int, int]
"""Subscription, number of shards, and which of them."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A living worker, as the others see it."""

    id: UUID
    subscriptions: frozenset[str]
    """The subscriptions whose shards it can run."""
    asks: bool
    """Whether it asked for more shards a moment ago."""


def share(owners: Mapping[ShardKey, UUID | None], peers: Sequence[Peer]) -> dict[ShardKey, UUID]:
    """Which worker should run each shard, given its owner now (None: no owner). Shards that none can run are left out.

    The result is the same for the same arguments in any order. In it no worker has two shards more than another that
    asks and could take one of them, directly or by way of other workers.
    """
    plan = _Plan(owners, sorted(peers, key=lambda peer: peer.id))
    plan.assign_free()
    plan.balance()
    return plan.assigned


class _Plan:
    def __init__(self, owners: Mapping[ShardKey, UUID | None], peers: Sequence[Peer]) -> None:
        self.assigned = {key: owner for key, owner in sorted(owners.items()) if owner is not None}
        self._free = sorted(key for key, owner in owners.items() if owner is None)
        self._peers = {peer.id: peer for peer in peers}
        self._load = {peer.id: 0 for peer in peers}
        self._shards: dict[UUID, dict[str, list[ShardKey]]] = {peer.id: {} for peer in peers}
        """Each worker's shards, by subscription."""
        for key, owner in self.assigned.items():
            # An owner that is not among the peers has just registered: its shards are not moved.
            if owner in self._peers:
                self._add(key, owner)

    def _add(self, key: ShardKey, owner: UUID) -> None:
        self._load[owner] += 1
        self._shards[owner].setdefault(key[0], []).append(key)

    def assign_free(self) -> None:
        """Each free shard goes to the worker with the fewest, among those that can run it."""
        for key in self._free:
            able = [peer.id for peer in self._peers.values() if key[0] in peer.subscriptions]
            if able:
                owner = self.assigned[key] = min(able, key=self._load.__getitem__)
                self._add(key, owner)

    def balance(self) -> None:
        """Move shards, one at a time, as long as a move brings two workers closer to each other."""
        while moves := self._next_moves():
            for giver, subscription, taker in moves:
                key = self._shards[giver][subscription].pop()
                self._load[giver] -= 1
                self._add(key, taker)
                self.assigned[key] = taker

    def _next_moves(self) -> list[tuple[UUID, str, UUID]]:
        """The chain of moves (giver, subscription, taker) that takes a shard from a worker with many to one with few.

        Breadth first from the worker with the most, so the chain is as short as possible.
        """
        least = min((self._load[peer.id] for peer in self._peers.values() if peer.asks), default=None)
        if least is None:
            return []
        for start in sorted(self._load, key=lambda worker: (-self._load[worker], worker)):
            if self._load[start] < least + 2:
                break
            came_from: dict[UUID, tuple[UUID, str] | None] = {start: None}
            reached = deque([start])
            while reached:
                giver = reached.popleft()
                for taker in self._peers.values():
                    if taker.id in came_from:
                        continue
                    given = self._subscription_for(giver, taker)
                    if given is None:
                        continue
                    came_from[taker.id] = (giver, given)
                    if taker.asks and self._load[taker.id] <= self._load[start] - 2:
                        return _chain_to(taker.id, came_from)
                    reached.append(taker.id)
        return []

    def _subscription_for(self, giver: UUID, taker: Peer) -> str | None:
        """A subscription of which the giver has a shard that the taker can run."""
        return next((name for name, keys in self._shards[giver].items() if keys and name in taker.subscriptions), None)


def _chain_to(end: UUID, came_from: Mapping[UUID, tuple[UUID, str] | None]) -> list[tuple[UUID, str, UUID]]:
    moves = []
    taker = end
    while (step := came_from[taker]) is not None:
        giver, subscription = step
        moves.append((giver, subscription, taker))
        taker = giver
    return moves
