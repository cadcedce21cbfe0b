"""The plan of a run: which fault hits which target, and when. It follows from the seed alone. Pure.

Faults are drawn from decks. Each deck holds every kind of fault, shuffled: a short run meets each kind once, a long one
meets them in ever new combinations. No target has two faults at once, at least one worker is always up, and every fault
ends before the plan does.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

LEASE = 3.0
"""Seconds: `lease_timeout` of the run. Short, so that pauses beyond it fit into a short run."""

Name = Literal["log", "bank", "orders"]
"""The plans: each has an application that works on the log while the faults happen."""
Kind = Literal[
    "kill", "stop", "cut", "stall", "lose", "terminate", "clock", "leave", "server fast", "server immediate",
    "server kill", "server failover", "subscribe",
]  # fmt: skip

_PAUSE = (0.5, 1.5)
"""Seconds from one fault to the next, least and most."""
_MARGIN = 2.0
"""Seconds before the first fault, and after the last."""
_SERVER_AWAY = 6.0
"""Seconds from one restart of the server to the next, at least."""
_RESPITE = 0.5
"""Seconds from the end of a fault to the next one at the same target, at least."""

_SHORT = (0.2 * LEASE, 0.7 * LEASE)
_LONG = (1.3 * LEASE, 2.2 * LEASE)
_Card = tuple[Kind, tuple[float, float]]
"""A kind of fault, and how many seconds it lasts, least and most."""
_DECK: tuple[_Card, ...] = (
    ("kill", (0.0, 2.0)),
    ("kill", (0.0, 0.0)),
    ("stop", _SHORT),
    ("stop", _LONG),
    ("cut", (0.0, 0.0)),
    ("cut", _SHORT),
    ("stall", _SHORT),
    ("stall", _LONG),
    ("terminate", (0.0, 0.0)),
    ("terminate", (0.0, 0.0)),
    ("terminate", (0.0, 0.0)),
    ("clock", (0.0, 0.0)),
    ("leave", (0.0, 2.0)),
)
_SERVER_DECK: tuple[_Card, ...] = (
    ("server fast", (0.0, 0.0)),
    ("server immediate", (0.0, 0.0)),
    ("server kill", (0.0, 0.0)),
)
_APPLICATION_DECK: tuple[_Card, ...] = (*_DECK[1:], ("lose", (1.0, 2.0)), ("lose", (1.0, 2.0)), ("lose", (1.0, 2.0)))
"""Where an application commits transactions of its own. It has one `kill` less, and there is a calm after each storm of
faults: a shard whose owners die again and again is run with care, one event at a time, until it was calm for a while.
Batches would have hardly any faults otherwise."""
_STORM, _CALM = 30.0, 45.0
"""Seconds."""
DOWN = frozenset({"kill", "stop", "leave"})
"""Faults during which a worker does nothing."""
_RESTARTS = frozenset({"server fast", "server immediate", "server kill"})
_ANY_PROCESS = frozenset({"cut", "stall", "lose", "terminate"})
"""Faults that hit producers too."""


@dataclass(frozen=True, slots=True)
class Step:
    """One fault."""

    at: float
    """Seconds after the run began."""
    kind: Kind
    target: str
    """A place, "server", or "" for what concerns all processes."""
    seconds: float = 0.0
    """How long it lasts: until the process or the network works again, or the next process starts."""
    detail: float = 0.0
    """`clock`: seconds by which the wall clock jumps. `terminate`: which of the process's connections, from 0 to 1."""

    def __str__(self) -> str:
        what = f"{self.at:9.3f} s  {self.kind} {self.target}".rstrip()
        if self.kind == "clock":
            return f"{what} by {self.detail:+.0f} s"
        if self.kind == "terminate":
            return f"{what}, the connection at {self.detail:.3f}"
        return f"{what} for {self.seconds:.3f} s" if self.seconds else what


@dataclass(frozen=True, slots=True)
class Plan:
    """All faults of a run, in order."""

    seed: int
    seconds: float
    workers: tuple[str, ...]
    producers: tuple[str, ...]
    steps: tuple[Step, ...]
    name: Name = "log"

    @classmethod
    def make(
        cls, seed: int, seconds: float, *, server: bool, name: Name = "log", workers: int = 3, producers: int = 2
    ) -> "Plan":
        """The plan of this seed. `server`: whether PostgreSQL itself may be restarted.

        >>> Plan.make(7, 60, server=True) == Plan.make(7, 60, server=True)
        True
        """
        chance = random.Random(f"pgbackend torture {seed}" if name == "log" else f"pgbackend torture {name} {seed}")  # noqa: S311 - not a secret
        deck = [*(_DECK if name == "log" else _APPLICATION_DECK), *(_SERVER_DECK if server else ())]
        names = tuple(f"worker-{number}" for number in range(workers))
        callers = tuple(f"producer-{number}" for number in range(producers))
        steps = list(_draw_faults(chance, seconds, names, callers, deck, storm=math.inf if name == "log" else _STORM))
        if name == "log":
            steps.append(Step(0.4 * seconds, "subscribe", ""))
        return cls(seed, seconds, names, callers, tuple(sorted(steps, key=lambda step: step.at)), name)

    def __str__(self) -> str:
        return "\n".join(str(step) for step in self.steps)


def _draw_faults(
    chance: random.Random,
    seconds: float,
    workers: tuple[str, ...],
    producers: tuple[str, ...],
    deck: list[_Card],
    *,
    storm: float,
) -> Iterator[Step]:
    """`storm`: seconds of faults before each calm."""
    at, until = _MARGIN, seconds - _MARGIN
    calm_from = at + storm
    busy = dict.fromkeys((*workers, *producers, "server"), 0.0)
    down = dict.fromkeys(workers, 0.0)

    def free(kind: Kind) -> list[str]:
        """The targets that such a fault may hit now."""
        if kind in DOWN and sum(end > at for end in down.values()) >= len(workers) - 1:
            return []
        targets = ("server",) if kind in _RESTARTS else (*workers, *producers) if kind in _ANY_PROCESS else workers
        return [target for target in targets if busy[target] <= at]

    cards, held = _cards(chance, deck), list[_Card]()
    while at < until:
        card = _draw(cards, held, free)
        if card is not None:
            kind, (least, most) = card
            lasts, target = chance.uniform(least, most), chance.choice(free(kind))
            if at + lasts < until:
                busy[target] = at + max(lasts, _SERVER_AWAY if kind in _RESTARTS else _RESPITE)
                if kind in DOWN:
                    down[target] = at + lasts
                detail = 0.0
                if kind == "clock":
                    detail = float(chance.choice((-1, 1)) * chance.randint(10, 400_000))
                elif kind == "terminate":
                    detail = chance.random()
                yield Step(at, kind, target, lasts, detail)
        at += chance.uniform(*_PAUSE)
        if at >= calm_from:
            at += _CALM
            calm_from = at + storm


def _draw(cards: Iterator[_Card], held: list[_Card], free: Callable[[Kind], list[str]]) -> _Card | None:
    """The next card that has a free target, if any. Cards without one are held, and come first the next time."""
    for index, card in enumerate(held):
        if free(card[0]):
            return held.pop(index)
    while len(held) < len(_DECK):
        card = next(cards)
        if free(card[0]):
            return card
        held.append(card)
    return None


def _cards(chance: random.Random, deck: list[_Card]) -> Iterator[_Card]:
    """One shuffled deck after the other, without end."""
    while True:
        chance.shuffle(deck)
        yield from deck
