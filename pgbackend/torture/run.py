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
from pgbackend.postgres.sql import quote_ident
from pgbackend.torture import chaos, machine, moments, records
from pgbackend.torture.applications import APPLICATIONS
from pgbackend.torture.applications.bank import Applied, Balance
from pgbackend.torture.applications.orders import Bill, Order
from pgbackend.torture.audit import Audit, read_changes, read_log, read_rows, read_starts, read_state
from pgbackend.torture.chaos import Chaos
from pgbackend.torture.plan import Plan
from pgbackend.torture.report import Report
from pgbackend.torture.server import Embedded, Restartable
from pgbackend.torture.verdict.bank import BankRecords, judge_bank
from pgbackend.torture.verdict.judge import Records, judge
from pgbackend.torture.verdict.orders import OrderRecords, judge_orders
from pgbackend.torture.verdict.rulings import Verdict

_STANDSTILL = 60.0
"""Seconds without progress after which what is not settled counts as stuck. The whole backlog may take longer:
producers do not wait for slow workers."""
_POLL = 0.25


async def run(
    plan: Plan,
    *,
    dsn: str | None = None,
    server: Restartable | None = None,
    keep: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Carry the plan out and judge the run.

    `dsn`: the database to use. Its server is not restarted, so the plan must have no restarts. `server`: one to restart
    as the plan says; without both it is a new embedded one. `keep`: a new or empty directory for the records. Without
    it they are deleted.
    """
    with _directory(keep) as directory:
        (directory / "plan").write_text(f"{plan}\n")
        async with AsyncExitStack() as stack:
            if dsn is None:
                if server is None:
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
    run_records = Records(
        produced=chain.from_iterable(records.read(directory, place) for place in plan.producers),
        log=read_log(directory),
        changes=read_changes(directory),
        starts=read_starts(directory),
        faults=records.merge(directory, [chaos.PLACE, machine.PLACE]),
        notes=records.merge(directory, plan.workers),
        state=read_state(directory),
        subscriptions=APPLICATIONS[plan.name].subscriptions,
    )
    noted = records.read(directory, moments.PLACE)
    match plan.name:
        case "bank":
            applied, balances = read_rows(directory / "effects", Applied), read_rows(directory / "balances", Balance)
            return judge_bank(BankRecords(run=run_records, moments=noted, applied=applied, balances=balances))
        case "orders":
            bills, orders = read_rows(directory / "effects", Bill), read_rows(directory / "orders", Order)
            return judge_orders(OrderRecords(run=run_records, moments=noted, bills=bills, orders=orders))
        case _:
            return judge(run_records)


async def _torture(
    plan: Plan, dsn: str, schema: str, directory: Path, server: Restartable | None, *, progress: Callable[[str], None]
) -> float:
    """All records are in the directory, and the schema is gone. Returns how many seconds settling took at the end."""
    application = APPLICATIONS[plan.name]
    audit = Audit(dsn, schema)
    backend = Backend(dsn, schema=schema)
    try:
        await backend.init()
        await backend.stop()
        await audit.install(application.tables)
        async with (
            Chaos(plan, dsn=dsn, schema=schema, directory=directory, server=server, audit=audit) as processes,
            _moments(dsn, schema, application.moment, directory),
        ):
            names = [name for name, terms in application.subscriptions.items() if not terms.midway]
            await processes.create_subscriptions(names)
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
            await audit.collect(
                directory, unsettled=unsettled, failures=processes.failures, records=application.records
            )
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
async def _moments(dsn: str, schema: str, question: str, directory: Path) -> AsyncIterator[None]:
    """Meanwhile what must hold at each moment is noted, if the application has a question."""
    if not question:
        yield
        return
    notes = records.Notes(directory, moments.PLACE)
    watching = asyncio.create_task(moments.watch(dsn, question.format(schema=quote_ident(schema)), notes), name="watch")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        notes.close()


@asynccontextmanager
async def _embedded() -> AsyncIterator[Embedded]:
    with tempfile.TemporaryDirectory(prefix="pgbackend-torture-", ignore_cleanup_errors=True) as directory:
        async with EmbeddedServer(Path(directory)) as server:
            yield Embedded(server)


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
