"""Which event the running code handles, so that what it asks of its own backend need not wait for that event to end.

A deliverer has one turn for all its events, in the context of its task, and names in it the event that it dispatches.
Tasks that a handler spawns inherit the context, and with it the turn; threads get one of their own for each event. So a
task that outlives its event counts as part of the next one that its deliverer handles. A context variable set for each
event would be exact, but cost a tenth of the time in which an event is dispatched.
"""

import contextvars

from pgbackend.codec.event import Event


class Turn:
    """Names the event that is being dispatched."""

    __slots__ = ("event",)

    def __init__(self, event: Event | None = None) -> None:
        self.event = event


_TURN: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("pgbackend_turn", default=None)


def begin(context: contextvars.Context, event: Event | None = None) -> contextvars.Context:
    """The context with a new turn in it."""
    context.run(_TURN.set, Turn(event))
    return context


def outside() -> contextvars.Context:
    """A copy of the current context that handles no event."""
    context = contextvars.copy_context()
    context.run(_TURN.set, None)
    return context


def mine() -> Turn:
    """The turn of the deliverer that calls."""
    turn = _TURN.get()
    assert turn is not None  # noqa: S101 - deliverers begin one
    return turn


def current() -> Event | None:
    """The event that is at work where the calling code comes from; the last one there if none is."""
    turn = _TURN.get()
    return turn.event if turn is not None else None
