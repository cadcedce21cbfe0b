"""A delivery: one event on its way to one dispatch."""

from dataclasses import dataclass
from enum import Enum
from uuid import UUID

from pgbackend.codec.event import Event


class Origin(Enum):
    """Where a delivery comes from, and so what settling it changes."""

    LOG = "log"
    """The event is in the shard's window. Settling it moves the offset."""
    REDELIVERY = "redelivery"
    """The event left the window when it failed. A row of `redeliveries` says when it is due."""
    LETTER = "dead letter"
    """An operator sent a dead letter again."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt of one event."""

    event: Event
    origin: Origin = Origin.LOG
    letter: int | None = None
    """The dead letter's id, if it is one."""
    started_by: UUID | None = None
    """The worker that started the last attempt and never reported its end: it may have killed its process."""
    recorded: bool = False
    """Whether the row says that this attempt has started. See care.py."""

    @property
    def slot(self) -> int:
        """Unique among what is at work. After a seek, an event may be at work both as itself and as a dead letter."""
        return self.event.position if self.letter is None else -self.letter

    @property
    def suspect(self) -> bool:
        """Whether the last attempt may have killed its process. It counts as an attempt."""
        return self.started_by is not None

    @property
    def given_up(self) -> bool:
        """Whether it is for the dead-letter dispatcher."""
        return self.event.failure is not None


def next_attempt(made: int, started_by: UUID | None) -> int:
    """The number of the next attempt. An attempt that started, and whose end was never reported, counts."""
    return made + 1 if started_by is None else made + 2
