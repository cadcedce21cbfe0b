"""Load on real processes that are killed at random moments, and a diary that says what came of it.

Workers note when a dispatch begins and when it ends, each by one short write to one file: its order is the order of
time. Before each kill the offsets are looked up, so that it can be told afterwards whether an event was dispatched
again that had been settled durably before.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event, PgBackendError, ProduceUncertainError, Retry
from pgbackend.ranges import RangeSet
from tests.support.polling import eventually


class Line(NamedTuple):
    """One note in the diary."""

    mark: str
    """`b` a dispatch begins, `e` it ends."""
    pid: int
    subscription: str
    position: int
    attempt: int
    id: str
    key: str


class Seen(NamedTuple):
    """An offset row as it stood at a time."""

    subscription: str
    shard: int
    shards: int
    position: int
    pending: RangeSet
    notes: int
    """How many notes the diary had, at most, when the row was read."""


@dataclass
class Torture:
    """Producers in this process, workers in others. Entered, it produces."""

    dsn: str
    diary: Path
    subscriptions: Mapping[str, Mapping[str, object]]
    """Names, and options of `subscribe()`."""
    workers: int = 2
    callers: int = 8
    pause: float = 0.04
    """The longest time between two events of a caller, in seconds."""
    delay: float = 0.002
    """The longest time a dispatch takes."""
    failures: float = 0.05
    """The share of dispatches that fail, and are tried again until they do not."""
    settings: Mapping[str, object] = field(default_factory=dict)
    seed: int = 1
    acknowledged: set[str] = field(default_factory=set)
    uncertain: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    """The ids of which an error said that they are not stored."""
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._processes: list[asyncio.subprocess.Process] = []
        self._backend = Backend(self.dsn, produce_timeout=10)
        self._producing: list[asyncio.Task[None]] = []
        self._enough = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._backend.init()
        for name, options in self.subscriptions.items():
            await self._backend.subscribe(name, print, **{"start": "earliest", **options})  # type: ignore[arg-type]
        try:
            for _ in range(self.workers):
                await self._start_worker()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._producing = [
            *(asyncio.create_task(self._produce(n), name=f"caller {n}") for n in range(self.callers)),
            asyncio.create_task(self._insert_slowly(), name="slow producer"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._producing:
            task.cancel()
        await asyncio.gather(*self._producing, return_exceptions=True)
        for process in self._processes:
            await _end(process, signal.SIGKILL)
        await self._backend.stop()

    # What is done to it.

    async def kill_worker(self) -> None:
        """kill -9 to one of the workers, while others take over; then another is started."""
        await self.look()
        victim = self._processes.pop(self.chance.randrange(len(self._processes)))
        await _end(victim, signal.SIGKILL)
        await self._start_worker()

    async def look(self) -> None:
        """Remember what is settled durably by now."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows = await connection.fetch(
                "SELECT subscription, shard, shards, position, pending::text FROM pgbackend.offsets"
            )
        finally:
            await connection.close()
        # After the rows were read: what is noted from here on began after they were committed.
        notes = self.diary.read_bytes().count(b"\n")
        self.seen += [
            Seen(subscription, shard, shards, position, RangeSet.parse(pending), notes)
            for subscription, shard, shards, position, pending in map(tuple, rows)
        ]

    async def some_progress(self, events: int) -> None:
        """Return once so many more events were acknowledged."""
        goal = len(self.acknowledged) + events

        async def reached() -> bool:
            return len(self.acknowledged) >= goal

        await eventually(f"{events} more events are acknowledged", reached, 60)

    async def finish(self, timeout: float = 60.0) -> None:
        """Stop producing; return once every subscription has settled everything and the workers have left in order."""
        self._enough.set()
        async with asyncio.timeout(timeout):
            await asyncio.gather(*self._producing)
        connection = await asyncpg.connect(self.dsn)
        try:

            async def is_settled() -> bool:
                self.unsettled = await connection.fetch(
                    "SELECT subscription, shard, position, pending::text, owner FROM pgbackend.offsets"
                    " WHERE position < (SELECT max(position) FROM pgbackend.events) OR NOT isempty(pending)"
                    " OR EXISTS (SELECT FROM pgbackend.redeliveries)"
                )
                return not self.unsettled

            try:
                await eventually("everything is settled", is_settled, timeout)
            except TimeoutError as error:
                raise TimeoutError(f"not settled within {timeout} s: {self.unsettled}") from error
        finally:
            await connection.close()
        for process in self._processes:
            await _end(process, signal.SIGTERM)
            assert process.returncode == 0, "a worker did not leave in order; see its stderr"
        self._processes.clear()

    # What came of it.

    async def verdict(self) -> "Verdict":
        """Hold the diary against the log."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows = await connection.fetch("SELECT position, id, key_hash FROM pgbackend.events")
        finally:
            await connection.close()
        lines = read_diary(self.diary)
        key_hash = {row["position"]: row["key_hash"] for row in rows}
        stored = {row["id"] for row in rows}
        lost, doubled, reordered = {}, {}, {}
        for name, options in self.subscriptions.items():
            mine = [line for line in lines if line.subscription == name]
            ended = {line.id for line in mine if line.mark == "e"}
            lost[name] = sorted(stored - ended)
            counts = Counter(line.id for line in mine if line.mark == "b" and line.attempt == 1)
            doubled[name] = sum(count - 1 for count in counts.values())
            reordered[name] = _reordered(mine, str(options.get("order", "none")))
        again = [
            (line, seen)
            for seen in self.seen
            for line in lines[seen.notes :]
            # What failed is settled for the offset as soon as it is in redelivery, and comes again as another attempt.
            if line.mark == "b"
            and line.attempt == 1
            and line.subscription == seen.subscription
            and line.position <= seen.position
            and line.position not in seen.pending
            and key_hash[line.position] % seen.shards == seen.shard
        ]
        return Verdict(
            events=len(stored),
            unstored=sorted(self.acknowledged - stored),
            stored_though_refused=sorted(self.refused & stored),
            lost={name: ids for name, ids in lost.items() if ids},
            doubled=doubled,
            settled_and_dispatched_again=again,
            reordered={name: pairs for name, pairs in reordered.items() if pairs},
        )

    async def _produce(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        turn = 0
        while not self._enough.is_set():
            turn += 1
            id_ = f"{number}-{turn}"
            attributes = {"id": id_, "source": "torture", "type": "test", "partitionkey": f"key-{chance.randrange(20)}"}
            event = CloudEvent({**attributes, "datacontenttype": "text/plain"}, "x" * chance.randrange(500))
            try:
                await self._backend.produce(event)
            except ProduceUncertainError:
                self.uncertain.add(id_)
            except PgBackendError:
                self.refused.add(id_)
            else:
                self.acknowledged.add(id_)
            await asyncio.sleep(chance.random() * self.pause)

    async def _insert_slowly(self) -> None:
        """Open transactions, some of which roll back: there is always a hole somewhere."""
        chance = random.Random(self.seed)
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        turn = 0
        while not self._enough.is_set():
            turn += 1
            ids = [f"slow-{turn}-{part}" for part in range(3)]
            committing = False
            try:
                if connection is None:
                    connection = await asyncpg.connect(self.dsn)
                transaction = connection.transaction()
                await transaction.start()
                for id_ in ids:
                    await connection.execute(
                        "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, 'slow', 'test')", id_
                    )
                    await asyncio.sleep(chance.random() * 0.3)
                if chance.random() < 0.3:
                    await transaction.rollback()
                    self.refused.update(ids)
                else:
                    committing = True
                    await transaction.commit()
                    self.acknowledged.update(ids)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                (self.uncertain if committing else self.refused).update(ids)
                if connection is not None:
                    connection.terminate()
                connection = None
                await asyncio.sleep(0.05)
        if connection is not None:
            await connection.close()

    async def _start_worker(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.torture",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._processes.append(process)
        job = {
            "dsn": self.dsn,
            "diary": str(self.diary),
            "delay": self.delay,
            "failures": self.failures,
            "settings": dict(self.settings),
            "subscriptions": {name: {"start": "earliest", **options} for name, options in self.subscriptions.items()},
        }
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(job).encode() + b"\n")
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n", "the worker did not start; see its stderr"


@dataclass(frozen=True)
class Verdict:
    """What the diary says of the promises. Everything but `events` and `doubled` should be empty."""

    events: int
    unstored: list[str]
    """Acknowledged, and not in the log."""
    stored_though_refused: list[str]
    """An error said that they are not stored."""
    lost: dict[str, list[str]]
    """By subscription: in the log, and never handled to the end."""
    doubled: dict[str, int]
    """By subscription: how many first attempts were not the first of their event."""
    settled_and_dispatched_again: list[tuple[Line, Seen]]
    reordered: dict[str, list[tuple[Line, Line]]]

    def check(self) -> None:
        assert not self.unstored, "acknowledged events are not in the log"
        assert not self.stored_though_refused, "events are stored of which an error said that they are not"
        assert not self.lost, "events were not handled"
        assert not self.settled_and_dispatched_again, "settled events were dispatched again"
        assert not self.reordered, "first dispatches came against the order"


def read_diary(path: Path) -> list[Line]:
    """All notes, in the order of time."""
    lines = []
    for text in path.read_text().splitlines():
        mark, pid, subscription, position, attempt, id_, key = text.split(" ")
        lines.append(Line(mark, int(pid), subscription, int(position), int(attempt), id_, key))
    return lines


def _reordered(lines: list[Line], order: str) -> list[tuple[Line, Line]]:
    """Pairs of first dispatches of which the second has the lower position: over everything, or within a key."""
    if order == "none":
        return []
    first: dict[int, Line] = {}
    for line in lines:
        if line.mark == "b":
            first.setdefault(line.position, line)
    before: dict[str, Line] = {}
    pairs = []
    for line in first.values():
        lane = "all" if order == "strict" else line.key
        if lane == "-":
            continue
        if lane in before and before[lane].position > line.position:
            pairs.append((before[lane], line))
        before[lane] = line
    return pairs


async def _end(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        process.send_signal(number)
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    async with asyncio.timeout(60):
        await process.wait()
        # To the end, so that the pipe's transport is closed with the loop still there.
        await process.stdout.read()


async def _work(job: dict[str, Any]) -> None:
    diary = os.open(job["diary"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    pid, delay, chance = os.getpid(), job["delay"], random.Random()

    def note(mark: str, name: str, event: Event) -> None:
        key = event.key[-1] if event.key else "-"
        os.write(diary, f"{mark} {pid} {name} {event.position} {event.attempt} {event.id} {key}\n".encode())

    def dispatcher(name: str) -> Any:
        async def dispatch(event: Event) -> None:
            note("b", name, event)
            await asyncio.sleep(chance.random() * delay)
            if chance.random() < job["failures"]:
                raise RuntimeError("as it happens")
            note("e", name, event)

        return dispatch

    retry = Retry(attempts=50, delay=0.02, max_delay=0.1)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with Backend(job["dsn"], **job["settings"]) as backend:
        for name, options in job["subscriptions"].items():
            await backend.subscribe(name, dispatcher(name), retry=retry, **options)
        os.write(1, b"ready\n")
        await stopping.wait()


if __name__ == "__main__":
    asyncio.run(_work(json.loads(sys.stdin.readline())))
