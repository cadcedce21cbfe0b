"""Several brokers on one port: the process that starts them, replaces them, and has them drain.

    place 1   starting ─▶ listening ─▶ draining ─▶ ended
                             │  ▲           └─ after SIGTERM, or when its successor listens (SIGHUP)
                             ▼  └─ a new worker, after a wait
                            died

The supervisor binds the ports and touches no event; each worker is a whole broker on the shared sockets, and leases
decide which of them delivers what. Any worker answers at the admin port, for all of them. The promise: while one worker
lives, nobody is refused; a restart refuses nobody and loses no request; when the supervisor itself is killed, its
workers drain and end.

A worker is spawned, never forked: a fork would inherit an event loop. It gets its settings through a pipe, since a
command line can be read by everybody, tells through another that it listens or why it cannot, and sees the supervisor's
end by the end of the first. All of them accept from one socket: with SO_REUSEPORT each would have a queue of its own,
in which connections wait for a worker that is frozen, or gone.
"""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from pgbackend import facts
from pgbackend.errors import ConfigError, PgBackendError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve import app
from pgbackend.serve.app import Orders, Settings
from pgbackend.serve.config.reload import says_once
from pgbackend.serve.ingest.listener import Ports, Share
from pgbackend.serve.operations import counted, logs, metrics

DRAIN_TIMEOUT = 50.0
"""Seconds that a worker may take to drain: 3 for requests that arrive, 10 to commit them, 30 for deliveries, 5 to hand
over the last traces."""
_STEADY = 60.0
"""Seconds after which a worker that died is replaced as if it were the first."""
_READ_PAUSE = 0.1
"""Seconds between tries at metrics that somebody reads just now."""
_LONG_READ = 20
"""Tries after which it is told that somebody still does."""

_spawn = multiprocessing.get_context("spawn")


async def supervise(settings: Settings, *, say: Callable[[str], None] = print) -> None:
    """As `app.serve`, with `settings.workers` processes; SIGHUP restarts them one by one.

    Raises PgBackendError, before any of them has been said to listen, with what the first said that could not.
    """
    if settings.config is not None and says_once(settings.config):
        raise ConfigError(
            f"{settings.config} can be read only once, and each worker reads it: give a file, or --config-inline."
        )
    configuration = app.configuration_of(settings)
    ports = app.bind_ports(settings)
    supervisor = Supervisor(settings, ports)
    with closing(ports), counted.new_directory() as directory:
        # Before the first worker starts: that they count together is decided when they import `metrics`.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)

        def at_once() -> None:
            supervisor.kill()
            shutil.rmtree(directory, ignore_errors=True)

        with app.obeying_signals(at_once=at_once) as orders:
            if settings.dsn is None:
                say(app.embedded_notice(settings))
            await supervisor.run(orders, lambda: app.announce(settings, configuration, ports, say))


class Supervisor:
    """Keeps `settings.workers` workers on `ports`."""

    def __init__(self, settings: Settings, ports: Ports) -> None:
        self._settings = settings
        self._ports = ports
        self._alive: set[_Worker] = set()
        # Twice as many: a worker that drains and its successor live at the same time.
        self._connections = _spawn.RawArray("i", [Share.NOBODY] * (2 * settings.workers))

    async def run(self, orders: Orders, on_serving: Callable[[], None]) -> None:
        """Return once `orders` said stop and all have drained. `on_serving` is called once all listen."""
        stopped = asyncio.create_task(orders.stop.wait(), name="wait for a signal")
        keeping = asyncio.create_task(self._keep(orders, on_serving), name="keep workers")
        await asyncio.wait({stopped, keeping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopped, keeping):
            task.cancel()
        await asyncio.wait({stopped, keeping})
        # Before the workers end: who comes from then on is refused, and does not queue for nobody.
        self._ports.close()
        undrained = await self._drain()
        if not keeping.cancelled():
            keeping.result()
        if undrained:
            raise PgBackendError(f"{undrained} of the workers did not drain. The log says why.")

    def kill(self) -> None:
        """No worker lives, whatever it was doing."""
        for worker in self._alive:
            worker.kill()

    async def _keep(self, orders: Orders, on_serving: Callable[[], None]) -> None:
        """A worker listens in every place until this is cancelled. Raises PgBackendError when the first ones cannot."""
        try:
            async with asyncio.TaskGroup() as starting:
                first = [starting.create_task(self._start()) for _ in range(self._settings.workers)]
        except* PgBackendError as errors:
            raise errors.exceptions[0] from None
        on_serving()
        places = [_Place(task.result()) for task in first]
        async with asyncio.TaskGroup() as keeping:
            for place in places:
                keeping.create_task(self._keep_place(place))
            while True:
                await orders.reload.wait()
                orders.reload.clear()
                await self._restart(places)

    async def _keep_place(self, place: "_Place") -> None:
        backoff = GrowingDelay(cap=30.0)
        while True:
            worker = place.worker
            code = await worker.ended()
            async with place.changing:
                if worker is not place.worker:
                    continue  # its successor was there first
                facts.emit("worker process died", level=logging.WARNING, pid=worker.pid, exitcode=code)
                if worker.age() > _STEADY:
                    backoff.reset()
                while worker is place.worker:
                    await backoff.wait()
                    try:
                        place.worker = await self._start()
                    except PgBackendError as error:
                        facts.emit("worker process cannot start", level=logging.ERROR, error=str(error))

    async def _restart(self, places: list["_Place"]) -> None:
        """Every place has a new worker, and its former one has drained."""
        for place in places:
            async with place.changing:
                try:
                    successor = await self._start()
                except PgBackendError as error:
                    # What keeps this one from starting would keep the others: those that run are better than none.
                    facts.emit("restart given up", level=logging.ERROR, error=str(error))
                    return
                # Only now: until it listens, its predecessor takes what comes.
                predecessor, place.worker = place.worker, successor
            await self._end(predecessor)
        facts.emit("workers restarted", count=len(places))

    async def _start(self) -> "_Worker":
        """A new worker, once it listens. Raises PgBackendError when it cannot."""
        taken = {worker.number for worker in self._alive}
        number = next(number for number in range(len(self._connections)) if number not in taken)
        try:
            worker = _Worker(self._settings, self._ports, Share(self._connections, number), number)
        except OSError as error:
            # Out of memory, processes or files. That may pass, and the other workers go on.
            raise PgBackendError(f"A worker process cannot be made: {error.strerror}.") from error
        self._alive.add(worker)
        worker.end.add_done_callback(lambda _: self._forget(worker))
        try:
            await worker.listening()
        except PgBackendError:
            await self._end(worker)
            raise
        facts.emit("worker process started", pid=worker.pid)
        return worker

    def _forget(self, worker: "_Worker") -> None:
        self._alive.discard(worker)
        # One that was killed has not said so itself: others would wait for it to take connections.
        self._connections[worker.number] = Share.NOBODY
        self._count_out(worker.pid)

    def _count_out(self, pid: int, tries: int = 1) -> None:
        """Its counts stay and its gauges go, now or as soon as nobody reads them."""
        try:
            metrics.worker_gone(pid)
        except BlockingIOError:
            # A read takes milliseconds. Who reads for longer is frozen, and may be for ever.
            if tries == _LONG_READ:
                facts.emit("worker process not counted out yet", level=logging.WARNING, pid=pid)
            asyncio.get_running_loop().call_later(_READ_PAUSE, self._count_out, pid, tries + 1)
        except OSError as error:
            facts.emit("worker process not counted out", level=logging.WARNING, pid=pid, error=str(error))

    async def _drain(self) -> int:
        """Return once no worker lives: how many did not end as they should."""
        async with asyncio.TaskGroup() as ending:
            codes = [ending.create_task(self._end(worker)) for worker in self._alive]
        # One that had not begun to obey signals had nothing to drain.
        return sum(task.result() not in (0, -signal.SIGTERM) for task in codes)

    async def _end(self, worker: "_Worker") -> int:
        """Its exit code, once it has drained, or was killed because it did not."""
        worker.terminate()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                return await worker.ended()
        except TimeoutError:
            facts.emit("worker process killed", level=logging.ERROR, pid=worker.pid, timeout=DRAIN_TIMEOUT)
            worker.kill()
            return await worker.ended()


class _Place:
    """One of the workers that there shall be."""

    def __init__(self, worker: "_Worker") -> None:
        self.worker = worker
        self.changing = asyncio.Lock()
        """Held while a successor starts."""


class _Worker:
    """The supervisor's end of one worker. It runs from the beginning."""

    def __init__(self, settings: Settings, ports: Ports, share: Share, number: int) -> None:
        self.number = number
        self._born = time.monotonic()
        self._reports, theirs = _spawn.Pipe(duplex=False)
        self._process = _spawn.Process(target=_work, args=(settings, ports, share, theirs))
        # Before the mask is set: starting the tracker takes it away.
        resource_tracker.ensure_running()
        # A worker is born deaf to the SIGINT that a terminal sends to everyone: its supervisor tells it what to do.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()
        assert self._process.pid is not None  # noqa: S101 - it was started
        self.pid = self._process.pid
        self.end = asyncio.create_task(self._join(), name=f"wait for worker process {self.pid}")

    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._born

    async def listening(self) -> None:
        """Return once it takes connections. Raises PgBackendError with what it said, or how it ended instead."""
        try:
            await _readable(self._reports.fileno())
            problem: str | None = self._reports.recv()
        except EOFError:
            problem = f"A worker process ended with exit code {await self.ended()} before it listened."
        finally:
            self._reports.close()
        if problem is not None:
            raise PgBackendError(problem)

    async def ended(self) -> int:
        """Its exit code, once it has one; the negative number of the signal that killed it."""
        return await asyncio.shield(self.end)

    def terminate(self) -> None:
        """It drains."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def _join(self) -> int:
        await _readable(self._process.sentinel)
        self._process.join()
        assert self._process.exitcode is not None  # noqa: S101 - it was joined
        return self._process.exitcode


async def _readable(file: int) -> None:
    """Return once there is something to read, or the other end is gone."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(file, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)


# In the worker


def _work(settings: Settings, ports: Ports, share: Share, reports: Connection) -> None:
    """A worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    logs.configure(settings.log_format, settings.log_level)
    reporting = _Reporting(reports)
    try:
        with (
            counted.held(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(_serve(settings, ports, share, reporting))
    except PgBackendError as error:
        reporting.problem(error)
        sys.exit(1)


class _Reporting:
    """Tells the supervisor, once, how it came out."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def listening(self) -> None:
        self._send(None)

    def problem(self, error: PgBackendError) -> None:
        if self._connection.closed:
            facts.emit("worker process failed", level=logging.ERROR, error=str(error))
        else:
            self._send(str(error))

    def _send(self, problem: str | None) -> None:
        with suppress(OSError), self._connection:  # a supervisor that is gone needs to know nothing
            self._connection.send(problem)


async def _serve(settings: Settings, ports: Ports, share: Share, reporting: _Reporting) -> None:
    with _orders() as orders:
        await app.run(settings, app.configuration_of(settings), ports, orders, reporting.listening, share=share)


@contextmanager
def _orders() -> Iterator[Orders]:
    """What the supervisor says; its end says stop."""
    orders = Orders()
    loop = asyncio.get_running_loop()
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None  # noqa: S101 - this is a worker

    def orphaned() -> None:
        loop.remove_reader(supervisor.sentinel)
        facts.emit("supervisor is gone", level=logging.WARNING, pid=supervisor.pid)
        orders.stop.set()

    loop.add_signal_handler(signal.SIGTERM, orders.stop.set)
    loop.add_signal_handler(signal.SIGHUP, orders.reload.set)
    loop.add_reader(supervisor.sentinel, orphaned)
    try:
        yield orders
    finally:
        loop.remove_reader(supervisor.sentinel)
        loop.remove_signal_handler(signal.SIGHUP)
        loop.remove_signal_handler(signal.SIGTERM)
