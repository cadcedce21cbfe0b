"""Rule: everything comes to rest. When all processes have left, everything is settled and nobody owns a shard."""

from pgbackend.torture.audit import FinalState
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.leases import Leases
from pgbackend.torture.verdict.rulings import Ruling
from pgbackend.torture.verdict.timeline import Timeline


def check_rest(state: FinalState, events: Events, leases: Leases, timeline: Timeline, ruling: Ruling) -> None:
    """Check the final state, and that nothing ended that the plan did not end."""
    ruling.checked += len(state.offsets)
    for text in (*state.unsettled, *state.failures):
        ruling.violated(text)
    for offset in state.offsets:
        if offset.position < events.head or offset.pending != "{}" or offset.owner is not None:
            ruling.violated(f"{offset} after all processes left, and the log ends at {events.head}")
    restarts = len(leases.lives) - 1
    if restarts > timeline.restarts():
        ruling.violated(f"PostgreSQL was restarted {restarts} times, {timeline.restarts()} of them by the plan")
