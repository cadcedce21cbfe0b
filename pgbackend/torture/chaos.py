"""The plan carried out: each process in its place behind its proxy, and every blow at its time, written down.

A blow is noted before it falls, its end before it is undone, so that whatever follows from it stands behind it. One
that is due while the one before it, to the same target, is not over yet is skipped: the plan is the seed's, but how
long a process takes to end, or PostgreSQL to come back, is the machine's.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import TracebackType
from typing import Literal, Self

import asyncpg

from pgbackend.backend import Backend
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import ConnectionLostError, PgBackendError
from pgbackend.postgres.dsn import build_dsn, parse_dsn
from pgbackend.torture.evidence import Evidence
from pgbackend.torture.load import SUBSCRIPTIONS
from pgbackend.torture.plan import DOWN, Plan, Step
from pgbackend.torture.processes import Child
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.records import Notes
from pgbackend.torture.server import restart_server

PROGRAMS = {"worker": "pgbackend.torture.worker", "producer": "pgbackend.torture.producer"}
"""What processes run: modules, or files. A test may have a broken worker."""
_END_TIMEOUT = 90.0
"""Seconds in which a process that is told to end has ended: longer than `drain_timeout` and what follows it."""
_START_TIMEOUT = 120.0
_RESPITE = 3.0
"""Seconds that the server runs at least before it is restarted again."""


class _Place:
    """Where one process at a time runs: `worker-1`. Its proxy outlives them."""

    def __init__(self, name: str, dsn: str) -> None:
        self.name = name
        self.proxy = Proxy(dsn)
        self.child: Child | None = None
        self.generation = 0

    @property
    def process(self) -> str:
        """The name of the process that is there now, which its connections bear as well."""
        return f"{self.name}.{self.generation}"


class Chaos:
    """The processes of a run. Entered, their proxies stand; left, nothing of it runs any more."""

    def __init__(
        self, plan: Plan, *, dsn: str, schema: str, directory: Path, server: EmbeddedServer | None, evidence: Evidence
    ) -> None:
        """`server`: where the plan restarts it."""
        self._plan = plan
        self._dsn = dsn
        self._schema = schema
        self._directory = directory
        self._server = server
        self._evidence = evidence
        self._notes = Notes(directory, "chaos")
        self._subscriptions = [name for name, terms in SUBSCRIPTIONS.items() if not terms.midway]
        self._proxies = AsyncExitStack()
        self._places = {name: _Place(name, dsn) for name in (*plan.workers, *plan.producers)}
        self._children: list[Child] = []
        self.ended: list[str] = []
        """Processes that ended otherwise than they were told to."""

    async def __aenter__(self) -> Self:
        for place in self._places.values():
            await self._proxies.enter_async_context(place.proxy)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self._children:
            if child.returncode is None:
                child.kill()
            await child.wait()
        await self._proxies.aclose()
        self._notes.close()

    # The way of a run.

    async def create(self, names: Sequence[str]) -> None:
        """These subscriptions exist. For each it is noted when that was asked for, and when it was so."""
        backend = Backend(self._dsn, schema=self._schema)
        for name in names:
            terms = SUBSCRIPTIONS[name]
            self._notes.note("creating", name)
            while True:
                try:
                    await backend.init(migrate=False)
                    await backend.subscribe(
                        name,
                        print,
                        start="latest" if terms.midway else "earliest",
                        order=terms.order,
                        shards=terms.shards,
                    )
                    break
                except ConnectionLostError:
                    await asyncio.sleep(0.1)
            self._notes.note("created", name)
        await backend.stop()

    async def begin(self, names: Sequence[str]) -> None:
        """These places have a process that is at work."""
        for name in names:
            await self._start(self._places[name])
        await asyncio.gather(*(self._await_ready(self._places[name]) for name in names))

    async def carry_out(self) -> None:
        """Return once the plan is carried out, and every blow undone."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._notes.note("begin")
        async with asyncio.TaskGroup() as tasks:
            going: dict[str, tuple[Step, asyncio.Task[None]]] = {}
            for step in self._plan.steps:
                await asyncio.sleep(began + step.at - loop.time())
                self.look()
                going = {target: entry for target, entry in going.items() if not entry[1].done()}
                down = sum(other.kind in DOWN for other, _ in going.values())
                if step.target in going or (step.kind in DOWN and down >= len(self._plan.workers) - 1):
                    # Where everything takes long, nothing would be left otherwise but who is away.
                    self._notes.note("skipped", step.target)
                else:
                    going[step.target] = (step, tasks.create_task(self._strike(step), name=str(step)))
            await asyncio.sleep(began + self._plan.seconds - loop.time())
        self._notes.note("over")

    async def end(self, names: Sequence[str]) -> None:
        """These processes have left in order; who did not is noted."""
        self.look()
        for name in names:
            self._notes.note("leave", name)
        await asyncio.gather(*(self._end(self._places[name], SIGTERM) for name in names))

    def look(self) -> None:
        """Who has ended though nobody told it to is noted."""
        for place in self._places.values():
            if place.child is not None and place.child.returncode is not None:
                self.ended.append(f"{place.process} ended by itself with status {place.child.returncode}")
                place.child = None

    # Blows.

    async def _strike(self, step: Step) -> None:
        if step.kind == "subscribe":
            await self._subscribe_midway()
        elif step.kind in ("server fast", "server immediate", "server kill"):
            await self._restart(step.kind.split()[1])  # type: ignore[arg-type] # one of the three
        else:
            await self._strike_place(step, self._places[step.target])

    async def _strike_place(self, step: Step, place: _Place) -> None:
        note, child, proxy = self._notes.note, place.child, place.proxy
        match step.kind:
            case "kill" | "leave":
                note(step.kind, place.name)
                await self._end(place, SIGTERM if step.kind == "leave" else SIGKILL)
                await asyncio.sleep(step.seconds)
                await self._start(place)
                # Not over before: another blow would find nobody, or the last one who works.
                await self._await_ready(place)
            case "stop":
                note("stop", place.name)
                if child is not None:
                    child.freeze()
                    await asyncio.sleep(step.seconds)
                    note("continue", place.name)
                    child.thaw()
            case "cut" | "stall":
                note(step.kind, place.name)
                proxy.cut() if step.kind == "cut" else proxy.stall()
                await asyncio.sleep(step.seconds)
                note("restore", place.name)
                proxy.restore()
            case "terminate":
                note("terminate", place.name)
                # The server may be away itself.
                with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await self._evidence.terminate(place.process, step.detail)
            case _:
                note("clock", place.name, step.detail)
                if child is not None:
                    child.tell({"clock": int(step.detail)})

    async def _restart(self, mode: Literal["fast", "immediate", "kill"]) -> None:
        assert self._server is not None  # noqa: S101 - only then the plan has it
        self._notes.note("server", mode)
        await restart_server(self._server, mode)
        self._notes.note("server", "back")
        await asyncio.sleep(_RESPITE)

    async def _subscribe_midway(self) -> None:
        names = [name for name, terms in SUBSCRIPTIONS.items() if terms.midway]
        await self.create(names)
        self._subscriptions += names
        for name in self._plan.workers:
            child = self._places[name].child
            if child is not None:
                for subscription in names:
                    child.tell({"subscribe": subscription})

    # Processes.

    async def _start(self, place: _Place) -> None:
        place.generation += 1
        job: dict[str, object] = {
            "dsn": named(place.proxy.dsn, place.process),
            "schema": self._schema,
            "directory": str(self._directory),
            "place": place.name,
            "process": place.process,
        }
        known = list(self._subscriptions)
        if place.name in self._plan.workers:
            job["subscriptions"] = known
        else:
            job["seed"] = self._plan.seed
        program = PROGRAMS[place.name.partition("-")[0]]
        command = [sys.executable, "-P", str(Path(__file__).with_name("clock.py")), program]
        place.child = await Child.start(command, job, errors=self._directory / f"{place.name}.stderr")
        self._children.append(place.child)
        if place.name in self._plan.workers:
            # Created while it was being started.
            for name in self._subscriptions[len(known) :]:
                place.child.tell({"subscribe": name})

    async def _await_ready(self, place: _Place) -> None:
        assert place.child is not None  # noqa: S101 - it was started
        try:
            await place.child.ready(_START_TIMEOUT)
        except TimeoutError:
            self.ended.append(f"{place.process} was not ready within {_START_TIMEOUT:g} s")
        except PgBackendError:
            self.look()

    async def _end(self, place: _Place, number: Signals) -> None:
        child, place.child = place.child, None
        if child is None:
            return
        child.signal(number)
        try:
            async with asyncio.timeout(_END_TIMEOUT):
                code = await child.wait()
        except TimeoutError:
            self.ended.append(f"{place.process} did not end within {_END_TIMEOUT:g} s of SIGTERM")
            child.kill()
            code = await child.wait()
        # One that was told to end before it could listen ends by the signal.
        if code not in (0, -number):
            self.ended.append(f"{place.process} ended with status {code} after {number.name}")
        self._children.remove(child)


def named(dsn: str, name: str) -> str:
    """The DSN with a name for its connections."""
    return build_dsn(parse_dsn(dsn) | {"application_name": name})
