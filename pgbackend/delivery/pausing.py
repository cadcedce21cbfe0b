"""Whether a subscription is paused in this process, from what is stored and what is still to be stored. Pure.

    running ──a dispatcher here raises Pause──▶ paused, to be stored ──stored──▶ paused
       │                                              │                            │ resumed, or reconfigured here
       └──────────the row says paused───────────▶ paused                           ▼
                                                      └──────────────────────▶ running

A process obeys the row, with two exceptions. Its own dispatcher's pause holds before it is stored, so it holds while
PostgreSQL is away. And if another process ends that pause by a new target, it stays in force here until this process
gets a new dispatcher, too, or somebody resumes: otherwise the old dispatcher would pause them all again.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pgbackend.subscriptions.pauses import PauseState


@dataclass(frozen=True, slots=True)
class Hold:
    """Why this process dispatches nothing."""

    by: Literal["operator", "dispatcher"]
    reason: str
    raised_here: bool = False
    """Whether its own dispatcher has raised Pause."""


@dataclass(frozen=True, slots=True)
class NewPause:
    """A dispatcher's pause that is to be stored."""

    reason: str
    resumed_at: datetime | None
    """The last resume that was known when the dispatcher raised it."""


@dataclass(frozen=True, slots=True)
class NewTarget:
    """A new dispatcher's target, or None if it names none. It is to be stored, and ends the old one's pause."""

    target: str | None


class Pausing:
    """The pause of one subscription, as one process knows it."""

    __slots__ = ("_resumed_at", "hold", "new_pause", "new_target")

    def __init__(self) -> None:
        self.hold: Hold | None = None
        """None while events may be dispatched."""
        self.new_target: NewTarget | None = None
        """To be stored before `new_pause`, which is younger."""
        self.new_pause: NewPause | None = None
        self._resumed_at: datetime | None = None

    def pause(self, reason: str) -> bool:
        """A dispatcher here wants nothing more. Returns whether that is news."""
        if self.hold is not None:
            return False
        self.hold = Hold("dispatcher", reason, raised_here=True)
        self.new_pause = NewPause(reason, self._resumed_at)
        return True

    def reconfigure(self, target: str | None) -> None:
        """This process has a dispatcher of another target, or of none that it names."""
        self.new_target, self.new_pause = NewTarget(target), None
        if self.hold is not None and self.hold.by == "dispatcher":
            self.hold = None

    def stored_target(self, stored: NewTarget) -> None:
        """The reconfiguration is stored, unless there is another one by now."""
        if self.new_target is stored:
            self.new_target = None

    def heed(self, state: PauseState | None) -> None:
        """Follow the row. None: there is none any more."""
        if state is None:
            self.hold = self.new_pause = None
            return
        was_resumed = state.resumed_at != self._resumed_at
        self._resumed_at = state.resumed_at
        raised_here = self.hold is not None and self.hold.raised_here and not was_resumed
        paused = state.paused
        if paused is not None and paused.by == "dispatcher" and self.new_target is not None:
            # This process is about to end it.
            paused = None
        if paused is not None:
            self.hold = Hold(paused.by, paused.reason, raised_here=raised_here and paused.by == "dispatcher")
            self.new_pause = None
        elif not raised_here:
            self.hold = self.new_pause = None
