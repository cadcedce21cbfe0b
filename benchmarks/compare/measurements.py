"""The seven measurements. Each takes a system, starts its processes on a fresh log, and returns figures.

Rates are events a second. A rate of reading counts from the first tenth of the events on, because the start-up is in
it. Latencies are milliseconds.
"""

import asyncio
import json
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.child import STEP, Job
from benchmarks.compare.processes import Child, child
from benchmarks.compare.system import PAGE, CompareError, System

TASKS = 32
PROCESSES = 4
RATE = 100.0
"""Events a second while latencies are measured."""
WARM_UP = 0.5
"""Seconds of latencies that do not count. Scales with `Subject.seconds`."""
FILL_SECONDS = 3
MOST_EVENTS = 500_000
"""A backlog is what batches store in these seconds, but so many events at most. Both scale with `Subject.seconds`."""
READ_SECONDS = 3
"""Reading ends after so many seconds, even if events are left. Scales as well."""
PATIENCE = 60.0
"""Seconds beyond those that a step should take, after which it has failed."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A system in this run."""

    name: str
    system: System
    server: str
    seconds: float
    """The length of an append measurement; the others are multiples of it."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A column of the table."""

    name: str
    title: str
    unit: str


ONE = Measurement("one", "one at a time", "events/s")
TOGETHER = Measurement("together", f"{TASKS} at once", "events/s")
BATCHES = Measurement("batches", f"batches of {PAGE:,}", "events/s")
READ_1 = Measurement("read_1", "read by 1 process", "events/s")
READ_4 = Measurement("read_4", f"read by {PROCESSES} processes", "events/s")
LATENCY_50 = Measurement("latency_p50", f"latency p50 at {RATE:g}/s", "ms")
LATENCY_99 = Measurement("latency_p99", f"latency p99 at {RATE:g}/s", "ms")
BOTH = Measurement("both", "both at once", "events/s")
MEASUREMENTS = (ONE, TOGETHER, BATCHES, READ_1, READ_4, LATENCY_50, LATENCY_99, BOTH)

BACKLOG = "backlog"
"""The name under which the size of a backlog stands among the figures."""

Figures = dict[str, float]
"""Figures by the measurement's name."""


async def appending(subject: Subject) -> AsyncIterator[Figures]:
    for measurement, tasks, batch in ((ONE, 1, 1), (TOGETHER, TASKS, 1), (BATCHES, 1, PAGE)):
        async with subject.system.fresh(subject.server, ()) as address:
            result = await _produced(subject, address, tasks=tasks, batch=batch, seconds=subject.seconds)
        yield {measurement.name: result["count"] / (result["ended"] - result["began"])}


async def reading(subject: Subject) -> AsyncIterator[Figures]:
    """Each process reads the whole log as a consumer of its own. The processes of a queue share one backlog."""
    one, four = ["reader"], [f"reader {n}" for n in range(PROCESSES)]
    if subject.system.kind == "log":
        async with subject.system.fresh(subject.server, one + four) as address:
            stored = await _fill(subject, address)
            yield {BACKLOG: stored}
            yield {READ_1.name: await _read(subject, address, one, stored)}
            yield {READ_4.name: await _read(subject, address, four, stored * PROCESSES)}
    else:
        for measurement, readers in ((READ_1, one), (READ_4, four)):
            async with subject.system.fresh(subject.server, readers) as address:
                stored = await _fill(subject, address)
                yield {BACKLOG: stored}
                yield {measurement.name: await _read(subject, address, readers, stored)}


async def latency(subject: Subject) -> AsyncIterator[Figures]:
    seconds = 3 * subject.seconds
    async with (
        subject.system.fresh(subject.server, ["reader"]) as address,
        _consuming(subject, address, ["reader"], role="time") as readers,
        child(_job(subject, address, "pace", seconds=seconds, rate=RATE)) as producer,
    ):
        await _warm_up(subject, address, readers)
        await producer.ready()
        producer.go()
        async with asyncio.timeout(seconds + PATIENCE):
            sent = int((await producer.result())["count"])
            await readers.until(PAGE + sent)
            (took,) = await readers.notes()
    counted = sorted(took[PAGE + int(WARM_UP * subject.seconds * RATE) :])
    if len(took) != PAGE + sent or not counted:
        raise CompareError(f"{sent} events were sent, and {len(took) - PAGE} were handled")
    yield {LATENCY_50.name: statistics.median(counted), LATENCY_99.name: counted[int(len(counted) * 0.99)]}


async def both(subject: Subject) -> AsyncIterator[Figures]:
    """Events handled while the producer produces, which stays near the consumer. The first tenth does not count."""
    seconds = 2 * subject.seconds
    async with (
        subject.system.fresh(subject.server, ["reader"]) as address,
        _consuming(subject, address, ["reader"]) as readers,
        child(_job(subject, address, "produce", batch=PAGE, seconds=seconds, follows=True)) as producer,
    ):
        await _warm_up(subject, address, readers)
        await producer.ready()
        readers.pass_on(producer)
        producer.go()
        async with asyncio.timeout(seconds + PATIENCE):
            result = await producer.result()
            readers.pass_on(None)
            (notes,) = await readers.notes()
    began, ended = result["began"] + 0.1 * (result["ended"] - result["began"]), result["ended"]
    yield {BOTH.name: len([at for at in notes if began < at <= ended]) * STEP / (ended - began)}


async def _warm_up(subject: Subject, address: str, readers: "_Readers") -> None:
    """The readers run and have handled a page. PostgreSQL has statistics to plan with, as it has in real use."""
    await _produced(subject, address, batch=PAGE, seconds=PATIENCE, limit=PAGE)
    await subject.system.settle(address)
    await readers.running()
    async with asyncio.timeout(PATIENCE):
        await readers.until(PAGE)


async def _produced(subject: Subject, address: str, **options: Any) -> dict[str, Any]:
    async with child(_job(subject, address, "produce", **options)) as producer:
        await producer.ready()
        producer.go()
        async with asyncio.timeout(options["seconds"] + PATIENCE):
            return await producer.result()


async def _fill(subject: Subject, address: str) -> int:
    """How many events the log has now."""
    limit = max(int(MOST_EVENTS * subject.seconds) // PAGE, 1) * PAGE
    result = await _produced(subject, address, batch=PAGE, seconds=FILL_SECONDS * subject.seconds, limit=limit)
    await subject.system.settle(address)
    return int(result["count"])


async def _read(subject: Subject, address: str, names: Sequence[str], expected: int) -> float:
    """The rate of all these readers together, until they have handled everything or the time is over."""
    seconds = READ_SECONDS * subject.seconds
    async with _consuming(subject, address, names) as readers:
        await readers.running()
        is_drained = True
        try:
            async with asyncio.timeout(seconds):
                await readers.until(expected)
        except TimeoutError:
            is_drained = False
        async with asyncio.timeout(PATIENCE):
            notes = sorted(note for one in await readers.notes() for note in one)
    if is_drained and (left := await subject.system.left(address, names)):
        raise CompareError(f"{left:,} of {expected:,} events were handled, but not acknowledged")
    counted = notes[len(notes) // 10 :]
    if len(counted) < 2:
        raise CompareError(f"{len(notes) * STEP:,} of {expected:,} events in {seconds:g} s are too few for a rate")
    return (len(counted) - 1) * STEP / (counted[-1] - counted[0])


class _Readers:
    """Consuming processes."""

    def __init__(self, children: Sequence[Child], group: asyncio.TaskGroup) -> None:
        self._children = children
        self._group = group
        self._handled = [0] * len(children)
        self._moved = asyncio.Event()
        self._producer: Child | None = None

    async def running(self) -> None:
        """All begin, as simultaneously as they can."""
        for one in self._children:
            await one.ready()
        for one in self._children:
            one.go()
        for one in self._children:
            await one.expect("running")
        self._following = [self._group.create_task(self._follow(n)) for n in range(len(self._children))]

    def pass_on(self, producer: Child | None) -> None:
        """From now on this producer knows how far the readers are."""
        self._producer = producer

    async def until(self, expected: int) -> None:
        """Return when so many events are handled."""
        while sum(self._handled) < expected:
            self._moved.clear()
            await self._moved.wait()

    async def notes(self) -> list[list[float]]:
        """The notes of each. They have ended."""
        for one in self._children:
            one.tell("stop")
        return [await following for following in self._following]

    async def _follow(self, index: int) -> list[float]:
        while not (line := await self._children[index].line()).startswith("{"):
            self._handled[index] = int(line.removeprefix("handled "))
            self._moved.set()
            if self._producer:
                self._producer.tell(line)
        notes: list[float] = json.loads(line)["notes"]
        return notes


@asynccontextmanager
async def _consuming(
    subject: Subject, address: str, names: Sequence[str], *, role: str = "consume"
) -> AsyncIterator[_Readers]:
    async with AsyncExitStack() as stack:
        jobs = [_job(subject, address, role, reader=name) for name in names]
        # They start at the same time and are awaited in `running()`.
        children = [await stack.enter_async_context(child(job)) for job in jobs]
        try:
            async with asyncio.TaskGroup() as group:
                yield _Readers(children, group)
        except* Exception as errors:  # noqa: BLE001 - raised again, without its group
            raise errors.exceptions[0] from None


def _job(subject: Subject, address: str, role: Any, **options: Any) -> Job:
    return Job(role=role, system=subject.name, address=address, **options)
