"""The history of a failed event: what became of its attempts, kept in its row of `redeliveries` or `dead_letters`.

Settlement makes steps, an outcome carries them, and the statement that commits the outcome appends them to what is
stored. So no worker keeps a history in memory. The promise: a step is stored once, with the outcome that it belongs to,
also when a commit is repeated whose answer was lost.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from pgbackend.model import HistoryEntry, HistoryKind

KEPT = 20
"""The most entries that a row keeps, the last ones. The log's function `join_history` cuts them."""
_ERROR_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An entry that is not stored yet."""

    what: HistoryKind
    attempt: int | None = None
    error: str | None = None
    at: float = field(default_factory=monotonic, compare=False)
    """In monotonic seconds."""
    id: str = field(default_factory=lambda: secrets.token_hex(4), compare=False)
    """By it the log knows a step that it has already."""


def joined(earlier: Sequence[Step], later: Sequence[Step]) -> tuple[Step, ...]:
    """Both, one after the other, as far as a row would keep them."""
    return (*earlier, *later)[-KEPT:]


def to_entry(step: Step, *, clock: float) -> dict[str, Any]:
    """The step as it is stored. `clock`: the server's time when the monotonic clock was 0, in seconds since 1970."""
    at = datetime.fromtimestamp(clock + step.at, UTC)
    entry: dict[str, Any] = {"at": at.isoformat(), "what": step.what, "id": step.id}
    if step.attempt is not None:
        entry["attempt"] = step.attempt
    if step.error is not None:
        entry["error"] = step.error[:_ERROR_CHARACTERS]
    return entry


def parse_history(text: str) -> tuple[HistoryEntry, ...]:
    """A stored history, oldest entry first."""
    return tuple(
        HistoryEntry(
            at=datetime.fromisoformat(entry["at"]).astimezone(UTC),
            what=entry["what"],
            attempt=entry.get("attempt"),
            error=entry.get("error"),
        )
        for entry in json.loads(text)
    )
