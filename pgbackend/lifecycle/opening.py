"""Opens the log for `init()` and closes it for `stop()`: connections, tables, proofs, and the actors that share them.

`open_log()` returns only when the tables are as this version needs them and no event can be missed by a reader.
Otherwise it raises, and nothing stays open.
"""

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING
from uuid import uuid4

from pgbackend.delivery.changes import Changes
from pgbackend.delivery.handler_calls import HandlerCalls
from pgbackend.delivery.redelivery import Redelivery
from pgbackend.delivery.retries import Retries
from pgbackend.delivery.runner import Runner, refuse, verify_log
from pgbackend.delivery.steering import Steering
from pgbackend.delivery.worker import Worker
from pgbackend.log.appender import Appender
from pgbackend.log.deduplication import Deduplication
from pgbackend.log.log import Log
from pgbackend.log.maintenance import Maintenance
from pgbackend.log.notify import Notifier, Wakeup, channel
from pgbackend.log.redaction import Redactions
from pgbackend.log.requirements import Requirements
from pgbackend.log.retention import Retainer
from pgbackend.log.segments import Segments
from pgbackend.log_check import LogCheck
from pgbackend.outbox.asynchronous import Outbox
from pgbackend.outbox.commits import Commits
from pgbackend.postgres import schema as tables
from pgbackend.postgres.dsn import describe_dsn, normalize_dsn
from pgbackend.postgres.pool import Database
from pgbackend.settings import Settings
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.definitions import Subscriptions
from pgbackend.subscriptions.overview import Overview
from pgbackend.subscriptions.pauses import Pauses
from pgbackend.subscriptions.previews import Previews
from pgbackend.subscriptions.skipping import Skips

if TYPE_CHECKING:
    from pgbackend.embedded.server import EmbeddedServer

LAST_STEP = 0.5
"""Seconds that each last step has at least, even past the deadline."""


class Server:
    """The PostgreSQL that holds the log: one that runs already, or an embedded one. Raises ConfigError for a DSN."""

    def __init__(self, dsn: str, *, listen_dsn: str | None) -> None:
        self._dsn = normalize_dsn(dsn)
        self._embedded: EmbeddedServer | None = None
        self.listen_dsn = normalize_dsn(listen_dsn) if listen_dsn is not None else None
        self.description = describe_dsn(dsn)
        """Host, port and database, without credentials."""

    def embed(self, directory: str | PathLike[str]) -> None:
        """From now on it is an embedded server whose data lives in `directory`."""
        # Here, because its package is an extra.
        from pgbackend.embedded.server import EmbeddedServer  # noqa: PLC0415

        self._embedded = EmbeddedServer(directory)
        self.description = f"embedded in {directory}"

    async def start(self) -> str:
        """The DSN of the server, which runs."""
        return self._dsn if self._embedded is None else await self._embedded.start()

    async def stop(self) -> None:
        """An embedded server has ended, unless another process uses it too."""
        if self._embedded is not None:
            await self._embedded.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLog:
    """Everything that exists between `init()` and `stop()`.

    No task group is around its tasks, because they go on when `init()` returns. `close()` ends them.
    """

    database: Database
    log: Log
    segments: Segments
    retainer: Retainer
    overview: Overview
    redelivery: Redelivery
    redactions: Redactions
    appender: Appender
    outbox: Outbox
    deduplication: Deduplication
    notifier: Notifier
    tasks: "frozenset[asyncio.Task[None]]"
    """Those of the appender, of the deduplication and of the notifier."""
    check: LogCheck
    runner: Runner
    calls: HandlerCalls
    changes: Changes
    steering: Steering

    async def close(self, deadline: float) -> None:
        """Every event that was being produced is answered, and nothing of what `init()` made is left."""
        self.outbox.close()
        try:
            await self.appender.drain(timeout=seconds_left(deadline))
        finally:
            for task in self.tasks:
                task.cancel()
            self.runner.close_registrations()
            await self.database.close(timeout=seconds_left(deadline))
        await asyncio.wait(self.tasks)


async def open_log(server: Server, settings: Settings, *, migrate: bool) -> OpenLog:
    """The log, ready to be appended to and read. Raises as `Backend.init()` says."""
    dsn, schema = await server.start(), settings.schema
    database: Database | None = None
    try:
        database = Database(dsn, listen_dsn=server.listen_dsn, pool_size=settings.pool_size)
        await database.open()
        await _prepare_tables(database, schema, migrate=migrate)
        log = Log(database, schema=schema, hole_wait=settings.hole_wait)
        requirements, overview = Requirements(log, schema=schema), Overview(database, schema=schema)
        await verify_log(requirements, overview)
        refuse(await requirements.test_evidence())
        segments = Segments(database, schema=schema)
        await segments.extend()
        deduplication = Deduplication(database, schema=schema)
        await deduplication.enter(settings.deduplicate)
        await log.incarnation.enter()
    except BaseException:
        try:
            if database is not None:
                await database.close(timeout=LAST_STEP)
        finally:
            await server.stop()
        raise
    return _start_actors(log, requirements, overview, segments, deduplication, settings)


def seconds_left(deadline: float) -> float:
    """Seconds that a last step has until the deadline, in monotonic seconds."""
    return max(deadline - time.monotonic(), LAST_STEP)


async def _prepare_tables(database: Database, schema: str, *, migrate: bool) -> None:
    found = await tables.find_revision(database.fetch, schema)
    if migrate and found != tables.head():
        await tables.migrate(database.connect, schema)
        found = await tables.find_revision(database.fetch, schema)
    tables.check(found, schema)


def _start_actors(
    log: Log,
    requirements: Requirements,
    overview: Overview,
    segments: Segments,
    deduplication: Deduplication,
    settings: Settings,
) -> OpenLog:
    database, schema = log.database, settings.schema
    sender, notify_channel, wakeup = str(uuid4()), channel(schema), Wakeup()

    def idle() -> float:
        return appender.idle()

    notifier = Notifier(database, log.sql, channel=notify_channel, sender=sender, idle=idle)
    appender = Appender(
        database,
        log.sql,
        schema=schema,
        produce_timeout=settings.produce_timeout,
        wakeup=wakeup,
        notifier=notifier,
        on_full=segments.extend,
        deduplication=deduplication,
    )
    retainer = Retainer(database, segments, schema=schema)
    new_worker = partial(
        Worker,
        log=log,
        maintenance=Maintenance(requirements, segments, wakeup),
        retainer=retainer,
        settings=settings,
        wakeup=wakeup,
        notifier=notifier,
        channel=notify_channel,
        sender=sender,
    )
    subscriptions = Subscriptions(log, schema=schema)
    pauses, redelivery = Pauses(log, schema=schema), Redelivery(database, schema=schema)
    runner = Runner(log, requirements, subscriptions, overview, redelivery, new_worker=new_worker)
    calls = HandlerCalls(runner)
    tasks = (
        asyncio.create_task(appender.run(), name="append"),
        asyncio.create_task(deduplication.run(), name="deduplicate"),
        asyncio.create_task(notifier.run(), name="notify"),
    )
    return OpenLog(
        database=database,
        log=log,
        segments=segments,
        retainer=retainer,
        overview=overview,
        redelivery=redelivery,
        redactions=Redactions(database, schema=schema),
        appender=appender,
        outbox=Outbox(Commits(wakeup, notifier), schema=schema),
        deduplication=deduplication,
        notifier=notifier,
        tasks=frozenset(tasks),
        check=LogCheck(database, overview, requirements, segments, schema=schema),
        runner=runner,
        calls=calls,
        changes=Changes(
            log,
            subscriptions=subscriptions,
            alterations=Alterations(log, schema=schema),
            pauses=pauses,
            previews=Previews(log, schema=schema),
            redelivery=redelivery,
            retries=Retries(database, schema=schema),
            skips=Skips(log, schema=schema),
            notifier=notifier,
            runner=runner,
            calls=calls,
            settings=settings,
        ),
        steering=Steering(pauses, notifier, runner),
    )
