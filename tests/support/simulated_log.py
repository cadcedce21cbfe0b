"""PostgreSQL as the fence sees it, without PostgreSQL: a sequence, locks and visibility, one small step at a time.

The server's operations are taken apart. An appender locks, then draws; its commit becomes visible first, and its lock
goes later; a check reads the sequence first and the locks later. Between any two steps anything else may happen, so
that a test goes through interleavings that a real server shows once in a million.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from pgbackend.codec.event import Event
from pgbackend.log.fence import AppenderClock, Evidence
from pgbackend.log.log import Extent, Log
from pgbackend.log.pages import Page
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Reader
from tests.support.events import log_row

HOLE_WAIT = 2.0


@dataclass(eq=False)
class Appender:
    """A transaction that appends."""

    name: str
    locked: bool = False
    positions: list[int] = field(default_factory=list)
    savepoint: int | None = None
    """How many positions it had drawn by then."""
    over: bool = False
    """Committed or rolled back; the lock may still be held."""


class Step:
    """Awaited where something else may happen: the test that drives the coroutine decides what."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class SimulatedLog:
    """The server, and `Log` as readers know it."""

    def __init__(self, *, page: int = 3, step: Callable[[], Any] = Step) -> None:
        self.database = None  # nothing waits for it to come back
        self.pages = self
        self.now = 0.0
        self.head = 0
        self.visible: dict[int, Appender] = {}
        self.transactions: list[Appender] = []
        self.clock = _SimulatedClock(self)
        self._names = 0
        self._page = page
        self._step = step

    # Steps of appenders.

    def open_appender(self, positions: int = 1) -> Appender:
        """An appender that has the lock and has drawn so many positions."""
        appender = self.begin()
        appender.locked = True
        for _ in range(positions):
            self.draw(appender)
        return appender

    def append(self) -> None:
        """One event, committed by an appender that is gone."""
        self.commit_and_unlock(self.open_appender())

    def commit_and_unlock(self, appender: Appender) -> None:
        self.commit(appender)
        self.unlock(appender)

    def begin(self) -> Appender:
        appender = Appender(self._name("3/"))
        self.transactions.append(appender)
        return appender

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def act(self, number: int, action: int) -> None:
        """Let one of the appenders take the step that it can take next."""
        if not self.transactions or action == 0:
            self.begin()
            return
        appender = self.transactions[number % len(self.transactions)]
        if appender.over:
            self.unlock(appender)
        elif not appender.locked:
            appender.locked = True
        elif action in (1, 2, 3) or not appender.positions:
            self.draw(appender)
        elif action == 4:
            appender.savepoint = len(appender.positions)
        elif action == 5 and appender.savepoint is not None:
            del appender.positions[appender.savepoint :]
            appender.savepoint = None
        elif action == 6:
            appender.name = self._name("-1/")
        elif action == 7:
            self.roll_back(appender)
        else:
            self.commit(appender)

    def draw(self, appender: Appender) -> int:
        assert appender.locked
        assert not appender.over
        if appender.name.startswith("-1/"):
            self.commit(appender)  # nothing more can be inserted
            return 0
        self.head += 1
        appender.positions.append(self.head)
        return self.head

    def commit(self, appender: Appender) -> None:
        self.visible.update(dict.fromkeys(appender.positions, appender))
        appender.over = True

    def roll_back(self, appender: Appender) -> None:
        appender.over = True

    def unlock(self, appender: Appender) -> None:
        assert appender.over
        appender.locked = False
        self.transactions.remove(appender)

    def settle_down(self) -> None:
        """End every appender. Every other one commits."""
        for number, appender in enumerate(list(self.transactions)):
            if not appender.over:
                (self.commit if number % 2 else self.roll_back)(appender)
            self.unlock(appender)

    # Calls of readers.

    def open_now(self) -> frozenset[str]:
        return frozenset(appender.name for appender in self.transactions if appender.locked)

    async def check(self) -> Evidence:
        upto = self.head
        await self._step()
        appenders = self.open_now()
        self.clock.observe(appenders, now=self.now)
        await self._step()
        return Evidence(upto, appenders, None)

    async def find_segments(self) -> Extent:
        return Extent(segments=[(0, 1 << 62)], unused=[])

    async def read(self, *, after: int, holes: RangeSet, page: bool = True, hashes: bool = True) -> Page:
        await self._step()
        late = [position for position in sorted(self.visible) if position in holes][: self._page]
        above = [position for position in sorted(self.visible) if position > after][: self._page] if page else []
        if len(late) >= self._page:
            above = []
        await self._step()
        return Page(_events(late, hashes), _events(above, hashes), len(late) >= self._page or len(above) >= self._page)

    async def appenders(self) -> tuple[str, ...]:
        return tuple(sorted(self.open_now()))

    def reader(self, *, after: int = 0, holes: Iterable[tuple[int, int]] = (), strict: bool = False) -> Reader:
        return Reader(cast("Log", self), after=after, holes=holes, strict=strict)


class _SimulatedClock(AppenderClock):
    """Goes by the log's own time."""

    def __init__(self, log: SimulatedLog) -> None:
        super().__init__(hole_wait=HOLE_WAIT)
        self._log = log

    def is_overdue(self, appender: str, *, now: float) -> bool:  # noqa: ARG002 - the machine's time does not count here
        return super().is_overdue(appender, now=self._log.now)


def _events(positions: Iterable[int], hashes: bool) -> list[Event]:
    return [Event(log_row(position, key_hash=1 if hashes else None)) for position in positions]


class Account:
    """A subscription's view of a reader's batches, and checks of what it may rely on."""

    def __init__(self, log: SimulatedLog, *, position: int = 0, strict: bool = False) -> None:
        self.log = log
        self.position = position
        self.strict = strict
        self.holes = RangeSet()
        self.seen: list[int] = []
        self._settled = RangeSet()

    def take(
        self, positions: Iterable[int], opened: Iterable[tuple[int, int]], closed: Iterable[tuple[int, int]], upto: int
    ) -> None:
        """Apply a batch as a shard does."""
        for lower, upper in opened:
            self.holes.add(max(lower, self.position + 1), upper)
        for position in positions:
            if position <= self.position and position not in self.holes:
                continue
            assert position not in self.seen, f"{position} came twice"
            if self.strict and self.seen:
                assert position > self.seen[-1], f"{position} came after {self.seen[-1]}"
            own = self.log.visible[position].positions
            assert all(later not in self.seen for later in own if later > position), (
                f"{position} came after later ones of its own"
            )
            self.seen.append(position)
            if not self.holes.discard(position):
                self.position = position
        for lower, upper in closed:
            self.holes.remove(lower, upper)
        self.position = max(self.position, upto)

    def verify(self) -> None:
        """Every committed event has come, and every other position is known to be dead."""
        assert sorted(self.seen) == sorted(self.log.visible), "lost, or never committed"
        assert not self.holes
        assert self.position >= max(self.log.visible, default=0)
