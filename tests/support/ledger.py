"""The truth about a test: what was produced, what was handled, and so what was lost, doubled or reordered.

Handlings go to a file, one short write each, because the process that handles may be killed at any moment: what it
wrote before stays.
"""

import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pgbackend.codec.event import Event


@dataclass(frozen=True, slots=True)
class Handling:
    """One dispatch of one event, as the worker that handled it wrote it down."""

    id: str
    position: int
    attempt: int
    key: str | None
    worker: int
    """Process id."""


@dataclass
class Ledger:
    """Everything that was produced, and the file in which workers note what they handle.

    >>> import tempfile
    >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger")
    >>> ledger.produced.extend(["a", "b", "c"])
    >>> for handling in (Handling("a", 1, 1, None, 7), Handling("c", 3, 1, None, 7), Handling("a", 1, 1, None, 8)):
    ...     ledger.note(handling)
    >>> ledger.lost(), ledger.doubled(), ledger.unknown()
    (['b'], {'a': 2}, [])
    """

    path: Path
    produced: list[str] = field(default_factory=list)
    """The ids whose produce() returned."""
    uncertain: list[str] = field(default_factory=list)
    """The ids of which nobody can say whether they are stored."""

    def note(self, handling: Handling) -> None:
        """The handling is in the file, whatever happens to this process next."""
        line = json.dumps([handling.id, handling.position, handling.attempt, handling.key, handling.worker]) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    async def handle(self, event: Event) -> None:
        """A dispatcher that notes the event."""
        key = "\0".join(event.key) if event.key else None
        self.note(Handling(event.id, event.position, event.attempt, key, os.getpid()))

    def handled(self) -> list[Handling]:
        """Every handling so far, in the order of the notes."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return []
        # Only what ends in a newline was written whole.
        return [Handling(*json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def lost(self) -> list[str]:
        """Produced and not handled, in order of production."""
        handled = {handling.id for handling in self.handled()}
        return [id_ for id_ in self.produced if id_ not in handled]

    def unknown(self) -> list[str]:
        """Handled though nobody may have produced it."""
        known = {*self.produced, *self.uncertain}
        return sorted({handling.id for handling in self.handled()} - known)

    def doubled(self) -> dict[str, int]:
        """Ids that were handled more than once, and how often."""
        counts = Counter(handling.id for handling in self.handled())
        return {id_: count for id_, count in counts.items() if count > 1}

    def reordered(self, *, by_key: bool = False) -> list[tuple[Handling, Handling]]:
        """Neighbours whose first handlings came against log order: over everything, or within each key."""
        lanes: dict[Hashable, list[Handling]] = {}
        for handling in first_handlings(self.handled()):
            lane: Hashable = handling.key if by_key and handling.key else (None if not by_key else handling.id)
            lanes.setdefault(lane, []).append(handling)
        return [pair for lane in lanes.values() for pair in backwards(lane)]


def first_handlings(handlings: Iterable[Handling]) -> list[Handling]:
    """Each event once, where it was handled first."""
    first: dict[int, Handling] = {}
    for handling in handlings:
        first.setdefault(handling.position, handling)
    return list(first.values())


def backwards(lane: Sequence[Handling]) -> list[tuple[Handling, Handling]]:
    """Pairs of neighbours of which the second has the lower position."""
    return [(a, b) for a, b in pairwise(lane) if b.position < a.position]
