"""A producer of the torture test: a process that produces in every way there is, and notes the outcome of each event.

    start PROCESS PID
    sent N …              will be produced now
    inserted N M          will be inserted now, in a transaction that began with M
    acknowledged N …      committed, and the producer was told so
    refused N …           an error said that they are not stored
    rolled-back N …       as a whole, or to a savepoint
    uncertain N …         an error said that they may be stored, or COMMIT was not answered
    end                   it ended in order

The id of event N is the producer's place and N. It ends on SIGTERM, or when its standard input closes.
"""

import asyncio
import itertools
import json
import logging
import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg

from pgbackend.backend import Backend
from pgbackend.errors import PgBackendError, ProduceUncertainError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident
from pgbackend.torture.applications import APPLICATIONS
from pgbackend.torture.applications.application import Append, Connection, MakeEvent
from pgbackend.torture.applications.plain import KEYS
from pgbackend.torture.load import PRODUCE_TIMEOUT
from pgbackend.torture.records import Notes
from pgbackend.torture.worker import read_commands

_PAUSE = 0.12
"""Seconds between two events of a caller, at most."""
_BATCH_PAUSE = 1.0
_BATCH = 12
_PARTS = 5
_RETRY_DELAY = 0.1
_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Errors of a statement whose connection breaks. The last: it broke while another statement was being cancelled."""


class _Producer:
    def __init__(self, job: dict[str, Any]) -> None:
        self._place = job["place"]
        self._dsn = job["dsn"]
        self._notes = Notes(Path(job["directory"]), self._place)
        self._notes.note("start", job["process"], os.getpid())
        self._backend = Backend(self._dsn, schema=job["schema"], produce_timeout=PRODUCE_TIMEOUT)
        self._application = APPLICATIONS[job["plan"]]
        self._schema = quote_ident(job["schema"])
        self._numbers = itertools.count()
        self._stop = asyncio.Event()
        self._seed = f"{job['seed']} {self._place}"

    async def run(self, commands: asyncio.StreamReader) -> None:
        """Produce until told to end."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        await self._backend.init(migrate=False)
        orphaned = asyncio.create_task(self._watch(commands), name="await the end")
        os.write(1, b"ready\n")
        async with asyncio.TaskGroup() as tasks:
            if (make_event := self._application.make_event) is not None:
                for caller in range(self._application.callers):
                    tasks.create_task(self._produce(make_event, random.Random(f"{self._seed} {caller}")))  # noqa: S311 - a load
                tasks.create_task(self._produce_many(make_event, random.Random(f"{self._seed} many")))  # noqa: S311
            if (append := self._application.append) is not None:
                for appender in range(self._application.appenders):
                    tasks.create_task(self._append_slowly(append, random.Random(f"{self._seed} slow {appender}")))  # noqa: S311
        orphaned.cancel()
        await self._backend.stop()
        self._notes.note("end")

    async def _watch(self, commands: asyncio.StreamReader) -> None:
        await commands.read()
        self._stop.set()

    async def _produce(self, make_event: MakeEvent, draws: random.Random) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            self._notes.note("sent", number)
            try:
                await self._backend.produce(make_event(self._id(number), draws))
            except PgBackendError as error:
                self._notes.note(_outcome(error), number)
            else:
                self._notes.note("acknowledged", number)
            await self._pause(draws.random() * _PAUSE)

    async def _produce_many(self, make_event: MakeEvent, draws: random.Random) -> None:
        while not self._stop.is_set():
            numbers = list(itertools.islice(self._numbers, draws.randint(2, _BATCH)))
            self._notes.note("sent", *numbers)
            try:
                await self._backend.produce_many([make_event(self._id(number), draws) for number in numbers])
            except PgBackendError as error:
                self._notes.note(_outcome(error), *numbers)
            else:
                self._notes.note("acknowledged", *numbers)
            await self._pause(draws.random() * _BATCH_PAUSE)

    def _id(self, number: int) -> str:
        return f"{self._place}-{number}"

    async def _append_slowly(self, append: Append, draws: random.Random) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            try:
                if connection is None or connection.is_closed():
                    connection = await Database(self._dsn).connect(timeout=10)
                await self._transact(append, connection, draws)
            except _LOST:
                if connection is not None:
                    connection.terminate()
                connection = None
                await self._pause(_RETRY_DELAY)
        if connection is not None:
            with suppress(*_LOST):
                await connection.close(timeout=5)

    async def _transact(self, append: Append, connection: Connection, draws: random.Random) -> None:
        """One transaction of several events, some with the same key; it may roll back, as a whole or in part."""
        patience = self._application.patience
        parts, undone = [], []
        committing = rolled_back = False
        keys = [f"key-{draws.randrange(KEYS)}" for _ in range(2)]
        try:
            await connection.execute("BEGIN", timeout=10)
            for _ in range(draws.randint(1, _PARTS)):
                number = next(self._numbers)
                parts.append(number)
                self._notes.note("inserted", number, parts[0])
                savepoint = draws.random() < 0.15
                if savepoint:
                    await connection.execute("SAVEPOINT part", timeout=10)
                await append(self._backend, self._schema, self._id(number), draws.choice((*keys, None)), connection)
                if savepoint:
                    await connection.execute("ROLLBACK TO SAVEPOINT part", timeout=10)
                    undone.append(number)
                await self._pause(draws.random() * patience)
            if draws.random() < 0.25:
                await connection.execute("ROLLBACK", timeout=10)
                rolled_back = True
            else:
                committing = True
                await connection.execute("COMMIT", timeout=10)
                committing = False
        except BaseException:
            # Without a COMMIT the server rolls back.
            kept = [number for number in parts if number not in undone]
            if kept:
                self._notes.note("uncertain" if committing else "rolled-back", *kept)
            raise
        else:
            kept = [number for number in parts if number not in undone]
            if kept:
                self._notes.note("rolled-back" if rolled_back else "acknowledged", *kept)
        finally:
            if undone:
                self._notes.note("rolled-back", *undone)
        await self._pause(draws.random() * patience)

    async def _pause(self, seconds: float) -> None:
        if not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stop.wait()


def _outcome(error: PgBackendError) -> str:
    """The outcome that each error means for its events. Every other error means that they are not stored."""
    return "uncertain" if isinstance(error, ProduceUncertainError) else "refused"


async def main() -> None:
    """Produce as the first line says, until told to end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    commands = await read_commands()
    job: dict[str, Any] = json.loads(await commands.readline())
    await _Producer(job).run(commands)


if __name__ == "__main__":
    asyncio.run(main())
