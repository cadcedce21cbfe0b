"""A delivery: one event on its way to one dispatch."""

from dataclasses import dataclass
from enum import Enum

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
    suspect: bool = False
    """Whether nobody reported how the last attempt ended: it may have killed its process."""
    recorded: bool = False
    """Whether the row says that this attempt has started. See care.py."""

    @property
    def slot(self) -> int:
        """Unique among what is at work. After a seek, an event may be at work both as itself and as a dead letter."""
        return self.event.position if self.letter is None else -self.letter

    @property
    def given_up(self) -> bool:
        """Whether it is for the dead-letter dispatcher."""
        return self.event.failure is not None
