"""The supervisor of `serve --workers`: several broker processes on one port.

It binds the ports, starts the processes and replaces those that die; it handles no event itself. Each process is a
whole broker on the shared sockets, and leases decide which of them delivers what. Any process answers at the admin
port, for all. The promise: while one process lives, no client is refused; a restart refuses no client and loses no
request; if the supervisor is killed, its processes drain and end.

    starting ─▶ listening ─▶ draining ─▶ ended
                    │            (after SIGTERM; on SIGHUP, once the successor listens)
                    ▼
                  died ─▶ replaced, after a delay

- Processes are spawned, not forked: a fork would inherit an event loop.
- Options travel through a pipe, because every user of the machine can read a command line. A second pipe reports that
  the process listens, or why it cannot.
- All processes accept from one socket. With SO_REUSEPORT each would have its own queue, and connections would wait
  there for a process that is frozen or dead. The first process to wake up accepts: spreading the connections evenly
  was measured with 2, 8 and 64 of them and made no difference to the throughput of two processes.
"""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from pgbackend import facts
from pgbackend.errors import ConfigError, PgBackendError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve import app
from pgbackend.serve.config.load import can_be_read_once
from pgbackend.serve.ingest.ports import Ports
from pgbackend.serve.operations import collectors, logs, metrics_directory
from pgbackend.serve.options import Options
from pgbackend.serve.process import Signals, handling_signals

DRAIN_TIMEOUT = 56.0
"""Seconds that a process may take to drain: 3 for requests that arrive, 11 to commit and answer them, 35 for
deliveries, 5 to export the last traces."""
_STEADY = 60.0
"""A process that lived for this many seconds is replaced without the delay of earlier deaths."""
_MERGE_RETRY = 0.1
"""Seconds between attempts to merge the counts of an ended process while another process reads them."""
_MERGE_ATTEMPTS = 20
"""Attempts after which the supervisor logs that merging has to wait."""

_spawn = multiprocessing.get_context("spawn")


async def supervise(options: Options, *, say: Callable[[str], None]) -> None:
    """Serve with `options.workers` processes; return after a SIGTERM or SIGINT, once all have drained.

    SIGHUP restarts the processes one by one. Otherwise as `app.serve`. Raises PgBackendError if a process cannot start,
    before anything is announced, or if a process did not drain.
    """
    if options.config is not None and can_be_read_once(options.config):
        raise ConfigError(
            f"{options.config} can be read only once, but each broker process reads it. "
            "Give a regular file, or use --config-inline."
        )
    configuration = options.configuration()
    ports = app.bind_ports(options)
    supervisor = Supervisor(options, ports)
    with closing(ports), metrics_directory.create() as directory:
        # Before the first process starts: prometheus_client reads it when it is imported.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)

        def at_once() -> None:
            supervisor.kill()
            shutil.rmtree(directory, ignore_errors=True)

        with handling_signals(before_exit=at_once) as signals:
            if options.dsn is None:
                say(app.embedded_notice(options))
            await supervisor.run(signals, lambda: app.say_serving(options, configuration, ports, say))


class Supervisor:
    """Keeps `options.workers` broker processes running on `ports`."""

    def __init__(self, options: Options, ports: Ports) -> None:
        self._options = options
        self._ports = ports
        self._alive: set[BrokerProcess] = set()
        self._ended: asyncio.Queue[int] = asyncio.Queue()
        """Pids whose metrics are not merged yet."""

    async def run(self, signals: Signals, on_serving: Callable[[], None]) -> None:
        """Return once `signals` said stop and all processes have drained. `on_serving` is called once all listen.

        Raises PgBackendError if one of the first processes cannot start, or if a process did not drain.
        """
        try:
            await _until(signals.stop, self._keep(signals.reload, on_serving))
        finally:
            # Closed first, so that new clients are refused instead of queueing for processes that will not accept.
            self._ports.close()
            undrained = await self._drain()
        if undrained:
            raise PgBackendError(f"{undrained} of the broker processes did not drain. The log says why.")

    def kill(self) -> None:
        """Every process gets SIGKILL, whatever it is doing."""
        for process in self._alive:
            process.kill()

    async def _keep(self, reload: asyncio.Event, on_serving: Callable[[], None]) -> None:
        """Keep a process listening in every place, until cancelled. Raises PgBackendError if the first ones cannot."""
        places = await self._start_all()
        on_serving()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._merge_metrics(), name="merge metrics of ended processes")
            for place in places:
                tasks.create_task(self._keep_place(place), name="keep a broker process running")
            while True:
                await reload.wait()
                reload.clear()
                await self._restart(places)

    async def _start_all(self) -> list["_Place"]:
        try:
            async with asyncio.TaskGroup() as tasks:
                starting = [
                    tasks.create_task(self._start(), name="start a broker process")
                    for _ in range(self._options.workers)
                ]
        except* PgBackendError as errors:
            raise errors.exceptions[0] from None
        return [_Place(task.result()) for task in starting]

    async def _keep_place(self, place: "_Place") -> None:
        delay = GrowingDelay(cap=30.0)
        while True:
            await place.changes()
            async with place.changing:
                process = place.process
                if not process.exit.done():
                    continue  # a restart replaced the former one
                facts.emit(
                    "broker process died", level=logging.WARNING, pid=process.pid, exitcode=process.exit.result()
                )
                if process.age() > _STEADY:
                    delay.reset()
                place.replace(await self._replace(delay))

    async def _replace(self, delay: GrowingDelay) -> "BrokerProcess":
        while True:
            await delay.wait()
            try:
                return await self._start()
            except PgBackendError as error:
                facts.emit("broker process cannot start", level=logging.ERROR, error=str(error))

    async def _restart(self, places: list["_Place"]) -> None:
        """Replace the process of every place; each predecessor drains once its successor listens."""
        for place in places:
            async with place.changing:
                try:
                    successor = await self._start()
                except PgBackendError as error:
                    # The others would fail for the same reason, so the old processes stay.
                    facts.emit("restart abandoned", level=logging.ERROR, error=str(error))
                    return
                predecessor = place.process
                place.replace(successor)
            await self._end(predecessor)
        facts.emit("broker processes restarted", count=len(places))

    async def _start(self) -> "BrokerProcess":
        """A new process, once it listens. Raises PgBackendError if it cannot."""
        try:
            process = BrokerProcess(self._options, self._ports)
        except OSError as error:
            # The machine is out of memory, processes or files, which may pass; the other processes go on.
            raise PgBackendError(f"Cannot start a broker process: {error.strerror}.") from error
        self._alive.add(process)
        process.exit.add_done_callback(lambda _: self._forget(process))
        try:
            await process.listening()
        except PgBackendError:
            await self._end(process)
            raise
        facts.emit("broker process started", pid=process.pid)
        return process

    def _forget(self, process: "BrokerProcess") -> None:
        self._alive.discard(process)
        self._ended.put_nowait(process.pid)

    async def _merge_metrics(self) -> None:
        """Keep the counters of each ended process and drop its gauges, until cancelled."""
        while True:
            pid = await self._ended.get()
            attempts = 0
            # Reading takes milliseconds, unless the reader is frozen. Then this waits for as long as it is.
            while not _merge(pid):
                attempts += 1
                if attempts == _MERGE_ATTEMPTS:
                    facts.emit("metrics of a broker process not merged yet", level=logging.WARNING, pid=pid)
                await asyncio.sleep(_MERGE_RETRY)

    async def _drain(self) -> int:
        """Return once no process lives: how many failed to drain."""
        async with asyncio.TaskGroup() as tasks:
            ending = [tasks.create_task(self._end(process), name="drain a broker process") for process in self._alive]
        # SIGTERM kills a process that has not installed its handler yet; it had nothing to drain.
        return sum(task.result() not in (0, -signal.SIGTERM) for task in ending)

    async def _end(self, process: "BrokerProcess") -> int:
        """Its exit code, once it has drained, or was killed because it took too long."""
        process.terminate()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                return await process.ended()
        except TimeoutError:
            facts.emit("broker process killed", level=logging.ERROR, pid=process.pid, timeout=DRAIN_TIMEOUT)
            process.kill()
            return await process.ended()


class _Place:
    """One of the processes that should run."""

    def __init__(self, process: "BrokerProcess") -> None:
        self.process = process
        self.changing = asyncio.Lock()
        """Held while a successor starts."""
        self._replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def replace(self, successor: "BrokerProcess") -> None:
        """The successor runs here from now on."""
        self.process = successor
        self._replaced.set_result(None)
        self._replaced = asyncio.get_running_loop().create_future()

    async def changes(self) -> None:
        """Return once the process has ended or was replaced."""
        either: set[asyncio.Future[Any]] = {self.process.exit, self._replaced}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)


class BrokerProcess:
    """The supervisor's handle on one broker process, which runs from the handle's creation on."""

    def __init__(self, options: Options, ports: Ports) -> None:
        """Raises OSError if the system cannot start a process."""
        self._started_at = time.monotonic()
        self._reports, theirs = _spawn.Pipe(duplex=False)
        self._process = _spawn.Process(target=_main, args=(options, ports, theirs))
        # Before the mask is set: starting the tracker would reset it.
        resource_tracker.ensure_running()
        # A process starts with SIGINT blocked: a terminal sends it to all, but only the supervisor says when to stop.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()
        assert self._process.pid is not None  # noqa: S101 - it was started
        self.pid = self._process.pid
        loop = asyncio.get_running_loop()
        self.exit: asyncio.Future[int] = loop.create_future()
        """The exit code, or the negative number of the signal that killed it."""
        loop.add_reader(self._process.sentinel, self._reap)

    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    async def listening(self) -> None:
        """Return once it accepts connections. Raises PgBackendError with what it reported, or how it ended instead."""
        try:
            await _readable(self._reports.fileno())
            problem: str | None = self._reports.recv()
        except EOFError:
            problem = f"A broker process ended with exit code {await self.ended()} before it listened."
        finally:
            self._reports.close()
        if problem is not None:
            raise PgBackendError(problem)

    async def ended(self) -> int:
        """Its exit code, once it has one; the negative number of the signal that killed it."""
        return await asyncio.shield(self.exit)

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        assert self._process.exitcode is not None  # noqa: S101 - it was joined
        self.exit.set_result(self._process.exitcode)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Return once `stop` is set and `work` is cancelled. Raises the PgBackendError that `work` fails with."""
    try:
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(work, name="keep broker processes")
            stopping = tasks.create_task(stop.wait(), name="wait for a signal")
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            working.cancel()
            stopping.cancel()
    except* PgBackendError as errors:
        raise errors.exceptions[0] from None


async def _readable(file: int) -> None:
    """Return once `file` has something to read, or its other end is closed."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(file, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)


def _merge(pid: int) -> bool:
    """Whether the metrics of an ended process are dealt with; False while another process reads them."""
    try:
        collectors.merge_ended(pid)
    except BlockingIOError:
        return False
    except OSError as error:
        facts.emit("metrics of a broker process lost", level=logging.WARNING, pid=pid, error=str(error))
    return True


# In the broker process


def _main(options: Options, ports: Ports, reports: Connection) -> None:
    """The whole life of a broker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    logs.configure(options.log_format, options.log_level)
    report = _Report(reports)
    try:
        with (
            metrics_directory.hold(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(_serve(options, ports, report))
    except PgBackendError as error:
        report.failed(error)
        sys.exit(1)


class _Report:
    """Tells the supervisor, once, that the process listens or why it cannot."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def listening(self) -> None:
        self._send(None)

    def failed(self, error: PgBackendError) -> None:
        if self._connection.closed:
            facts.emit("broker process failed", level=logging.ERROR, error=str(error))
        else:
            self._send(str(error))

    def _send(self, problem: str | None) -> None:
        with suppress(OSError), self._connection:  # the supervisor may be dead
            self._connection.send(problem)


async def _serve(options: Options, ports: Ports, report: _Report) -> None:
    with _obeying_supervisor() as signals:
        await app.run(options, options.configuration(), ports, signals, report.listening)


@contextmanager
def _obeying_supervisor() -> Iterator[Signals]:
    """SIGTERM says stop, SIGHUP says reload, and so does the supervisor's death say stop."""
    signals = Signals()
    loop = asyncio.get_running_loop()
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None  # noqa: S101 - this is a broker process

    def orphaned() -> None:
        loop.remove_reader(supervisor.sentinel)
        facts.emit("supervisor died", level=logging.WARNING, pid=supervisor.pid)
        signals.stop.set()

    loop.add_signal_handler(signal.SIGTERM, signals.stop.set)
    loop.add_signal_handler(signal.SIGHUP, signals.reload.set)
    loop.add_reader(supervisor.sentinel, orphaned)
    try:
        yield signals
    finally:
        loop.remove_reader(supervisor.sentinel)
        loop.remove_signal_handler(signal.SIGHUP)
        loop.remove_signal_handler(signal.SIGTERM)
