"""A whole run, from an empty schema to the report.

With a DSN it works in a schema of its own there, with a random name, which it drops at the end. It does not restart
that PostgreSQL. Without a DSN it starts a server of its own, and restarts and kills that too.
"""

import asyncio
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import chain
from pathlib import Path

from pgbackend.backend import Backend
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import ConfigError
from pgbackend.postgres.dsn import describe_dsn
from pgbackend.postgres.pool import Database
from pgbackend.torture import chaos, machine, records
from pgbackend.torture.audit import Audit, read_changes, read_log, read_starts, read_state
from pgbackend.torture.chaos import Chaos
from pgbackend.torture.load import SUBSCRIPTIONS
from pgbackend.torture.plan import Plan
from pgbackend.torture.report import Report
from pgbackend.torture.verdict.judge import Records, judge
from pgbackend.torture.verdict.rulings import Verdict

_STANDSTILL = 60.0
"""Seconds without progress after which what is not settled counts as stuck. The whole backlog may take longer:
producers do not wait for slow workers."""
_POLL = 0.25


async def run(
    plan: Plan, *, dsn: str | None = None, keep: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Carry the plan out and judge the run.

    `dsn`: the database to use. Its server is not restarted, so the plan must have no restarts. `keep`: a new or empty
    directory for the records. Without it they are deleted.
    """
    with _directory(keep) as directory:
        (directory / "plan").write_text(f"{plan}\n")
        async with AsyncExitStack() as stack:
            server: EmbeddedServer | None = None
            if dsn is None:
                server = await stack.enter_async_context(_embedded())
                dsn = server.dsn
            where = await _describe(dsn, embedded=server is not None)
            schema = f"pgbackend_torture_{uuid.uuid4().hex[:12]}"
            drained = await _torture(plan, dsn, schema, directory, server, progress=progress)
        progress("judging the records")
        verdict = await asyncio.to_thread(judge_directory, directory, plan)
        report = Report(plan=plan, server=where, verdict=verdict, drained=drained)
        (directory / "report.md").write_text(report.markdown())
    return report


def judge_directory(directory: Path, plan: Plan) -> Verdict:
    """The verdict on the records in a directory."""
    return judge(
        Records(
            produced=chain.from_iterable(records.read(directory, place) for place in plan.producers),
            log=read_log(directory),
            changes=read_changes(directory),
            starts=read_starts(directory),
            faults=records.merge(directory, [chaos.PLACE, machine.PLACE]),
            notes=records.merge(directory, plan.workers),
            state=read_state(directory),
        )
    )


async def _torture(
    plan: Plan,
    dsn: str,
    schema: str,
    directory: Path,
    server: EmbeddedServer | None,
    *,
    progress: Callable[[str], None],
) -> float:
    """All records are in the directory, and the schema is gone. Returns how many seconds settling took at the end."""
    audit = Audit(dsn, schema)
    backend = Backend(dsn, schema=schema)
    try:
        await backend.init()
        await backend.stop()
        await audit.install()
        async with Chaos(plan, dsn=dsn, schema=schema, directory=directory, server=server, audit=audit) as processes:
            await processes.create_subscriptions([name for name, terms in SUBSCRIPTIONS.items() if not terms.midway])
            progress(f"starting {len(plan.workers)} workers and {len(plan.producers)} producers")
            await processes.start_processes([*plan.workers, *plan.producers])
            progress(f"{len(plan.steps)} faults in {plan.seconds:g} s")
            await processes.inject_faults()
            await processes.end_processes(plan.producers)
            progress("waiting until everything is settled")
            began = time.monotonic()
            unsettled = await _drain(audit, processes, most=_STANDSTILL + plan.seconds)
            drained = time.monotonic() - began
            await processes.end_processes(plan.workers)
            await audit.collect(directory, unsettled=unsettled, failures=processes.failures)
    finally:
        await backend.stop()
        if server is None:
            progress("dropping the scratch schema")
            await audit.drop()
    return drained


async def _drain(audit: Audit, processes: Chaos, *, most: float) -> list[str]:
    """Wait until everything is settled. Returns what is not after a standstill, or after `most` seconds."""
    began = moved = time.monotonic()
    before: list[str] = []
    while unsettled := await audit.unsettled():
        now = time.monotonic()
        if unsettled != before:
            before, moved = unsettled, now
        if now > min(moved + _STANDSTILL, began + most):
            break
        processes.check_processes()
        await asyncio.sleep(_POLL)
    return unsettled


@asynccontextmanager
async def _embedded() -> AsyncIterator[EmbeddedServer]:
    with tempfile.TemporaryDirectory(prefix="pgbackend-torture-", ignore_cleanup_errors=True) as directory:
        async with EmbeddedServer(Path(directory)) as server:
            yield server


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="pgbackend-torture-records-") as directory:
            yield Path(directory)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        filled = any(keep.iterdir())
    except OSError as error:
        raise ConfigError(f"{keep} cannot hold the records: {error.strerror}. Name another directory.") from error
    if filled:
        raise ConfigError(f"{keep} is not empty. Name a new directory for the records.")
    yield keep.resolve()


async def _describe(dsn: str, *, embedded: bool) -> str:
    """Name the server. Raises ConnectionLostError if it does not answer."""
    database = Database(dsn, pool_size=1)
    await database.open()
    try:
        version = await database.fetchval("SHOW server_version")
    finally:
        await database.close()
    return f"PostgreSQL {version}, " + ("a server of its own" if embedded else describe_dsn(dsn))
