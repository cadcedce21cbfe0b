"""Carries the plan out: starts every process in its place behind its proxy, and injects every fault at its time.

A fault is noted before it begins, and its end before it is undone, so that all its effects lie between the two. A fault
is skipped, and noted as skipped, if an earlier one at the same target is not over: the plan follows from the seed, but
how long a process takes to end, or PostgreSQL to come back, depends on the machine.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import TracebackType
from typing import Self

import asyncpg

from pgbackend.backend import Backend
from pgbackend.errors import ConnectionLostError, PgBackendError
from pgbackend.postgres.dsn import build_dsn, parse_dsn
from pgbackend.torture import machine
from pgbackend.torture.applications import APPLICATIONS
from pgbackend.torture.audit import Audit
from pgbackend.torture.plan import DOWN, Plan, Step
from pgbackend.torture.processes import Child
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.records import Notes
from pgbackend.torture.server import Mode, Restartable

PLACE = "chaos"
PROGRAMS = {"worker": "pgbackend.torture.worker", "producer": "pgbackend.torture.producer"}
"""The programs of the processes: modules, or files. A test may replace the worker by a broken one."""
_END_TIMEOUT = 90.0
"""Seconds in which a process that is told to end must end: more than `drain_timeout` and what follows it."""
_START_TIMEOUT = 120.0


class _Place:
    """A place for one process at a time, such as `worker-1`. Its proxy outlives them."""

    def __init__(self, name: str, dsn: str) -> None:
        self.name = name
        self.proxy = Proxy(dsn)
        self.child: Child | None = None
        self.generation = 0

    @property
    def process(self) -> str:
        """The name of the process that is there now. Its connections have it as their application name."""
        return f"{self.name}.{self.generation}"


class Chaos:
    """The processes of a run. Their proxies run while it is entered; nothing of it runs afterwards."""

    def __init__(
        self, plan: Plan, *, dsn: str, schema: str, directory: Path, server: Restartable | None, audit: Audit
    ) -> None:
        """`server`: the one to restart, if the plan has restarts. `directory`: for the notes."""
        self._plan = plan
        self._dsn = dsn
        self._schema = schema
        self._directory = directory
        self._server = server
        self._audit = audit
        self._notes = Notes(directory, PLACE)
        self._terms = APPLICATIONS[plan.name].subscriptions
        self._subscriptions = [name for name, terms in self._terms.items() if not terms.midway]
        self._proxies = AsyncExitStack()
        self._places = {name: _Place(name, dsn) for name in (*plan.workers, *plan.producers)}
        self._children: list[Child] = []
        self.failures: list[str] = []
        """Processes that ended without being told to, or otherwise than told."""

    async def __aenter__(self) -> Self:
        for place in self._places.values():
            await self._proxies.enter_async_context(place.proxy)
        await self._watch_machine()
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

    # The steps of a run, in order.

    async def create_subscriptions(self, names: Sequence[str]) -> None:
        """These subscriptions exist. Notes for each when it was asked for, and when it existed."""
        backend = Backend(self._dsn, schema=self._schema)
        for name in names:
            terms = self._terms[name]
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

    async def start_processes(self, names: Sequence[str]) -> None:
        """Each of these places has a process that works."""
        for name in names:
            await self._start(self._places[name])
        await asyncio.gather(*(self._await_ready(self._places[name]) for name in names))

    async def inject_faults(self) -> None:
        """Return once the plan is carried out and every fault is over."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._notes.note("begin")
        async with asyncio.TaskGroup() as tasks:
            lasting: dict[str, tuple[Step, asyncio.Task[None]]] = {}
            for step in self._plan.steps:
                await asyncio.sleep(began + step.at - loop.time())
                self.check_processes()
                lasting = {target: entry for target, entry in lasting.items() if not entry[1].done()}
                down = sum(other.kind in DOWN for other, _ in lasting.values())
                if step.target in lasting or (step.kind in DOWN and down >= len(self._plan.workers) - 1):
                    # On a slow machine faults last longer than planned. Keep one worker up in any case.
                    self._notes.note("skipped", step.target)
                else:
                    lasting[step.target] = (step, tasks.create_task(self._inject(step), name=str(step)))
            await asyncio.sleep(began + self._plan.seconds - loop.time())
        self._notes.note("over")

    async def end_processes(self, names: Sequence[str]) -> None:
        """The processes of these places have ended as told. Those that did not are among the failures."""
        self.check_processes()
        for name in names:
            self._notes.note("leave", self._places[name].process)
        await asyncio.gather(*(self._end(self._places[name], SIGTERM) for name in names))

    def check_processes(self) -> None:
        """Processes that ended without being told to are among the failures."""
        for place in self._places.values():
            if place.child is not None and place.child.returncode is not None:
                self.failures.append(f"{place.process} ended by itself with status {place.child.returncode}")
                place.child = None

    # Faults.

    async def _inject(self, step: Step) -> None:
        if step.kind == "subscribe":
            await self._subscribe_midway()
        elif step.kind in ("server fast", "server immediate", "server kill", "server failover"):
            await self._restart_server(step.kind.split()[1])  # type: ignore[arg-type] # one of the four
        else:
            await self._inject_in_place(step, self._places[step.target])

    async def _inject_in_place(self, step: Step, place: _Place) -> None:
        note, child, proxy, process = self._notes.note, place.child, place.proxy, place.process
        match step.kind:
            case "kill" | "leave":
                note(step.kind, process)
                await self._end(place, SIGTERM if step.kind == "leave" else SIGKILL)
                await asyncio.sleep(step.seconds)
                await self._start(place)
                # The fault lasts until then: otherwise the next one could hit the last worker that works.
                await self._await_ready(place)
            case "stop":
                if child is not None:
                    note("stop", process)
                    child.freeze()
                    await asyncio.sleep(step.seconds)
                    note("continue", process)
                    child.thaw()
            case "cut" | "stall":
                note(step.kind, process)
                proxy.cut() if step.kind == "cut" else proxy.stall()
                await asyncio.sleep(step.seconds)
                note("restore", process)
                proxy.restore()
            case "lose":
                note("lose", process)
                proxy.lose_reply_to(b"COMMIT")
                with suppress(TimeoutError):
                    await proxy.struck(step.seconds)
                note("restore", process)
                proxy.restore()
            case "terminate":
                note("terminate", process)
                # The server itself may be away.
                with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await self._audit.terminate(process, step.detail)
            case _:
                note("clock", process, step.detail)
                if child is not None:
                    child.tell({"clock": int(step.detail)})

    async def _restart_server(self, mode: Mode) -> None:
        assert self._server is not None  # noqa: S101 - the plan has restarts only then
        self._notes.note("server", mode)
        await self._server.restart(mode)
        self._notes.note("server", "back")
        await self._server.repair()

    async def _subscribe_midway(self) -> None:
        names = [name for name, terms in self._terms.items() if terms.midway]
        await self.create_subscriptions(names)
        self._subscriptions += names
        for name in self._plan.workers:
            child = self._places[name].child
            if child is not None:
                for subscription in names:
                    child.tell({"subscribe": subscription})

    # Processes.

    async def _watch_machine(self) -> None:
        """A process of its own notes when the machine stands still."""
        disk = self._directory if self._server is None else self._server.directory
        job: dict[str, object] = {"directory": str(self._directory), "disk": str(disk / "torture.disk")}
        command = [sys.executable, "-P", "-m", machine.__name__]
        child = await Child.start(command, job, errors=self._directory / f"{machine.PLACE}.stderr")
        self._children.append(child)
        await child.ready(_START_TIMEOUT)

    async def _start(self, place: _Place) -> None:
        place.generation += 1
        job: dict[str, object] = {
            "dsn": named(place.proxy.dsn, place.process),
            "plan": self._plan.name,
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
            # Created while the process started.
            for name in self._subscriptions[len(known) :]:
                place.child.tell({"subscribe": name})

    async def _await_ready(self, place: _Place) -> None:
        assert place.child is not None  # noqa: S101 - it was started
        try:
            await place.child.ready(_START_TIMEOUT)
        except TimeoutError:
            self.failures.append(f"{place.process} was not ready within {_START_TIMEOUT:g} s")
        except PgBackendError:
            self.check_processes()

    async def _end(self, place: _Place, number: Signals) -> None:
        child, place.child = place.child, None
        if child is None:
            return
        child.signal(number)
        try:
            async with asyncio.timeout(_END_TIMEOUT):
                code = await child.wait()
        except TimeoutError:
            self.failures.append(f"{place.process} did not end within {_END_TIMEOUT:g} s of SIGTERM")
            child.kill()
            code = await child.wait()
        # A process that is told to end before it handles signals ends by the signal.
        if code not in (0, -number):
            self.failures.append(f"{place.process} ended with status {code} after {number.name}")
        self._children.remove(child)


def named(dsn: str, name: str) -> str:
    """The DSN with a name for its connections."""
    return build_dsn(parse_dsn(dsn) | {"application_name": name})
