"""Checks the assumptions of the fence: the proof in pgbackend/log/fence.py holds only if all of them do.

- The tables are as the migrations made them: the sequence, the identity of `position`, what a crash keeps or empties.
  `verify()` looks that up in the catalogs. A worker repeats it while it runs: an operator can alter a sequence.
- The server is PostgreSQL: evidence names every open appender. `test_evidence()` opens one and looks for it.

The promise: whatever would make readers miss an event is an error that names it and says how to repair it.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pgbackend.errors import ConnectionLostError, SchemaError
from pgbackend.log.fence import Evidence
from pgbackend.log.log import Log
from pgbackend.postgres.connections import Record, is_pooled
from pgbackend.postgres.errors import STANDBY
from pgbackend.postgres.pool import STATEMENT_TIMEOUT
from pgbackend.postgres.reconnect import repeat
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import RequirementsSql

_POOLED_TIMEOUT = 1.0
"""Seconds that a test through a pooler waits for its second connection before it gives the first one back.

Otherwise processes that start together could take all of the pooler's connections and wait for each other.
"""
_PATIENCE = 15.0
"""Seconds for which a test through a pooler is tried again."""
_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Fault:
    """A property of the log without which readers could miss events."""

    text: str
    """The fault and its repair in words: the rest of a sentence, which may end in further sentences."""
    cure: str | None = None
    """The statements that repair it, one a line; None when no statement does."""


class Requirements:
    """Checks what the fence of one log takes for granted."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._schema = schema
        self._sql = load(RequirementsSql, "requirements", schema=schema)
        self._one_test = asyncio.Lock()
        """A test needs two connections of the pool at once, and several tests would wait for each other."""

    async def verify(self) -> None:
        """The tables are as the fence needs them, as far as catalogs say. Raises SchemaError."""
        problem = await self.find_problem()
        if problem is not None:
            raise SchemaError(problem)

    async def find_problem(self) -> str | None:
        """The faults of the log's tables that could lose events, and their repairs; None without one."""
        faults = await self.find_faults()
        return "Events could be lost: " + " ".join(fault.text for fault in faults) if faults else None

    async def find_faults(self) -> list[Fault]:
        """Each fault of the log's tables that could lose events."""
        seen = await self._log.database.fetchrow(self._sql.find_properties)
        where = quote_ident(self._schema)
        if seen is None:
            return [
                Fault(f"schema {where} lacks the table `events` or its sequence `events_position_seq`. Restore them.")
            ]
        if faults := list(_faults(seen, where)):
            return faults
        distributed = await self._log.database.fetchval(self._sql.find_distributed)
        if distributed:
            return [
                Fault(
                    f"Citus distributes the log's tables ({', '.join(distributed)}). "
                    "Undistribute them (`undistribute_table`), or put the log in a schema of tables local to one node.",
                    cure="\n".join(
                        f"SELECT undistribute_table({quote_literal(f'{where}.{quote_ident(name)}')});"
                        for name in distributed
                    ),
                )
            ]
        return []

    async def test_evidence(self) -> str | None:
        """Why evidence cannot be trusted on this server; None when it names an appender that was opened for the test.

        The appender takes the lock of an INSERT and draws no position. Raises ConnectionLostError when there is no
        second connection to take evidence on.
        """
        try:
            async with self._one_test:
                name, evidence = await repeat(self._observe_appender, STATEMENT_TIMEOUT)
        except ConnectionLostError as error:
            if error.sqlstate != STANDBY:
                raise
            # A role with read-only transactions appends nothing and runs no worker.
            return None
        if name and name in evidence.appenders:
            return None
        return (
            "This server's pg_locks does not show the lock of a transaction that appends "
            f"({'by its virtual transaction id' if name else 'nor its virtual transaction'}), so events could be lost. "
            "pgbackend needs PostgreSQL itself, not a database that only speaks its protocol."
        )

    async def _observe_appender(self) -> tuple[str | None, Evidence]:
        """The virtual transaction of an appender on one connection, and evidence from another one while it is open."""
        deadline = time.monotonic() + _PATIENCE
        database = self._log.database
        pooled = False
        while True:
            try:
                # Both connections first: through a pooler, connecting needs a connection to the server several times.
                async with database.acquire() as appender:
                    pooled = is_pooled(appender)
                    async with database.acquire() as observer, appender.transaction():
                        name = await appender.fetchval(self._sql.open_appender, timeout=STATEMENT_TIMEOUT)
                        timeout = _POOLED_TIMEOUT if pooled else STATEMENT_TIMEOUT
                        return name, await self._log.read_evidence(observer, timeout=timeout)
            except ConnectionLostError as error:
                if not pooled or error.sqlstate == STANDBY:
                    raise
                if time.monotonic() > deadline:
                    raise ConnectionLostError(
                        f"The fence could not be proven: {error} A pooler must have two connections to the server at "
                        "least (`default_pool_size`)."
                    ) from error
            # A random pause, so that processes which want the same connections do not keep in step.
            await asyncio.sleep(random.random() * _POOLED_TIMEOUT)  # noqa: S311 - not a secret


def _faults(seen: Record, where: str) -> Iterator[Fault]:
    """Each property that the tables lack. `where`: the log's schema, quoted."""
    sequence, position = f"{where}.events_position_seq", f"{where}.events.position"
    altered = [
        f"{label} is {seen[name]}"
        for label, name, wanted in (
            ("its type", "type", "bigint"),
            ("INCREMENT", "increment", 1),
            ("CACHE", "cache", 1),
            ("CYCLE", "cycle", False),
            ("MAXVALUE", "maximum", _MAX),
        )
        if seen[name] != wanted
    ]
    if seen["minimum"] < 1:
        altered.append(f"MINVALUE is {seen['minimum']}")
    if altered:
        cure = f"ALTER SEQUENCE {sequence} AS bigint INCREMENT BY 1 MINVALUE 1 NO MAXVALUE CACHE 1 NO CYCLE"
        yield Fault(
            f"the sequence {sequence} was altered ({', '.join(altered)}). Stop all producers, run {cure}, and start "
            "them again.",
            cure=f"{cure};",
        )
    if not seen["is_identity"]:
        cure = f"ALTER TABLE {where}.events ALTER COLUMN position SET GENERATED ALWAYS"
        yield Fault(
            f"{position} is not GENERATED ALWAYS AS IDENTITY, so producers may choose positions. Run {cure}.",
            cure=f"{cure};",
        )
    if not seen["uses_sequence"]:
        yield Fault(f"{position} does not draw from {sequence}. Make that its identity's sequence again.")
    if not seen["has_primary_key"]:
        yield Fault(
            f"{where}.events has no primary key. If a restore is under way, wait for its end; else run it again.",
            cure=f"ALTER TABLE {where}.events ADD CONSTRAINT events_pkey PRIMARY KEY (position);",
        )
    if not seen["sequence_logged"]:
        cure = f"ALTER SEQUENCE {sequence} SET LOGGED"
        yield Fault(f"a crash would set {sequence} back. Run {cure}.", cure=f"{cure};")
    if not seen["events_logged"]:
        yield Fault(
            f"a crash would empty {where}.events, or a segment of it. Run ALTER TABLE … SET LOGGED on each.",
            cure="\n".join(f"ALTER TABLE {where}.{quote_ident(name)} SET LOGGED;" for name in seen["unlogged"]),
        )
    if not seen["offsets_logged"]:
        cure = f"ALTER TABLE {where}.offsets SET LOGGED"
        yield Fault(f"a crash would empty {where}.offsets. Run {cure}.", cure=f"{cure};")
    if not seen["incarnation_unlogged"]:
        cure = f"ALTER TABLE {where}.incarnation SET UNLOGGED"
        yield Fault(f"{where}.incarnation is logged and so hides a crash. Run {cure}.", cure=f"{cure};")
