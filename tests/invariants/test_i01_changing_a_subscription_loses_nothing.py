"""A subscription changes all the time under load, in two workers at once: its dispatcher, options, order and shards.

Nothing is lost, nothing is handled twice, and each order is kept while it is promised. The two backends stand for
processes with one configuration file: each reconfigures what it runs and asks for the same alteration. Dispatchers
fail, block threads, and report that their target is gone. Operators pause and resume.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event, Pause, Retry, filters
from pgbackend.facts import Recorder
from tests.support.polling import eventually

PATIENT = Retry(attempts=10_000, delay=0.01, max_delay=0.03)
SETTINGS: dict[str, Any] = {"commit_interval": 0.02, "poll_interval": 0.1, "hole_wait": 5.0}


@dataclass(frozen=True)
class Note:
    mark: str
    """`+` a dispatch begins, `-` the event was handled, `x` it was not."""
    position: int
    id: str
    key: object
    promised: str
    """The order that was promised at this moment; "" while it is being altered."""


@dataclass
class Diary:
    """The dispatches of all processes, in their order."""

    promised: str = "none"
    notes: list[Note] = field(default_factory=list)

    def note(self, mark: str, event: Event) -> None:
        self.notes.append(Note(mark, event.position, event.id, event.key, self.promised))

    def check(self, log: list[tuple[int, str]]) -> None:
        """Compare it with the log's positions and ids, except for the chaff that filters refuse."""
        at_work: set[str] = set()
        handled: set[str] = set()
        of_key: dict[object, list[int]] = defaultdict(list)
        ended: set[int] = set()
        keys = {note.position: note.key for note in self.notes}
        for position, id_ in log:
            if not id_.startswith("chaff"):
                of_key[keys.get(position)].append(position)
        behind = dict.fromkeys(of_key, 0)
        for note in self.notes:
            if note.mark == "+":
                assert note.id not in at_work, f"{note} while it is at work"
                assert note.id not in handled, f"{note} again"
                at_work.add(note.id)
                lanes = {"key": [note.key], "strict": list(of_key)}.get(note.promised, [])
                for lane in lanes:
                    positions = of_key[lane]
                    while behind[lane] < len(positions) and positions[behind[lane]] in ended:
                        behind[lane] += 1
                    first = positions[behind[lane]] if behind[lane] < len(positions) else note.position
                    assert first >= note.position, f"{note} before {first}"
                continue
            at_work.discard(note.id)
            if note.mark == "-":
                handled.add(note.id)
                ended.add(note.position)
        lost = [id_ for _, id_ in log if not id_.startswith("chaff") and id_ not in handled]
        assert not lost, f"{len(lost)} of {len(log)} were never handled, {lost[:5]} first"


class Changes:
    """Two backends, what they are told, and when."""

    def __init__(
        self, backends: list[Backend], diary: Diary, *, orders: tuple[str, ...], seed: int, counts: tuple[int, ...]
    ) -> None:
        self.backends = backends
        self.orders = orders
        self.counts = counts
        """Numbers of shards that there may be."""
        self.diary = diary
        self.chance = random.Random(seed)
        self.order = "none"
        self.end: int | datetime | None = None
        self.options: dict[str, Any] = {"retry": PATIENT, "concurrency": 8, "filter": None}
        self.dispatcher: Any = self.coroutine()
        self.produced = 0

    # The dispatchers.

    def coroutine(self, failures: float = 0.0, gone: float = 0.0) -> Callable[[Event], Any]:
        async def dispatch(event: Event) -> None:
            self.diary.note("+", event)
            try:
                await asyncio.sleep(self.chance.random() * 0.004)
                self._fail_by_chance(failures, gone)
            except BaseException:
                self.diary.note("x", event)
                raise
            self.diary.note("-", event)

        return dispatch

    def plain(self, failures: float = 0.0) -> Callable[[Event], Any]:
        def dispatch(event: Event) -> None:
            self.diary.note("+", event)
            time.sleep(self.chance.random() * 0.004)
            try:
                self._fail_by_chance(failures, 0.0)
            except BaseException:
                self.diary.note("x", event)
                raise
            self.diary.note("-", event)

        return dispatch

    def _fail_by_chance(self, failures: float, gone: float) -> None:
        drawn = self.chance.random()
        if drawn < failures:
            raise RuntimeError("as it happens")
        if drawn < failures + gone:
            raise Pause("gone")

    # The changes.

    async def one(self) -> None:
        """One change, of what runs or of what is stored."""
        chance = self.chance
        match chance.randrange(9 if len(self.counts) == 1 else 12):
            case 0:
                self.options["filter"] = chance.choice([None, filters.Exact({"type": "real"}), _not_chaff])
            case 1:
                self.dispatcher = self.coroutine(failures=chance.choice([0.0, 0.1, 0.3]))
            case 2:
                self.dispatcher = self.plain(failures=chance.choice([0.0, 0.1]))
            case 3:
                self.dispatcher = self.coroutine(gone=0.05)
            case 4:
                self.options["concurrency"] = chance.choice([1, 2, 5, 20])
            case 5 | 6:
                self.order = chance.choice(self.orders)
                await self.alter()
                return
            case 7:
                now = datetime.now(UTC)
                self.end = chance.choice(
                    [None, None, max(1, self.produced - 20), self.produced + 20, now, now + timedelta(seconds=0.1)]
                )
                await self.alter()
                return
            case 8:
                await chance.choice(self.backends).pause("s")
                await asyncio.sleep(chance.random() * 0.05)
                await chance.choice(self.backends).resume("s")
                return
            case 9 | 10 | 11:
                count = chance.choice(self.counts)
                await asyncio.gather(*(one.reshard("s", count) for one in self.backends[: chance.choice([1, 2])]))
                return
        await self.reconfigure()

    async def reconfigure(self) -> None:
        await asyncio.gather(*(one.reconfigure("s", self.dispatcher, **self.options) for one in self.backends))

    async def alter(self) -> None:
        self.diary.promised = ""
        order: Any = self.order
        await asyncio.gather(
            *(one.alter_subscription("s", order=order, end=self.end, start="latest") for one in self.backends)
        )
        self.diary.promised = self.order

    async def produce(self, number: int, enough: asyncio.Event) -> None:
        chance, turn = random.Random(number), 0
        while not enough.is_set():
            turn += 1
            kind = "chaff" if chance.random() < 0.2 else "real"
            key = f"key-{chance.randrange(6)}"
            await self.backends[number % 2].produce(
                CloudEvent({"id": f"{kind}-{number}-{turn}", "source": "s", "type": kind, "partitionkey": key}, None)
            )
            self.produced += 1
            await asyncio.sleep(chance.random() * 0.02)


def _not_chaff(event: Event) -> bool:
    return not event.id.startswith("chaff")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "counts", "orders"),
    [
        (0, (1,), ("none", "key", "strict")),
        (1, (1,), ("none", "key", "strict")),
        (2, (4,), ("none", "key")),
        (3, (1, 2, 3, 4, 8), ("none", "key")),
    ],
)
async def test_a_subscription_that_changes_every_50_ms_loses_and_repeats_nothing_and_keeps_its_order(
    database: str, seed: int, counts: tuple[int, ...], orders: tuple[str, ...], long: bool
) -> None:
    seconds = 60.0 if long else 4.0
    diary, enough = Diary(), asyncio.Event()
    async with Backend(database, **SETTINGS) as first, Backend(database, **SETTINGS) as second:
        changes = Changes([first, second], diary, orders=orders, seed=seed, counts=counts)
        for backend in changes.backends:
            await backend.subscribe("s", changes.dispatcher, start="earliest", shards=counts[0], **changes.options)
        producing = [asyncio.create_task(changes.produce(number, enough)) for number in range(4)]
        loop = asyncio.get_running_loop()
        until, count = loop.time() + seconds, 0
        with Recorder() as recorder:
            while loop.time() < until or count < 20:
                await changes.one()
                count += 1
                await asyncio.sleep(0.05)
            enough.set()
            await asyncio.gather(*producing)
            changes.dispatcher, changes.options["filter"] = changes.coroutine(), filters.Exact({"type": "real"})
            changes.end = None
            await changes.reconfigure()
            await changes.alter()

            async def is_settled() -> bool:
                (status,) = (await first.status()).subscriptions
                return not status.lag and not status.redeliveries

            await eventually("everything is settled", is_settled, 60)
            assert not recorder.all("drain timed out")
            assert not recorder.all("lease lost")
        assert [letter async for letter in first.dead_letters()] == []
    connection = await asyncpg.connect(database)
    log = [(row[0], row[1]) for row in await connection.fetch("SELECT position, id FROM pgbackend.events ORDER BY 1")]
    await connection.close()

    diary.check(log)
