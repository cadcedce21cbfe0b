"""Whether the log works: asked of the server, tried on it, and said check by check.

A probe goes the way of an append as far as it can go without leaving anything behind, and ends with a commit. What it
promises: when every check is "ok", an event that is produced now is stored, for all that can be known now.
"""

from pgbackend.errors import ConnectionLostError, DatabaseError, PgBackendError, SchemaError
from pgbackend.log.requirements import Fence
from pgbackend.log.segments import Segments
from pgbackend.postgres import schema as tables
from pgbackend.postgres.pool import STANDBY, Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ProbeSql
from pgbackend.subscriptions.definitions import Subscriptions


class Probe:
    """Looks at one log."""

    def __init__(
        self, database: Database, subscriptions: Subscriptions, fence: Fence, segments: Segments, *, schema: str
    ) -> None:
        self._database = database
        self._subscriptions = subscriptions
        self._fence = fence
        self._segments = segments
        self._schema = schema
        self._sql = load(ProbeSql, "probe", schema=schema)

    async def run(self, *, timeout: float) -> dict[str, str]:
        """Each check by name: "ok", or what is wrong and what to do. What depends on a check that failed is left out.

        `connection`: the server answers. `schema`: the tables are as this version needs them. `primary`: it is no
        standby. `writable`: transactions may write. `privilege`: this role may append. `log`: positions are not given
        out twice. `fence`: no event can be lost behind readers. `segments`: the next event has a place. `write`: a
        commit was made durable within `timeout` seconds.
        """
        checks: dict[str, str] = {}
        try:
            await self._run(checks, timeout)
        except PgBackendError as error:
            if isinstance(error, DatabaseError) and error.sqlstate == STANDBY and "connection" not in checks:
                # It was reached, and will not do.
                checks.update(connection="ok", primary=str(error))
            else:
                # The first that has no verdict: it is what was being asked.
                checks["write" if "segments" in checks else "connection"] = str(error)
        return checks

    async def _run(self, checks: dict[str, str], timeout: float) -> None:
        try:
            found = await tables.found(self._database.fetch, self._schema)
            checks["connection"] = "ok"
            tables.check(found, self._schema)
            checks["schema"] = "ok"
        except SchemaError as error:
            checks.update(connection="ok", schema=str(error))
            return
        seen = await self._database.fetchrow(self._sql.examine)
        assert seen is not None  # noqa: S101 - a SELECT of scalars
        checks["primary"] = "ok"  # to a standby there is no connection
        checks["writable"] = (
            "Transactions are read-only: unset default_transaction_read_only for this role, database or server."
            if seen["read_only"]
            else "ok"
        )
        checks["privilege"] = (
            "ok"
            if seen["may_insert"]
            else f"Role {seen['role']} may not append: run the SQL that `pgbackend grants --producer` prints for it."
        )
        checks["log"] = await self._subscriptions.distrust() or "ok"
        checks["fence"] = await self._examine_fence(all_well=all_ok(checks))
        if not all_ok(checks):
            return
        try:
            checks["segments"] = await self._next_place()
        except DatabaseError as error:
            checks["segments"] = str(error)
        if all_ok(checks):
            await self._database.execute(self._sql.write, timeout=timeout)
            checks["write"] = "ok"

    async def _examine_fence(self, *, all_well: bool) -> str:
        try:
            problem = await self._fence.examine()
            # It takes a transaction that writes.
            if problem is None and all_well:
                problem = await self._fence.prove()
        except ConnectionLostError:
            raise
        except DatabaseError as error:
            return str(error)
        return problem or "ok"

    async def _next_place(self) -> str:
        reach = await self._segments.find_reach()
        if reach.is_exhausted:
            # Whoever appends now would make it: so can this.
            await self._segments.extend()
            reach = await self._segments.find_reach()
        if reach.is_exhausted:
            return f"No segment holds position {reach.head + 1} yet: end what keeps the log's table `events` locked."
        return "ok"


def all_ok(checks: dict[str, str]) -> bool:
    return all(text == "ok" for text in checks.values())
