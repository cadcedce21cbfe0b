"""Turns: which event the running code handles, so that a call from its handler does not wait for that event to end.

A deliverer has one turn, in the context of its task, and names in it the event that it dispatches. Tasks that a handler
spawns inherit the context and the turn; a thread gets a turn of its own for each event. So a task that outlives its
event counts as part of its deliverer's next event. A context variable set for each event would be exact, but would cost
a tenth of the time of a dispatch.
"""

import contextvars

from pgbackend.codec.event import Event


class Turn:
    """Names the event that is dispatched."""

    __slots__ = ("event",)

    def __init__(self, event: Event | None = None) -> None:
        self.event = event


_TURN: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("pgbackend_turn", default=None)


def begin(context: contextvars.Context, event: Event | None = None) -> contextvars.Context:
    """Put a new turn into the context, and return it."""
    context.run(_TURN.set, Turn(event))
    return context


def outside() -> contextvars.Context:
    """A copy of the current context in which no event is handled."""
    context = contextvars.copy_context()
    context.run(_TURN.set, None)
    return context


def mine() -> Turn:
    """The calling deliverer's turn."""
    turn = _TURN.get()
    assert turn is not None  # noqa: S101 - deliverers begin one
    return turn


def current() -> Event | None:
    """The event whose handler the caller belongs to, or the last one there; None outside of handlers."""
    turn = _TURN.get()
    return turn.event if turn is not None else None
