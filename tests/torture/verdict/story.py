"""A made-up run, told step by step. Everything goes well unless it is told otherwise."""

from pgbackend.torture.audit import Change, FinalState, Letter, Offset, Start, Stored
from pgbackend.torture.load import Terms
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.judge import Records, judge
from pgbackend.torture.verdict.rulings import RULES, SECOND, Verdict

PLAIN = Terms(order="none", shards=1, concurrency=4, delay=0)
KEYED = Terms(order="key", shards=1, concurrency=4, delay=0)
STRICT = Terms(order="strict", shards=1, concurrency=1, delay=0)


class Story:
    """One subscription with one shard, one producer, and two workers in the places w1 and w2."""

    def __init__(self, terms: Terms = PLAIN, name: str = "a") -> None:
        self.terms, self.name = terms, name
        self.now = 100 * SECOND
        self.life = 0
        self.produced: list[Note] = []
        self.log: list[Stored] = []
        self.changes: list[Change] = []
        self.starts: list[Start] = []
        self.faults: list[Note] = []
        self.notes: list[Note] = []
        self.letters: list[Letter] = []
        self.failures: list[str] = []
        self.unsettled: list[str] = []
        self.clock_moved = 0.0
        self.owner: str | None = None
        self.position = 0
        self.pending = "{}"
        self.epoch = 0
        self.serial = 0
        self.processes: dict[str, str] = {}
        self.silent: frozenset[str] = frozenset()
        self.attempt: dict[int, tuple[int, str | None]] = {}
        """By position: the rows of `redeliveries`, as attempts that count and the worker that has started another."""
        self.chaos("begin")
        self.chaos("created", name)
        self.start("w1")
        self.start("w2")

    # Time and notes.

    def wait(self, seconds: float) -> None:
        """Time passes, and the workers' event loops run."""
        until = self.now + round(seconds * SECOND)
        while self.now + SECOND // 2 < until:
            self.now += SECOND // 2
            for place in self.processes:
                if place not in self.silent:
                    self.note(place, "tick")
        self.now = until

    def note(self, place: str, kind: str, *fields: object) -> None:
        self.now += 1
        self.notes.append(Note(self.now, place, kind, [str(field) for field in fields]))

    def start(self, place: str) -> None:
        """A process starts in a place."""
        name, _, generation = self.processes.get(place, f"{place}.0").partition(".")
        self.processes[place] = f"{name}.{int(generation) + 1}"
        self.note(place, "start", self.processes[place], 1)

    # Faults.

    def chaos(self, kind: str, *fields: object) -> None:
        self.now += 1
        self.faults.append(Note(self.now, "chaos", kind, [str(field) for field in fields]))

    def fault(self, kind: str, place: str) -> None:
        """A fault of the process in a place begins or ends."""
        self.chaos(kind, self.processes[place])

    def kill(self, place: str) -> None:
        """Kill the process in a place, and start another one there."""
        self.fault("kill", place)
        self.start(place)

    def restart_server(self, mode: str = "kill", seconds: float = 1.0) -> None:
        """The server goes down and comes back."""
        self.chaos("server", mode)
        self.wait(seconds)
        self.life = self.now
        self.chaos("server", "back")

    def stall_machine(self, seconds: float) -> None:
        """The machine stands still."""
        since = self.now
        self.now += round(seconds * SECOND)
        self.faults.append(Note(self.now, "machine", "stall", ["processor", str(since), str(self.now)]))

    # The log.

    def send(self, number: int, *, first: int | None = None) -> None:
        """Send an event, or insert it in the transaction that began with event `first`."""
        self.now += 1
        kind, fields = ("sent", [number]) if first is None else ("inserted", [number, first])
        self.produced.append(Note(self.now, "p", kind, [str(field) for field in fields]))

    def outcome(self, kind: str, *numbers: int) -> None:
        self.now += 1
        self.produced.append(Note(self.now, "p", kind, [str(number) for number in numbers]))

    def store(self, number: int, position: int, lane: str = "-") -> None:
        self.log.append(Stored(position, f"p-{number}", lane))

    def produce(self, *numbers: int, lane: str = "-") -> None:
        """These are acknowledged, each at the position of its number."""
        for number in numbers:
            self.send(number)
            self.outcome("acknowledged", number)
            self.store(number, number, lane)

    # Leases and commits.

    def claim(self, place: str, *, position: int | None = None, pending: str = "{}") -> int:
        """A worker claims the shard, as it stands or at another position. Returns the epoch."""
        before, self.epoch = self.epoch, self.epoch + 1
        self.position = self.position if position is None else position
        self._change(place, before, self.position, pending, place)
        return self.epoch

    def commit(self, place: str, position: int, pending: str = "{}", *, process: str | None = None) -> None:
        before, self.position = self.position, position
        self._change(place, self.epoch, before, pending, place, process=process)

    def release(self, place: str) -> None:
        self._change(place, self.epoch, self.position, "{}", None)

    def _change(
        self, place: str, epoch: int, position: int, pending: str, owner: str | None, *, process: str | None = None
    ) -> None:
        self.now += 1
        made_by = process or self.processes[place]
        self.changes.append(
            Change(
                self.name, 0, epoch, self.epoch, owner, position, self.position, pending, made_by, self.now, self.life
            )
        )

    # Dispatches.

    def dispatch(self, place: str, position: int, *, attempt: int = 1, epoch: int | None = None, id_: str = "") -> int:
        """A dispatch starts. Returns its serial number."""
        self.serial += 1
        id_ = id_ or next((stored.id for stored in self.log if stored.position == position), "p-?")
        self.note(place, "dispatch", self.serial, self.name, 0, epoch or self.epoch, position, attempt, id_)
        return self.serial

    def handled(self, place: str, serial: int) -> None:
        self.note(place, "handled", serial)

    def failed(self, place: str, serial: int) -> None:
        self.note(place, "failed", serial)

    def handle(self, place: str, *positions: int, attempt: int = 1, epoch: int | None = None) -> None:
        for position in positions:
            self.handled(place, self.dispatch(place, position, attempt=attempt, epoch=epoch))

    def fail(self, place: str, position: int, *, attempt: int = 1) -> None:
        self.failed(place, self.dispatch(place, position, attempt=attempt))

    # Attempts that have started, as the server records them.

    def record(self, place: str, position: int, attempt: int | None, started: str | None) -> None:
        """The process in a place changes the row of an event, or deletes it."""
        self.now += 1
        before: tuple[int | None, str | None] = self.attempt.pop(position, (None, None))
        if attempt is not None:
            self.attempt[position] = (attempt, started)
        if before[1] is not None or started is not None:
            attempt_before, started_before = before
            self.starts.append(
                Start(
                    self.name, position, attempt_before, started_before, attempt, started, self.processes[place],
                    self.now, self.life,
                )
            )  # fmt: skip

    def start_attempt(self, place: str, position: int, *, attempt: int = 1) -> int:
        """A worker dispatches an event with care. Returns the serial number of the dispatch."""
        self.record(place, position, attempt - 1, f"worker of {self.processes[place]} in life {self.life}")
        return self.dispatch(place, position, attempt=attempt)

    def report_survival(self, place: str, position: int) -> None:
        """The process in a place reports that it outlived the attempt."""
        attempt, started = self.attempt[position]
        assert started is not None
        self.record(place, position, attempt, None)

    # The verdict.

    def records(self) -> Records:
        head = max((stored.position for stored in self.log), default=0)
        return Records(
            produced=self.produced,
            log=sorted(self.log),
            changes=self.changes,
            starts=self.starts,
            faults=sorted(self.faults),
            notes=self.notes,
            state=FinalState(
                offsets=[Offset(self.name, 0, max(head, self.position), self.pending, self.epoch, self.owner)],
                letters=self.letters,
                unsettled=self.unsettled,
                failures=self.failures,
                clock_moved=self.clock_moved,
            ),
            subscriptions={self.name: self.terms},
        )

    def verdict(self) -> Verdict:
        return judge(self.records())

    def broken(self) -> list[str]:
        """The promises that were broken."""
        return broken(self.verdict())

    def unjudged(self) -> list[str]:
        """The promises that cannot be judged."""
        judged = self.verdict()
        return [rule for rule in RULES if judged.rulings[rule].unjudged]


def broken(judged: Verdict) -> list[str]:
    """The promises that a verdict calls broken."""
    return [rule for rule, ruling in judged.rulings.items() if ruling.violations]
