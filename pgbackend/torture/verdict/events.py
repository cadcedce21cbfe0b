"""Facts: what the producers know of their events, and what is in the log."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pgbackend.torture.audit import Stored
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.rulings import NEVER

UNKNOWN, ACKNOWLEDGED, REFUSED, ROLLED_BACK, UNCERTAIN = (
    "unknown",
    "acknowledged",
    "refused",
    "rolled back",
    "uncertain",
)
_OUTCOMES = (UNKNOWN, ACKNOWLEDGED, REFUSED, ROLLED_BACK, UNCERTAIN)
_BY_NOTE = {"acknowledged": ACKNOWLEDGED, "refused": REFUSED, "rolled-back": ROLLED_BACK, "uncertain": UNCERTAIN}


class Sent(NamedTuple):
    """An event as its producer knows it. Times are NEVER if they are not known."""

    outcome: str
    sent_at: int
    open_since: int
    """When its transaction began."""
    ended_at: int
    """When the producer learned the outcome."""

    @property
    def acknowledged(self) -> bool:
        return self.outcome == ACKNOWLEDGED


class _Producer:
    """The events of one producer, by their numbers."""

    def __init__(self) -> None:
        self.outcomes = bytearray()
        self.sent: array[int] = array("q")
        self.open_since: array[int] = array("q")
        self.ended: array[int] = array("q")

    def send(self, number: int, at: int, first: int) -> None:
        while len(self.outcomes) <= number:
            self.outcomes.append(0)
            for times in (self.sent, self.open_since, self.ended):
                times.append(NEVER)
        self.sent[number] = at
        self.open_since[number] = self.sent[first]

    def end(self, number: int, at: int, outcome: str) -> None:
        self.outcomes[number] = _OUTCOMES.index(outcome)
        self.ended[number] = at

    def get(self, number: int) -> Sent | None:
        if number >= len(self.outcomes) or self.sent[number] == NEVER:
            return None
        outcome = _OUTCOMES[self.outcomes[number]]
        return Sent(outcome, self.sent[number], self.open_since[number], self.ended[number])


class Events:
    """Every event of the run. An hour's fit into memory: a few numbers each, in arrays."""

    def __init__(self, produced: Iterable[Note], log: Iterable[Stored]) -> None:
        """`produced`: the producers' notes, those of each in the order of time. `log`: by position."""
        self._producers: dict[str, _Producer] = {}
        for note in produced:
            self._read(note)
        # By position. The first position is 1.
        self._ids: list[str] = [""]
        self._lanes: array[int] = array("i", [0])
        numbers = {"-": 0}
        for position, id_, lane in log:
            while len(self._ids) <= position:
                self._ids.append("")
                self._lanes.append(0)
            self._ids[position] = id_
            self._lanes[position] = numbers.setdefault(lane, len(numbers))

    def _read(self, note: Note) -> None:
        producer = self._producers.setdefault(note.place, _Producer())
        match note.kind:
            case "sent":
                for number in map(int, note.fields):
                    producer.send(number, note.at, number)
            case "inserted":
                number, first = map(int, note.fields)
                producer.send(number, note.at, first)
            case "acknowledged" | "refused" | "rolled-back" | "uncertain":
                for number in map(int, note.fields):
                    producer.end(number, note.at, _BY_NOTE[note.kind])
            case _:
                pass

    @property
    def head(self) -> int:
        """The highest position in the log."""
        return len(self._ids) - 1

    def sent(self) -> Iterator[tuple[str, Sent]]:
        """Every event that was sent, with its id."""
        for place, producer in self._producers.items():
            for number in range(len(producer.outcomes)):
                if (sent := producer.get(number)) is not None:
                    yield f"{place}-{number}", sent

    def find(self, id_: str) -> Sent | None:
        """The event as its producer knows it; None if nobody sent it."""
        place, _, number = id_.rpartition("-")
        producer = self._producers.get(place)
        return producer.get(int(number)) if producer is not None and number.isdecimal() else None

    def stored(self) -> Iterator[tuple[int, str]]:
        """Every event in the log: its position and id."""
        return ((position, id_) for position, id_ in enumerate(self._ids) if id_)

    def id_at(self, position: int) -> str:
        """The id of the event at a position; "" if there is none."""
        return self._ids[position] if 0 < position < len(self._ids) else ""

    def lane_at(self, position: int) -> int:
        """The number of the lane that orders the event under `order="key"`; 0 if none does."""
        return self._lanes[position]

    def outcomes(self) -> Counter[str]:
        """How many events had each outcome. An unknown one counts as uncertain."""
        counts = Counter(sent.outcome for _, sent in self.sent())
        counts[UNCERTAIN] += counts.pop(UNKNOWN, 0)
        return +counts
