"""The log and the backlog of all its subscriptions, for people, and whether their offsets and the log fit together.

The promise: the figures are those of the views `log_status`, `lag` and `shard_lag`, so that `status()` and SQL show the
same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pgbackend.model import Epoch, Position, ShardStatus, SubscriptionStatus
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import OverviewSql
from pgbackend.subscriptions.pauses import paused_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The log as a whole."""

    head: Position
    rate: float
    """Events a second over the last minute."""
    segments: int
    bytes_on_disk: int


@dataclass(frozen=True, slots=True)
class Mistrust:
    """Why the stored offsets cannot be trusted."""

    text: str
    """The fault, and how to mend it in each case."""
    cure: str
    """The statements that mend the first of these cases, one a line."""
    moves_offsets: bool = False
    """Whether they move subscriptions."""


class Overview:
    """Reads all subscriptions of a log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._schema = schema
        self._sql = load(OverviewSql, "overview", schema=schema)

    async def find_figures(self) -> Figures:
        """How far the log has come, and what it takes on disk."""
        row = await self._database.fetchrow(self._sql.find_figures)
        assert row is not None  # noqa: S101 - the view has one row
        return Figures(
            head=Position(row["head"]),
            rate=row["events_per_second"],
            segments=row["segments"],
            bytes_on_disk=row["bytes_on_disk"],
        )

    async def list_statuses(self, states: Mapping[str, str]) -> tuple[SubscriptionStatus, ...]:
        """All subscriptions, by name. `states`: what this process reports of those that it runs."""
        rows = await self._database.fetch(self._sql.list_status)
        return tuple(
            _status(list(shards), state=states.get(name))
            for name, shards in groupby(rows, key=lambda row: str(row["subscription"]))
        )

    async def find_mistrust(self) -> str | None:
        """Why the stored offsets cannot be trusted, and how to mend that; None when they can."""
        row = await self._database.fetchrow(self._sql.find_extremes)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        mistrust = explain_mistrust(row, schema=self._schema)
        return mistrust.text if mistrust else None


def explain_mistrust(row: Record, *, schema: str) -> Mistrust | None:
    """Why the stored offsets cannot be trusted, by the row of `find_extremes`; None when they can."""
    offset, event, head = row["offset_position"], row["event_position"], row["head"]
    where = quote_ident(schema)
    move = f"UPDATE {where}.offsets SET position = 0, pending = '{{}}'"  # noqa: S608 - for people
    trust = f"DELETE FROM {where}.incarnation"  # noqa: S608 - as above
    if head < max(offset, event):
        restore = f"SELECT setval({quote_literal(f'{where}.events_position_seq')}, {max(offset, event)})"
        return Mistrust(
            f"The log's sequence stands at {head}, behind its events ({event}) or offsets ({offset}): positions "
            "would be given out twice, and subscriptions would skip events. Stop all producers and workers. Where "
            f"only the sequence is wrong, run {restore}. Where the log was emptied or is an older one, run {move} "
            f"WHERE position > {head}: those subscriptions then handle everything in the log."
            + (f" Then state that offsets are right: {trust}." if row["set_back"] else ""),
            cure="\n".join([f"{restore};", *([f"{trust};"] if row["set_back"] else [])]),
        )
    if row["set_back"]:
        return Mistrust(
            "The log was set back while workers ran, below positions that they had read: subscriptions would skip "
            "events. Stop all workers. Move the subscriptions to where they are to go on "
            f"({move} makes them handle everything in the log). Then state that offsets are right: {trust}.",
            cure=f"{move};\n{trust};",
            moves_offsets=True,
        )
    return None


def _status(rows: Sequence[Record], *, state: str | None) -> SubscriptionStatus:
    first = rows[0]
    paused = paused_of(first)
    at_rest = "elsewhere" if any(row["owner_name"] for row in rows) else "stopped"
    return SubscriptionStatus(
        name=first["subscription"],
        order=first["ordering"],
        shards=tuple(_shard(row) for row in rows),
        lag=first["lag_events"],
        lag_seconds=first["lag_seconds"],
        in_flight=first["in_flight"],
        redeliveries=first["redeliveries"],
        dead_letters=first["dead_letters"],
        skipped=first["skipped"],
        last_error=first["last_error"],
        complete=first["state"] == "complete",
        paused=paused,
        # The view does not know which process asks.
        state=state or (at_rest if paused is None else f"paused: {paused.reason}"),
    )


def _shard(row: Record) -> ShardStatus:
    return ShardStatus(
        shard=row["shard"],
        shards=row["shards"],
        position=Position(row["position"]),
        pending=row["pending"],
        epoch=Epoch(row["epoch"]),
        owner=str(row["owner"]) if row["owner"] else None,
        owner_name=row["owner_name"],
        until=None if row["until"] is None else Position(row["until"]),
    )
