"""The inputs of the statement `commit_by_key`: what a mark holds, as one JSON document for each kind of row. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from pgbackend.delivery.history import to_entry
from pgbackend.delivery.outcomes import Buried, Finished, LetterDelivered, LetterFailed, Outcome, Scheduled, Skipped
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.model import Failure


def commit_inputs(marks: Mapping[Shard, Mark], *, clock: float) -> tuple[str, str, str, str, str, str, str]:
    """The marks, then the outcomes: scheduled, finished, buried, letters delivered, letters failed, skipped.

    Each is a JSON array of rows with the names that the statement gives to its columns. `clock`: as in
    `to_entry()`.
    """
    kinds: dict[type[Outcome], list[dict[str, Any]]] = {
        kind: [] for kind in (Scheduled, Finished, Buried, LetterDelivered, LetterFailed, Skipped)
    }
    for shard, mark in marks.items():
        for outcome in mark.outcomes.values():
            kinds[type(outcome)].append({"epoch": shard.lease.epoch, **_columns(outcome, clock)})
    rows = [[_offset(shard, mark) for shard, mark in marks.items()], *kinds.values()]
    offsets, scheduled, finished, buried, delivered, failed, skipped = (json.dumps(kind, default=str) for kind in rows)
    return offsets, scheduled, finished, buried, delivered, failed, skipped


def _offset(shard: Shard, mark: Mark) -> dict[str, Any]:
    lease = shard.lease
    return {
        "subscription": lease.subscription,
        "shards": lease.shards,
        "shard": lease.shard,
        "epoch": lease.epoch,
        "ordered": lease.order != "none",
        "position": mark.position,
        "pending": mark.pending,
        "holes": mark.holes,
        "complete": mark.complete,
        "clears_crashes": mark.forget_crashes,
    }


def _columns(outcome: Outcome, clock: float) -> dict[str, Any]:
    columns = _fields(outcome)
    match outcome:
        case Scheduled(failure=Failure() as failure):
            columns["failure"] = _fields(failure)
        case Buried(position=position, failure=failure):
            columns = {"position": position, **_fields(failure)}
    if isinstance(outcome, Scheduled | Buried | LetterFailed):
        columns["history"] = [to_entry(step, clock=clock) for step in outcome.steps]
    return columns


def _fields(row: "Outcome | Failure") -> dict[str, Any]:
    """The fields of a dataclass by name. `asdict()` copies them too, which takes 15 times as long."""
    return {name: getattr(row, name) for name in type(row).__slots__}
