"""The check of the log behind `Backend.probe()`: whether everything works that the next `produce()` needs.

It goes the way of an append as far as it can without leaving anything behind, and ends with a durable commit. When
every check is "ok", an event that is produced now is stored, as far as anyone can know in advance.
"""

from pgbackend.errors import ConnectionLostError, DatabaseError, PgBackendError, SchemaError
from pgbackend.log.requirements import Requirements
from pgbackend.log.segments import Segments
from pgbackend.postgres import schema as tables
from pgbackend.postgres.connections import Record
from pgbackend.postgres.errors import STANDBY
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LogCheckSql
from pgbackend.subscriptions.overview import Overview


class LogCheck:
    """Checks one log."""

    def __init__(
        self, database: Database, overview: Overview, requirements: Requirements, segments: Segments, *, schema: str
    ) -> None:
        self._database = database
        self._overview = overview
        self._requirements = requirements
        self._segments = segments
        self._schema = schema
        self._sql = load(LogCheckSql, "log_check", schema=schema)

    async def run_once(self, *, timeout: float) -> dict[str, str]:
        """Each check by its name: "ok", or what is wrong and what to do. A failed check leaves later ones out.

        `connection`: the server answers. `schema`: the tables are as this version needs them. `primary`: it is no
        standby. `writable`: transactions may write. `privilege`: this role may append. `log`: no position will be given
        out twice. `fence`: readers cannot miss an event. `segments`: the next event has a segment. `write`: a commit
        became durable within `timeout` seconds.
        """
        checks: dict[str, str] = {}
        try:
            await self._run_checks(checks, timeout)
        except PgBackendError as error:
            if isinstance(error, DatabaseError) and error.sqlstate == STANDBY and "connection" not in checks:
                checks.update(connection="ok", primary=str(error))
            else:
                # The error belongs to the check that was under way: the first or the last one.
                checks["write" if "segments" in checks else "connection"] = str(error)
        return checks

    async def _run_checks(self, checks: dict[str, str], timeout: float) -> None:
        try:
            found = await tables.find_revision(self._database.fetch, self._schema)
            checks["connection"] = "ok"
            tables.check(found, self._schema)
            checks["schema"] = "ok"
        except SchemaError as error:
            checks.update(connection="ok", schema=str(error))
            return
        session = await self._database.fetchrow(self._sql.examine)
        assert session is not None  # noqa: S101 - a SELECT of scalars
        checks["primary"] = "ok"  # the pool opens no connection to a standby
        checks["writable"] = _writable(session)
        checks["privilege"] = _privilege(session)
        checks["log"] = await self._overview.find_mistrust() or "ok"
        checks["fence"] = await self._check_fence(may_write=all_ok(checks))
        if not all_ok(checks):
            return
        checks["segments"] = await self._check_segments()
        if all_ok(checks):
            await self._database.execute(self._sql.write, timeout=timeout)
            checks["write"] = "ok"

    async def _check_fence(self, *, may_write: bool) -> str:
        try:
            problem = await self._requirements.find_problem()
            # The proof needs a transaction that writes.
            if problem is None and may_write:
                problem = await self._requirements.test_evidence()
        except ConnectionLostError:
            raise
        except DatabaseError as error:
            return str(error)
        return problem or "ok"

    async def _check_segments(self) -> str:
        try:
            reach = await self._segments.find_reach()
            if reach.is_exhausted:
                # The next append would make the segment, so the check may do it too.
                await self._segments.extend()
                reach = await self._segments.find_reach()
        except DatabaseError as error:
            return str(error)
        if reach.is_exhausted:
            return f"No segment holds position {reach.head + 1} yet: end what keeps the log's table `events` locked."
        return "ok"


def all_ok(checks: dict[str, str]) -> bool:
    """Whether no check found anything wrong."""
    return all(text == "ok" for text in checks.values())


def _writable(session: Record) -> str:
    if session["read_only"]:
        return "Transactions are read-only: unset default_transaction_read_only for this role, database or server."
    return "ok"


def _privilege(session: Record) -> str:
    if session["may_insert"]:
        return "ok"
    return f"Role {session['role']} may not append: run the SQL that `pgbackend grants --producer` prints for it."
