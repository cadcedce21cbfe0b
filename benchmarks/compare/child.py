"""A process that produces or consumes. The runner starts it with a job and talks to it through its standard streams.

It prints `ready` once everything is imported and prepared, and begins at the line `go`. A consumer prints `running`
once it consumes and `handled N` while it does, and ends at the line `stop`. The last line is its result as JSON.
All times are of the monotonic clock, which all processes of a machine share.
"""

import asyncio
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import uvloop

from benchmarks.compare.system import PAGE, CompareError, Producer, System, body, sent_at
from benchmarks.compare.systems import load

EVENTS = 10_000
"""Different events that a producer has ready. It sends them again and again."""
LEAD = 20_000
"""How many events a producer may be ahead of the consumer while both run."""
STEP = 10
"""A consumer notes the time after so many events each."""
REPORT = 0.02
"""Seconds between two reports of a consumer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The work of a process."""

    role: Literal["produce", "pace", "consume", "time"]
    """Produce as fast as possible, or at a rate; consume and note times, or how long each event took."""
    system: str
    address: str
    reader: str = ""
    tasks: int = 1
    batch: int = 1
    seconds: float = 0.0
    limit: int = 0
    """Events at most. 0: as many as fit into the seconds."""
    rate: float = 0.0
    follows: bool = False
    """Whether the producer keeps to `LEAD`."""

    def text(self) -> str:
        return json.dumps(asdict(self))


class Parent:
    """The other end of the standard streams."""

    def __init__(self, lines: asyncio.StreamReader) -> None:
        self._lines = lines

    async def line(self) -> str:
        """The next line. Raises CompareError when the runner has gone."""
        if not (line := await self._lines.readline()):
            raise CompareError("the runner ended")
        return line.decode().strip()

    @staticmethod
    def tell(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    async def go(self) -> None:
        """Return when the measurement begins."""
        gc.collect()
        self.tell("ready")
        while await self.line() != "go":
            pass


async def produce(job: Job, system: System, parent: Parent) -> dict[str, float]:
    """Produce in `tasks` concurrent tasks until the seconds are over or the limit is reached."""
    ready = system.events([body(number) for number in range(EVENTS)])
    gc.freeze()  # a user's process would not keep these, so they must cost no garbage collection
    handled = 0
    moved = asyncio.Event()

    async def follow() -> None:
        nonlocal handled
        while True:
            handled = int((await parent.line()).removeprefix("handled "))
            moved.set()

    async with system.producer(job.address, job.tasks) as producer:
        count = 0
        if not job.limit and not job.follows:  # nobody counts these events: open all connections first
            await asyncio.gather(*(step() for step in _steps(producer, ready, job)[: job.tasks]))
        await parent.go()
        following = asyncio.create_task(follow()) if job.follows else None
        steps = itertools.cycle(_steps(producer, ready, job))
        began = time.monotonic()
        over = began + job.seconds

        async def work() -> None:
            nonlocal count
            while time.monotonic() < over and not (job.limit and count >= job.limit):
                count += job.batch
                await next(steps)()
                while job.follows and count - handled > LEAD and time.monotonic() < over:
                    moved.clear()
                    await moved.wait()

        await asyncio.gather(*(work() for _ in range(job.tasks)))
        ended = time.monotonic()
        if following:
            following.cancel()
    return {"count": count, "began": began, "ended": ended}


def _steps(producer: Producer, ready: Sequence[Any], job: Job) -> list[Callable[[], Any]]:
    def one(event: Any) -> Callable[[], Any]:
        return lambda: producer.one(event)

    def many(events: Sequence[Any]) -> Callable[[], Any]:
        return lambda: producer.many(events)

    if job.batch == 1:
        return [one(event) for event in ready]
    return [many(ready[at : at + PAGE]) for at in range(0, EVENTS, PAGE)]


async def pace(job: Job, system: System, parent: Parent) -> dict[str, float]:
    """Produce one event after the other at a rate, each with the time at which it is sent."""
    async with system.producer(job.address, 1) as producer:
        await parent.go()
        began = time.monotonic()
        for count in itertools.count():
            due = began + count / job.rate
            if due >= began + job.seconds:
                break
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            (event,) = system.events([body(count, time.monotonic())])
            await producer.one(event)
    return {"count": count, "began": began, "ended": time.monotonic()}


async def consume(job: Job, system: System, parent: Parent) -> dict[str, list[float]]:
    """Consume until the runner says stop; the time of every `STEP`th event, or the milliseconds of each."""
    notes: list[float] = []
    handled = 0

    def note_time(_: bytes) -> None:
        nonlocal handled
        handled += 1
        if not handled % STEP:
            notes.append(time.monotonic())

    def note_latency(data: bytes) -> None:
        nonlocal handled
        handled += 1
        notes.append((time.monotonic() - sent_at(data)) * 1000)

    async def report() -> None:
        told = 0
        while True:
            if told != handled:
                told = handled
                parent.tell(f"handled {told}")
            await asyncio.sleep(REPORT)

    await parent.go()
    async with system.consumer(job.address, job.reader, note_latency if job.role == "time" else note_time):
        parent.tell("running")
        reporting = asyncio.create_task(report())
        while await parent.line() != "stop":
            pass
        reporting.cancel()
    return {"notes": notes}


async def main(job: Job) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    parent = Parent(lines)
    system = load(job.system)
    roles = {"produce": produce, "pace": pace, "consume": consume, "time": consume}
    parent.tell(json.dumps(await roles[job.role](job, system, parent)))


def _first(error: BaseException) -> BaseException:
    """The first error in nested groups."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


if __name__ == "__main__":
    try:
        uvloop.run(main(Job(**json.loads(os.environ["COMPARE_JOB"]))))
    except BaseExceptionGroup as group:
        raise _first(group) from group
