"""What the server says of its own accord: who changed which offset, what is in the log, and how everything stands.

A trigger on `offsets` writes down each change with the name of the connection that made it, in the same transaction, so
that one is never there without the other. That is how a commit by a former owner shows, whatever it believed itself.
"""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from pgbackend.errors import DatabaseError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only

_TRIGGER = """
CREATE TABLE {schema}.torture_changes (
    change bigint GENERATED ALWAYS AS IDENTITY,
    subscription text NOT NULL,
    shard int NOT NULL,
    epoch_before bigint NOT NULL,
    epoch bigint NOT NULL,
    owner uuid,
    position_before bigint NOT NULL,
    position bigint NOT NULL,
    pending text NOT NULL,
    made_by text NOT NULL
);
CREATE FUNCTION {schema}.torture_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {schema}.torture_changes
        (subscription, shard, epoch_before, epoch, owner, position_before, position, pending, made_by)
    SELECT new.subscription, new.shard, old.epoch, new.epoch, new.owner, old.position, new.position,
        -- Of a claim with what is to be tried again: an attempt that had not begun after all may be taken back there.
        (new.pending + coalesce(
            (
                SELECT range_agg(int8range(waiting.position, waiting.position + 1))
                FROM {schema}.redeliveries AS waiting
                WHERE waiting.subscription = new.subscription
                    AND waiting.key_hash % new.shards = new.shard
                    AND new.epoch <> old.epoch
            ),
            '{{}}'
        ))::text,
        current_setting('application_name');
    RETURN NULL;
END $$;
CREATE TRIGGER torture_note AFTER UPDATE ON {schema}.offsets
FOR EACH ROW EXECUTE FUNCTION {schema}.torture_note();
"""
_CHANGES = """
SELECT subscription, shard, epoch_before, epoch, coalesce(owner::text, '-'), position_before, position, made_by, pending
FROM {schema}.torture_changes
ORDER BY change
"""
_LOG = """
SELECT position, id, coalesce('p' || partitionkey, 's' || source || ' ' || subject, '-')
FROM {schema}.events
ORDER BY position
"""
_UNSETTLED = """
SELECT subscription || '/' || shard || ' at ' || position || ' of ' || head || ', pending ' || pending
FROM {schema}.offsets, (SELECT coalesce(max(position), 0) AS head FROM {schema}.events) AS log
WHERE position < head OR NOT isempty(pending)
UNION ALL
SELECT subscription || ': ' || count(*) || ' events wait to be tried again'
FROM {schema}.redeliveries
GROUP BY subscription
"""
_OFFSETS = """
SELECT subscription, shard, position, pending::text, epoch, owner::text
FROM {schema}.offsets
ORDER BY subscription, shard
"""
_LETTERS = "SELECT subscription, id, attempts FROM {schema}.dead_letters ORDER BY subscription, position"
_CONNECTIONS = """
SELECT pid FROM pg_catalog.pg_stat_activity
WHERE application_name = $1 AND datname = current_database() AND backend_type = 'client backend'
ORDER BY backend_start, pid
"""


class Change(NamedTuple):
    """An update of an offset row, in the order in which they happened to that row."""

    subscription: str
    shard: int
    epoch_before: int
    epoch: int
    owner: str
    """"-" when it has none."""
    position_before: int
    position: int
    made_by: str
    """The name of the process whose connection it was."""
    pending: str
    """Of a claim with the positions that wait to be tried again."""

    def __str__(self) -> str:
        return (
            f"{self.subscription}/{self.shard} epoch {self.epoch_before} → {self.epoch}, position "
            f"{self.position_before} → {self.position}, by {self.made_by}"
        )


class Stored(NamedTuple):
    """An event in the log."""

    position: int
    id: str
    lane: str
    """What orders it under `order="key"`; "-" when nothing does."""


class Letter(NamedTuple):
    """A dead letter."""

    subscription: str
    id: str
    attempts: int


class Offset(NamedTuple):
    """An offset row as it stood at the end."""

    subscription: str
    shard: int
    position: int
    pending: str
    epoch: int
    owner: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How everything stood when all had left."""

    offsets: Sequence[Offset] = ()
    letters: Sequence[Letter] = ()
    unsettled: Sequence[str] = ()
    """What was left when the time to drain was up."""
    ended: Sequence[str] = ()
    """Processes that ended otherwise than they were told to."""


class Evidence:
    """The scratch schema, seen from outside."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._dsn = dsn
        self._schema = quote_ident(schema)

    async def install(self) -> None:
        """From now on each change of an offset is noted."""
        async with self._connected() as connection:
            await connection.execute(_TRIGGER.format(schema=self._schema))

    async def drop(self) -> None:
        """The schema is gone, and everything in it."""
        try:
            async with self._connected() as connection:
                await connection.execute(f"DROP SCHEMA IF EXISTS {self._schema} CASCADE")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise DatabaseError(f"The scratch schema {self._schema} is still there: {error}. Drop it.") from error

    async def terminate(self, name: str, share: float) -> int | None:
        """End one of a process's connections: the one at that share of them, the oldest first. Its pid, if any."""
        async with self._connected() as connection:
            pids = [row[0] for row in await connection.fetch(_CONNECTIONS, name)]
            if not pids:
                return None
            pid: int = pids[int(share * len(pids))]
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
            return pid

    async def unsettled(self) -> list[str]:
        """What is left to do; nothing when everything is settled."""
        async with self._connected() as connection:
            return [row[0] for row in await connection.fetch(_UNSETTLED.format(schema=self._schema))]

    async def collect(self, directory: Path, *, unsettled: Sequence[str], ended: Sequence[str]) -> None:
        """Everything that the verdict needs of the server is in the directory."""
        async with self._connected() as connection:
            await _dump(connection, _LOG.format(schema=self._schema), directory / "log")
            await _dump(connection, _CHANGES.format(schema=self._schema), directory / "changes")
            offsets = await connection.fetch(_OFFSETS.format(schema=self._schema))
            letters = await connection.fetch(_LETTERS.format(schema=self._schema))
        end = End(
            offsets=[Offset(*row) for row in offsets],
            letters=[Letter(*row) for row in letters],
            unsettled=unsettled,
            ended=ended,
        )
        (directory / "end.json").write_text(json.dumps(asdict(end)))

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = await Database(self._dsn).connect(timeout=10)
        try:
            await connection.execute("SET statement_timeout = '60s'", timeout=60)
            yield connection
        finally:
            await connection.close(timeout=10)


def read_log(directory: Path) -> Iterator[Stored]:
    """The log as it was collected, in the order of positions."""
    with (directory / "log").open() as file:
        for line in file:
            position, id_, lane = line.rstrip("\n").split("\t")
            yield Stored(int(position), id_, lane)


def read_changes(directory: Path) -> Iterator[Change]:
    """The changes of offsets as they were collected, in their order."""
    with (directory / "changes").open() as file:
        for line in file:
            subscription, shard, before, epoch, owner, position_before, position, made_by, pending = line.rstrip(
                "\n"
            ).split("\t")
            yield Change(
                subscription, int(shard), int(before), int(epoch), owner, int(position_before), int(position), made_by,
                pending,
            )  # fmt: skip


def read_end(directory: Path) -> End:
    """The end as it was collected."""
    end = json.loads((directory / "end.json").read_text())
    return End(
        offsets=[Offset(*row) for row in end.pop("offsets")],
        letters=[Letter(*row) for row in end.pop("letters")],
        **end,
    )


async def _dump(connection: Connection, statement: str, path: Path) -> None:
    with path.open("w") as file:
        async with connection.transaction():
            async for row in connection.cursor(statement, prefetch=5000):
                file.write("\t".join(map(str, row)) + "\n")
