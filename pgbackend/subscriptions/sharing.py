"""Who is to run which shard: the fair share, as each worker works it out from what all of them can see. Pure.

Nobody decides for the others. Each worker looks at the same rows and comes to the same plan, and then does its own
part of it: it claims the free shards that are its own in the plan, gives up those that are another's by now, and asks
for those that it should have. A shard moves only where that brings two workers closer to each other, so a plan that has
been carried out leads to no further move: shards do not go back and forth.

Who gives a shard up does so only for a worker that has asked a moment ago, from its event loop: a worker whose
dispatcher blocks that loop is alive, and could not run what it is given. Workers may run different subscriptions: then
a worker may get a shard so that it can give another one up to a third.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

ShardKey = tuple[str, int, int]
"""Subscription, number of shards, and which of them."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker that is alive, as the others see it."""

    id: UUID
    subscriptions: frozenset[str]
    """Those whose shards it can run."""
    asks: bool
    """Whether it has room for more than it has, and has said so a moment ago."""


def share(owners: Mapping[ShardKey, UUID | None], peers: Sequence[Peer]) -> dict[ShardKey, UUID]:
    """Who should have each shard, given who has it now (None: nobody). Shards that nobody can run are not in it.

    The same for the same arguments, in whatever order they come. After it no worker has two more than another one that
    asks and could take one of them, itself or by way of others.
    """
    plan = _Plan(owners, sorted(peers, key=lambda peer: peer.id))
    plan.take_in()
    plan.balance()
    return plan.assigned


class _Plan:
    def __init__(self, owners: Mapping[ShardKey, UUID | None], peers: Sequence[Peer]) -> None:
        self.assigned = {key: owner for key, owner in sorted(owners.items()) if owner is not None}
        self._free = sorted(key for key, owner in owners.items() if owner is None)
        self._peers = {peer.id: peer for peer in peers}
        self._load = {peer.id: 0 for peer in peers}
        self._shards: dict[UUID, dict[str, list[ShardKey]]] = {peer.id: {} for peer in peers}
        """Of each worker, by subscription."""
        for key, owner in self.assigned.items():
            # Of one that tells nothing about itself nothing is taken: it may not know how to give it up.
            if owner in self._peers:
                self._add(key, owner)

    def _add(self, key: ShardKey, owner: UUID) -> None:
        self._load[owner] += 1
        self._shards[owner].setdefault(key[0], []).append(key)

    def take_in(self) -> None:
        """Each free shard goes to the worker that has least, of those that can run it."""
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
        """The moves, one behind the other, that take one from a worker with much to one with little."""
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
                    given = next(
                        (s for s, keys in self._shards[giver].items() if keys and s in taker.subscriptions), None
                    )
                    if given is None:
                        continue
                    came_from[taker.id] = (giver, given)
                    if taker.asks and self._load[taker.id] <= self._load[start] - 2:
                        return _way_to(taker.id, came_from)
                    reached.append(taker.id)
        return []


def _way_to(end: UUID, came_from: Mapping[UUID, tuple[UUID, str] | None]) -> list[tuple[UUID, str, UUID]]:
    moves = []
    taker = end
    while (step := came_from[taker]) is not None:
        giver, subscription = step
        moves.append((giver, subscription, taker))
        taker = giver
    return moves
