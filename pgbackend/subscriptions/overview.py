"""The backlog of all subscriptions of a log, for people, and whether their offsets and the log fit together."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from pgbackend.log.ranges import RangeSet
from pgbackend.model import Epoch, Position, ShardStatus, SubscriptionStatus
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import OverviewSql


class Overview:
    """Reads all subscriptions of a log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._schema = schema
        self._sql = load(OverviewSql, "overview", schema=schema)

    async def find_head(self) -> Position:
        """The highest position given out."""
        return Position((await self._find_extremes())["head"])

    async def list_statuses(self, *, head: Position, states: Mapping[str, str]) -> tuple[SubscriptionStatus, ...]:
        """All subscriptions, by name. `states`: what this process reports of those that it runs."""
        rows = await self._database.fetch(self._sql.list_status)
        return tuple(
            _status(list(shards), head=head, state=states.get(name))
            for name, shards in groupby(rows, key=lambda row: str(row["name"]))
        )

    async def find_mistrust(self) -> str | None:
        """Why the stored offsets cannot be trusted, and how to mend that; None when they can."""
        row = await self._find_extremes()
        offset, event, head = row["offset_position"], row["event_position"], row["head"]
        where = quote_ident(self._schema)
        move = f"UPDATE {where}.offsets SET position = 0, pending = '{{}}'"  # noqa: S608 - for people
        trust = f"DELETE FROM {where}.incarnation"  # noqa: S608 - as above
        if head < max(offset, event):
            restore = f"SELECT setval({quote_literal(f'{where}.events_position_seq')}, {max(offset, event)})"
            return (
                f"The log's sequence stands at {head}, behind its events ({event}) or offsets ({offset}): positions "
                "would be given out twice, and subscriptions would skip events. Stop all producers and workers. Where "
                f"only the sequence is wrong, run {restore}. Where the log was emptied or is an older one, run {move} "
                f"WHERE position > {head}: those subscriptions then handle everything in the log."
                + (f" Then state that offsets are right: {trust}." if row["set_back"] else "")
            )
        if row["set_back"]:
            return (
                "The log was set back while workers ran, below positions that they had read: subscriptions would skip "
                "events. Stop all workers. Move the subscriptions to where they are to go on "
                f"({move} makes them handle everything in the log). Then state that offsets are right: {trust}."
            )
        return None

    async def _find_extremes(self) -> Record:
        row = await self._database.fetchrow(self._sql.find_extremes)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        return row


def _status(rows: Sequence[Record], *, head: Position, state: str | None) -> SubscriptionStatus:
    shards = tuple(
        ShardStatus(
            shard=row["shard"],
            shards=row["shards"],
            position=Position(row["position"]),
            pending=RangeSet.parse(row["pending"]).count(),
            epoch=Epoch(row["epoch"]),
            owner=str(row["owner"]) if row["owner"] else None,
            owner_name=row["owner_name"],
            until=None if row["until"] is None else Position(row["until"]),
        )
        for row in rows
    )
    runs_elsewhere = any(shard.owner_name for shard in shards)
    complete = all(row["completed_at"] for row in rows)
    first = rows[0]
    return SubscriptionStatus(
        name=first["name"],
        order=first["ordering"],
        shards=shards,
        lag=0 if complete else max(max(0, head - shard.position) + shard.pending for shard in shards),
        lag_seconds=None if complete else max(0.0, *(row["lag_seconds"] or 0.0 for row in rows)),
        redeliveries=first["redeliveries"],
        dead_letters=first["dead_letters"],
        skipped=first["skipped"],
        last_error=first["last_error"],
        complete=complete,
        state=state or ("elsewhere" if runs_elsewhere else "stopped"),
    )
