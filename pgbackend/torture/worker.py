"""A worker of the torture test: a process that runs the subscriptions and notes what it handles.

It reads commands from standard input as lines of JSON, the job first. It ends when that closes, or on SIGTERM.

    start PROCESS PID
    dispatch SERIAL SUBSCRIPTION SHARD EPOCH POSITION ATTEMPT ID    a dispatch starts, under this lease; for a batch,
                                                                    one line for each event
    handled SERIAL                                                  its handler returns next
    failed SERIAL                                                   its handler raises next
    claim, lost, released SUBSCRIPTION SHARD …                      what the worker reports of its leases
    presence, incarnation                                           it noticed that its connection or server is gone
    doubt                                                           it lost a shard at the end of a transaction
    tick                                                            its event loop runs
    end                                                             it ended in order
"""

import asyncio
import itertools
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.errors import DatabaseError, Reject
from pgbackend.postgres.sql import quote_ident
from pgbackend.torture import clock
from pgbackend.torture.applications import APPLICATIONS
from pgbackend.torture.applications.application import Connection, Effect
from pgbackend.torture.load import REJECTED, SETTINGS, Terms, failures
from pgbackend.torture.plan import Name
from pgbackend.torture.records import Notes

if TYPE_CHECKING:
    from pgbackend.model import Dispatcher

_TICK = 0.25
_RETRY_DELAY = 0.1
"""Seconds between tries to start while PostgreSQL is away."""


@dataclass(frozen=True, slots=True)
class _Job:
    dsn: str
    plan: Name
    schema: str
    directory: str
    place: str
    process: str
    subscriptions: list[str]


class _Worker:
    def __init__(self, job: _Job) -> None:
        self._notes = Notes(Path(job.directory), job.place)
        self._notes.note("start", job.process, os.getpid())
        self._backend = Backend(job.dsn, schema=job.schema, **SETTINGS)  # type: ignore[arg-type] # numbers
        self._application = APPLICATIONS[job.plan]
        self._schema = quote_ident(job.schema)
        self._number = int(job.place.rpartition("-")[2])
        self._subscriptions = job.subscriptions
        self._epochs: dict[tuple[str, int], int] = {}
        self._serial = itertools.count()
        self._random = random.Random()  # noqa: S311 - how long a dispatch takes
        self._stop = asyncio.Event()

    async def run(self, commands: asyncio.StreamReader) -> None:
        """Work until told to end."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        ticking = asyncio.create_task(self._tick(), name="tick")
        with facts.observe(self._observe):
            await self._until_done(lambda: self._backend.init(migrate=False))
            for name in self._subscriptions:
                await self._subscribe(name)
            if not self._stop.is_set():
                await self._work(commands)
            await self._backend.stop()
        ticking.cancel()
        self._notes.note("end")

    async def _tick(self) -> None:
        """Note that the event loop runs. A gap between two ticks is a silence."""
        while True:
            self._notes.note("tick")
            await asyncio.sleep(_TICK)

    async def _work(self, commands: asyncio.StreamReader) -> None:
        running = asyncio.create_task(self._backend.start(), name="dispatch")
        obeying = asyncio.create_task(self._obey(commands), name="obey")
        stopping = asyncio.create_task(self._stop.wait(), name="await the end")
        os.write(1, b"ready\n")
        await asyncio.wait({running, obeying, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await self._backend.stop()
        for task in (obeying, stopping):
            task.cancel()
        await asyncio.wait({obeying, stopping})
        # Raises the error that ended it, if it was not told to end.
        await running
        if not obeying.cancelled():
            obeying.result()

    async def _obey(self, commands: asyncio.StreamReader) -> None:
        while line := await commands.readline():
            for verb, argument in json.loads(line).items():
                if verb == "clock":
                    clock.jump(argument)
                else:
                    await self._subscribe(argument)

    async def _subscribe(self, name: str) -> None:
        terms, effect = self._application.subscriptions[name], self._application.effect
        dispatcher: Dispatcher = self._dispatcher(name, terms)
        if terms.transactional:
            assert effect is not None  # noqa: S101 - such an application has one
            dispatcher = self._transactor(name, terms, effect)
        await self._until_done(
            lambda: self._backend.subscribe(
                name,
                dispatcher,
                start="latest" if terms.midway else "earliest",
                order=terms.order,
                shards=terms.shards,
                concurrency=terms.concurrency,
                retry=terms.retry,
                transactional=terms.transactional,
                batch=terms.batches[self._number % len(terms.batches)],
            )
        )

    async def _until_done(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call it until it succeeds, as a supervisor restarts a program that cannot start."""
        while not self._stop.is_set():
            try:
                return await call()
            except DatabaseError:
                await asyncio.sleep(_RETRY_DELAY)
        return None

    def _dispatcher(self, name: str, terms: Terms) -> Callable[[Event], Awaitable[None]]:
        note = self._notes.note

        async def dispatch(event: Event) -> None:
            serial = self._note_dispatch(name, terms, event)
            await self._take_time(terms)
            fails = failures(name, terms, event.id)
            if fails == REJECTED or event.attempt <= fails:
                note("failed", serial)
                raise Reject("as planned") if fails == REJECTED else RuntimeError("as planned")
            # Before it returns, so that every settled event is noted.
            note("handled", serial)

        return dispatch

    def _transactor(
        self, name: str, terms: Terms, effect: Effect
    ) -> Callable[[Event | list[Event], Connection], Awaitable[None]]:
        """Handles an event or a batch in a transaction. A fault may come before, amid and after the effect."""

        async def transact(work: Event | list[Event], connection: Connection) -> None:
            events = work if isinstance(work, list) else [work]
            serials = [self._note_dispatch(name, terms, event) for event in events]
            await self._take_time(terms)
            ending = "failed"
            try:
                await effect(self._schema, name, terms, events, connection)
                await self._take_time(terms)
                ending = "handled"
            finally:
                for serial in serials:
                    self._notes.note(ending, serial)

        return transact

    def _note_dispatch(self, name: str, terms: Terms, event: Event) -> int:
        serial = next(self._serial)
        shard = event.key_hash % terms.shards if terms.shards > 1 else 0
        epoch = self._epochs.get((name, shard), 0)
        self._notes.note("dispatch", serial, name, shard, epoch, event.position, event.attempt, event.id)
        return serial

    async def _take_time(self, terms: Terms) -> None:
        draw = self._random.random
        await asyncio.sleep(draw() * (terms.long if draw() < 0.01 else terms.delay))

    def _observe(self, name: str, fields: Mapping[str, object]) -> None:
        match name:
            case "lease claimed":
                subscription, shard, epoch = str(fields["subscription"]), fields["shard"], fields["epoch"]
                assert isinstance(shard, int)  # noqa: S101 - for the type checker
                assert isinstance(epoch, int)  # noqa: S101
                self._epochs[subscription, shard] = epoch
                self._notes.note("claim", subscription, shard, epoch)
            case "lease lost" | "lease released":
                self._notes.note(name.removeprefix("lease "), fields["subscription"], fields["shard"])
            case "transaction without effect":
                self._notes.note("doubt")
            case "presence lost" | "incarnation changed":
                self._notes.note(name.partition(" ")[0])
            case _:
                pass


async def read_commands() -> asyncio.StreamReader:
    """Standard input, for reading without blocking the event loop."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def main() -> None:
    """Work as the first line says, until told to end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    commands = await read_commands()
    job: dict[str, Any] = json.loads(await commands.readline())
    await _Worker(_Job(**job)).run(commands)


if __name__ == "__main__":
    asyncio.run(main())
