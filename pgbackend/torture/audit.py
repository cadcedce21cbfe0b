"""The server's own record of a run: who changed which offset, which attempts started, and how everything stands.

Triggers note each change of `offsets`, and each change of `redeliveries` that concerns an attempt that has started, in
the transaction that makes the change. So a commit by a former owner shows, whatever that process believed. A change has
the name of the connection that made it, the server's time, and the start of the server's present life.

The server's clock is the wall clock of its machine. Each process of the run notes monotonic time. The offset between
the two is measured at the start and at the end.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import asyncpg

from pgbackend.errors import DatabaseError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only

_INSTALL = """
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
    made_by text NOT NULL DEFAULT current_setting('application_name'),
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    life timestamptz NOT NULL DEFAULT pg_postmaster_start_time()
);
CREATE FUNCTION {schema}.torture_note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {schema}.torture_changes
        (subscription, shard, epoch_before, epoch, owner, position_before, position, pending)
    SELECT new.subscription, new.shard, old.epoch, new.epoch, new.owner, old.position, new.position,
        -- A claim also lists the events that wait for redelivery: they are not settled either.
        (new.pending + coalesce(
            (
                SELECT range_agg(int8range(waiting.position, waiting.position + 1))
                FROM {schema}.redeliveries AS waiting
                WHERE waiting.subscription = new.subscription
                    AND waiting.key_hash % new.shards = new.shard
                    AND new.epoch <> old.epoch
            ),
            '{{}}'
        ))::text;
    RETURN NULL;
END $$;
CREATE TRIGGER torture_note_change AFTER UPDATE ON {schema}.offsets
FOR EACH ROW EXECUTE FUNCTION {schema}.torture_note_change();

CREATE TABLE {schema}.torture_starts (
    change bigint GENERATED ALWAYS AS IDENTITY,
    subscription text NOT NULL,
    position bigint NOT NULL,
    attempt_before int,
    started_before uuid,
    attempt int,
    started uuid,
    made_by text NOT NULL DEFAULT current_setting('application_name'),
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    life timestamptz NOT NULL DEFAULT pg_postmaster_start_time()
);
CREATE FUNCTION {schema}.torture_note_start() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF old.started_by IS NOT NULL OR new.started_by IS NOT NULL THEN
        INSERT INTO {schema}.torture_starts
            (subscription, position, attempt_before, started_before, attempt, started)
        VALUES (
            coalesce(new.subscription, old.subscription), coalesce(new.position, old.position),
            old.attempt, old.started_by, new.attempt, new.started_by
        );
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER torture_note_start AFTER INSERT OR UPDATE OR DELETE ON {schema}.redeliveries
FOR EACH ROW EXECUTE FUNCTION {schema}.torture_note_start();
"""
_MICROSECONDS = "(extract(epoch FROM {column}) * 1000000)::bigint AS {column}"
_AT, _LIFE = _MICROSECONDS.format(column="at"), _MICROSECONDS.format(column="life")
_CHANGES = f"""
SELECT
    subscription, shard, epoch_before, epoch, owner::text, position_before, position, pending, made_by, {_AT}, {_LIFE}
FROM {{schema}}.torture_changes
ORDER BY change
"""  # noqa: S608 - constants
_STARTS = f"""
SELECT subscription, position, attempt_before, started_before::text, attempt, started::text, made_by, {_AT}, {_LIFE}
FROM {{schema}}.torture_starts
ORDER BY change
"""  # noqa: S608 - constants
_LOG = """
SELECT position, id, coalesce('p' || partitionkey, 's' || source || ' ' || subject, '-') AS lane
FROM {schema}.events
ORDER BY position
"""
_UNSETTLED = """
SELECT subscription || '/' || shard || ' at ' || position || ' of ' || head || ', pending ' || pending AS what
FROM {schema}.offsets, (SELECT coalesce(max(position), 0) AS head FROM {schema}.events) AS log
WHERE position < head OR NOT isempty(pending)
UNION ALL
SELECT subscription || ': ' || count(*) || ' events wait for redelivery'
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
SELECT pid
FROM pg_catalog.pg_stat_activity
WHERE application_name = $1
    AND datname = current_database()
    AND backend_type = 'client backend'
ORDER BY backend_start, pid
"""
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_LOOKS = 5
"""Reads of the server's clock; the quickest counts."""
_NOT_SET = 0.05
"""Seconds by which two readings of the server's clock may differ though nobody set it."""


_Row = TypeVar("_Row", bound=tuple[object, ...])


class Change(NamedTuple):
    """An update of an offset row. Those of a row are in the order in which they happened."""

    subscription: str
    shard: int
    epoch_before: int
    epoch: int
    owner: str | None
    position_before: int
    position: int
    pending: str
    """For a claim: together with the positions that wait for redelivery."""
    made_by: str
    """The process whose connection made it."""
    at: int
    """Monotonic nanoseconds."""
    life: int
    """When the server's life began in which it was made."""

    def __str__(self) -> str:
        return (
            f"{self.subscription}/{self.shard} epoch {self.epoch_before} → {self.epoch}, position "
            f"{self.position_before} → {self.position}, by {self.made_by}"
        )


class Start(NamedTuple):
    """A change of a `redeliveries` row before or after which an attempt has started whose end is not recorded.

    The attempts do not count that attempt. Without the row, before or after, they are None.
    """

    subscription: str
    position: int
    attempt_before: int | None
    started_before: str | None
    """The worker that had started the attempt."""
    attempt: int | None
    started: str | None
    made_by: str
    """The process whose connection made it."""
    at: int
    """Monotonic nanoseconds."""
    life: int
    """When the server's life began in which it was made."""


class Stored(NamedTuple):
    """An event in the log."""

    position: int
    id: str
    lane: str
    """Its key under `order="key"`; "-" without one."""


class Letter(NamedTuple):
    """A dead letter."""

    subscription: str
    id: str
    attempts: int


class Offset(NamedTuple):
    """An offset row at the end."""

    subscription: str
    shard: int
    position: int
    pending: str
    epoch: int
    owner: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalState:
    """How everything stood when all processes had ended."""

    offsets: Sequence[Offset] = ()
    letters: Sequence[Letter] = ()
    unsettled: Sequence[str] = ()
    """The unsettled work when the time to drain was up."""
    failures: Sequence[str] = ()
    """Processes that ended without being told to, or otherwise than told."""
    clock_offset: int = 0
    """Nanoseconds from the server's clock to the monotonic one."""
    clock_moved: float = 0.0
    """Seconds by which the server's clock was set during the run."""


class Audit:
    """The triggers in the scratch schema, and what they noted."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._dsn = dsn
        self._schema = quote_ident(schema)
        self._clock_offset = 0

    async def install(self, tables: str = "") -> None:
        """From now on each change is noted. `tables`: creates those of the application."""
        async with self._connected() as connection:
            await connection.execute((_INSTALL + tables).format(schema=self._schema))
            self._clock_offset = await _measure_clock(connection)

    async def drop(self) -> None:
        """The schema is gone, and everything in it."""
        try:
            async with self._connected() as connection:
                await connection.execute(f"DROP SCHEMA IF EXISTS {self._schema} CASCADE")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise DatabaseError(f"The scratch schema {self._schema} is still there: {error}. Drop it.") from error

    async def terminate(self, process: str, share: float) -> int | None:
        """End one of a process's connections: the one at that share of them, oldest first. Its pid, if any."""
        async with self._connected() as connection:
            pids: list[int] = [row["pid"] for row in await connection.fetch(_CONNECTIONS, process)]
            if not pids:
                return None
            pid = pids[int(share * len(pids))]
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
            return pid

    async def unsettled(self) -> list[str]:
        """The unsettled work; empty when everything is settled."""
        async with self._connected() as connection:
            return [row["what"] for row in await connection.fetch(_UNSETTLED.format(schema=self._schema))]

    async def collect(
        self, directory: Path, *, unsettled: Sequence[str], failures: Sequence[str], records: Mapping[str, str]
    ) -> None:
        """Everything that the verdict needs of the server is in the directory.

        `records`: by the name of a file, the query of what it needs of the application's tables.
        """
        async with self._connected() as connection:
            moved = (await _measure_clock(connection) - self._clock_offset) / 1e9
            await _dump(connection, _LOG.format(schema=self._schema), directory / "log")
            await _dump(connection, _CHANGES.format(schema=self._schema), directory / "changes")
            await _dump(connection, _STARTS.format(schema=self._schema), directory / "starts")
            for name, query in records.items():
                await _dump(connection, query.format(schema=self._schema), directory / name)
            offsets = await connection.fetch(_OFFSETS.format(schema=self._schema))
            letters = await connection.fetch(_LETTERS.format(schema=self._schema))
        state = FinalState(
            offsets=[Offset(**dict(row)) for row in offsets],
            letters=[Letter(**dict(row)) for row in letters],
            unsettled=unsettled,
            failures=failures,
            clock_offset=self._clock_offset,
            clock_moved=moved if abs(moved) > _NOT_SET else 0.0,
        )
        (directory / "end.json").write_text(json.dumps(asdict(state)))

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = await Database(self._dsn).connect(timeout=10)
        try:
            await connection.execute("SET statement_timeout = '60s'", timeout=60)
            yield connection
        finally:
            await connection.close(timeout=10)


def read_log(directory: Path) -> Iterator[Stored]:
    """The log as it was collected, by position."""
    return read_rows(directory / "log", Stored)


def read_changes(directory: Path) -> Iterator[Change]:
    """The changes of offsets, in their order."""
    offset = read_state(directory).clock_offset
    for change in read_rows(directory / "changes", Change):
        yield change._replace(at=change.at * 1000 + offset, life=change.life * 1000 + offset)


def read_starts(directory: Path) -> Iterator[Start]:
    """The changes that concern attempts that have started, in their order."""
    offset = read_state(directory).clock_offset
    for start in read_rows(directory / "starts", Start):
        yield start._replace(at=start.at * 1000 + offset, life=start.life * 1000 + offset)


def read_state(directory: Path) -> FinalState:
    """The final state as it was collected."""
    state = json.loads((directory / "end.json").read_text())
    return FinalState(
        offsets=[Offset(*row) for row in state.pop("offsets")],
        letters=[Letter(*row) for row in state.pop("letters")],
        **state,
    )


async def _measure_clock(connection: Connection) -> int:
    """Nanoseconds from the server's clock to the monotonic one, to within half a round trip."""
    looks = []
    for _ in range(_LOOKS):
        asked = time.monotonic_ns()
        now: int = await connection.fetchval(_NOW)
        took = time.monotonic_ns() - asked
        looks.append((took, asked + took // 2 - now * 1000))
    return min(looks)[1]


async def _dump(connection: Connection, statement: str, path: Path) -> None:
    with path.open("w") as file:
        async with connection.transaction():
            async for row in connection.cursor(statement, prefetch=5000):
                file.write(json.dumps(dict(row)) + "\n")


def read_rows(path: Path, kind: type[_Row]) -> Iterator[_Row]:
    """The rows of a query as they were collected. `kind`: a NamedTuple with its columns."""
    with path.open() as file:
        for line in file:
            yield kind(**json.loads(line))
