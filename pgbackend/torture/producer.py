"""A producer of the torture test: a process that produces in every way there is, and writes down what came of it.

    p n …     about to be produced
    i n m     about to be inserted, in a transaction that began with m
    a n …     acknowledged: committed, as far as anybody was told
    r n …     refused: an error said that they are not stored
    x n …     rolled back, as a whole or to a savepoint
    u n …     uncertain: nobody said

The id of event n is the producer's place and n. SIGTERM ends it in order; so does the end of its standard input.
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
from cloudevents.core.v1.event import CloudEvent

from pgbackend.backend import Backend
from pgbackend.errors import PgBackendError, ProduceUncertainError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident
from pgbackend.torture.load import PRODUCE_TIMEOUT
from pgbackend.torture.records import Notes
from pgbackend.torture.worker import read_commands

CALLERS = 3
"""Tasks that produce() one event after the other, at the same time."""
_PAUSE = 0.12
"""Seconds between two events of a caller, at most."""
_BATCH_PAUSE = 1.0
_BATCH = 12
INSERTERS = 2
"""Tasks that insert in transactions of their own."""
_OPEN = 0.4
"""Seconds between two statements of a transaction, at most: some are open for longer than `hole_wait`, some are not."""
_PARTS = 5
_KEYS = 24
_AGAIN = 0.1
_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a statement raises whose connection goes away: the last one when it goes while another one is cancelled."""


class _Producer:
    def __init__(self, job: dict[str, Any]) -> None:
        self._place = job["place"]
        self._dsn = job["dsn"]
        self._notes = Notes(Path(job["directory"]), self._place)
        self._notes.note("start", job["process"], os.getpid())
        self._backend = Backend(self._dsn, schema=job["schema"], produce_timeout=PRODUCE_TIMEOUT)
        events = f"{quote_ident(job['schema'])}.events"
        self._insert = f"INSERT INTO {events} (id, source, type, partitionkey) VALUES ($1, $2, 'inserted', $3)"  # noqa: S608 - our own name
        self._numbers = itertools.count()
        self._enough = asyncio.Event()
        self._seed = f"{job['seed']} {self._place}"

    async def run(self, commands: asyncio.StreamReader) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._enough.set)
        await self._backend.init(migrate=False)
        orphaned = asyncio.create_task(self._watch(commands), name="await the end")
        os.write(1, b"ready\n")
        async with asyncio.TaskGroup() as tasks:
            for caller in range(CALLERS):
                tasks.create_task(self._produce(random.Random(f"{self._seed} {caller}")))  # noqa: S311 - a load
            tasks.create_task(self._produce_many(random.Random(f"{self._seed} many")))  # noqa: S311
            for inserter in range(INSERTERS):
                tasks.create_task(self._insert_slowly(random.Random(f"{self._seed} slow {inserter}")))  # noqa: S311
        orphaned.cancel()
        await self._backend.stop()
        self._notes.note("end")

    async def _watch(self, commands: asyncio.StreamReader) -> None:
        await commands.read()
        self._enough.set()

    async def _produce(self, chance: random.Random) -> None:
        while not self._enough.is_set():
            number = next(self._numbers)
            self._notes.note("p", number)
            try:
                await self._backend.produce(self._event(number, chance))
            except PgBackendError as error:
                self._notes.note(_mark(error), number)
            else:
                self._notes.note("a", number)
            await self._pause(chance.random() * _PAUSE)

    async def _produce_many(self, chance: random.Random) -> None:
        while not self._enough.is_set():
            numbers = list(itertools.islice(self._numbers, chance.randint(2, _BATCH)))
            self._notes.note("p", *numbers)
            try:
                await self._backend.produce_many([self._event(number, chance) for number in numbers])
            except PgBackendError as error:
                self._notes.note(_mark(error), *numbers)
            else:
                self._notes.note("a", *numbers)
            await self._pause(chance.random() * _BATCH_PAUSE)

    def _event(self, number: int, chance: random.Random) -> CloudEvent:
        attributes = {
            "id": f"{self._place}-{number}",
            "source": "torture",
            "type": "produced",
            "datacontenttype": "text/plain",
        }
        kind = chance.random()
        if kind < 0.85:
            attributes["partitionkey" if kind < 0.7 else "subject"] = f"key-{chance.randrange(_KEYS)}"
        return CloudEvent(attributes, "x" * chance.randrange(600))

    async def _insert_slowly(self, chance: random.Random) -> None:
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        while not self._enough.is_set():
            try:
                if connection is None or connection.is_closed():
                    connection = await Database(self._dsn).connect(timeout=10)
                await self._transact(connection, chance)
            except _LOST:
                if connection is not None:
                    connection.terminate()
                connection = None
                await self._pause(_AGAIN)
        if connection is not None:
            with suppress(*_LOST):
                await connection.close(timeout=5)

    async def _transact(self, connection: "asyncpg.Connection[asyncpg.Record]", chance: random.Random) -> None:
        """One transaction of several inserts, some with the same key; it may roll back, as a whole or in part."""
        parts, undone = [], []
        committing = rolled_back = False
        keys = [f"key-{chance.randrange(_KEYS)}" for _ in range(2)]
        try:
            await connection.execute("BEGIN", timeout=10)
            for _ in range(chance.randint(1, _PARTS)):
                number = next(self._numbers)
                parts.append(number)
                self._notes.note("i", number, parts[0])
                savepoint = chance.random() < 0.15
                if savepoint:
                    await connection.execute("SAVEPOINT part", timeout=10)
                await connection.execute(
                    self._insert, f"{self._place}-{number}", "torture", chance.choice((*keys, None)), timeout=10
                )
                if savepoint:
                    await connection.execute("ROLLBACK TO SAVEPOINT part", timeout=10)
                    undone.append(number)
                await self._pause(chance.random() * _OPEN)
            if chance.random() < 0.25:
                await connection.execute("ROLLBACK", timeout=10)
                rolled_back = True
            else:
                committing = True
                await connection.execute("COMMIT", timeout=10)
                committing = False
        except BaseException:
            # What was lost before COMMIT was sent is rolled back by whoever notices first.
            kept = [number for number in parts if number not in undone]
            if kept:
                self._notes.note("u" if committing else "x", *kept)
            raise
        else:
            kept = [number for number in parts if number not in undone]
            if kept:
                self._notes.note("x" if rolled_back else "a", *kept)
        finally:
            if undone:
                self._notes.note("x", *undone)
        await self._pause(chance.random() * _OPEN)

    async def _pause(self, seconds: float) -> None:
        if not self._enough.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._enough.wait()


def _mark(error: PgBackendError) -> str:
    """What an error says of its events."""
    # Any other error says that they are not stored.
    return "u" if isinstance(error, ProduceUncertainError) else "r"


async def main() -> None:
    """Produce as the first line says, until told to end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    commands = await read_commands()
    job: dict[str, Any] = json.loads(await commands.readline())
    await _Producer(job).run(commands)


if __name__ == "__main__":
    asyncio.run(main())
