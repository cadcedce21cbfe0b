"""The promises that a run is checked against, and the result."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

SECOND = 10**9
NEVER = 1 << 62
"""A time later than every other."""
_EVIDENCE = 5
"""Lines of evidence that are kept for each promise."""

LOST = "nothing acknowledged is lost"
SEEN = "handlers see only what is in the log, and nothing older than their subscription"
ONCE = "each event is in the log once; what was refused or rolled back is not"
REPEATS = "an event is repeated only after a fault, and never once it is settled"
COMMITS = "a former owner commits nothing"
OWNER = "a shard has one owner"
KEYS = "the events of a key are handled one after another, in log order"
STRICT = "strict order is strict"
ATTEMPTS = "an attempt counts only if it failed, or may have killed its process"
LETTERS = "dead letters are exactly those that must be"
REST = "everything comes to rest"
EFFECTS = "each event of a transactional subscription takes effect once, and nothing else does"
MOMENTS = "at no moment is a transaction there in part, and the offset agrees with the effects"
BALANCES = "balances are what the transfers make of them, and none is negative"
PAIRS = "no order is without its event, and no event without its order"
RULES = (LOST, SEEN, ONCE, REPEATS, COMMITS, OWNER, KEYS, STRICT, ATTEMPTS, LETTERS, REST)
"""The rules of the plan "log"."""
BANK_RULES = (LOST, ONCE, EFFECTS, BALANCES, MOMENTS, COMMITS, KEYS, LETTERS, REST)
ORDER_RULES = (LOST, SEEN, ONCE, PAIRS, EFFECTS, MOMENTS, COMMITS, KEYS, LETTERS, REST)

Outcome = Literal["kept", "broken", "not judged"]


@dataclass(frozen=True, slots=True)
class Cause:
    """An explanation why a process lost a lease, or could not report."""

    kind: str
    since: int
    """When it began."""
    planned: bool = True
    """False if the machine itself stood still."""


@dataclass(slots=True)
class Ruling:
    """One promise, and the findings against it."""

    checked: int = 0
    """How many facts were checked."""
    violations: int = 0
    unjudged: int = 0
    """Findings that only a stall of the machine explains."""
    evidence: list[str] = field(default_factory=list)
    """The first findings."""

    def violated(self, finding: str) -> None:
        """The promise is broken."""
        self.violations += 1
        self._note(finding)

    def is_explained(self, cause: Cause | None, finding: str) -> bool:
        """Whether the plan explains a finding. Otherwise the promise is broken, or cannot be judged."""
        if cause is None:
            self.violated(finding)
        elif not cause.planned:
            self.unjudged += 1
            self._note(f"not judged, after a {cause.kind}: {finding}")
        else:
            return True
        return False

    def _note(self, finding: str) -> None:
        if len(self.evidence) < _EVIDENCE:
            self.evidence.append(finding)


@dataclass(slots=True)
class Tally:
    """The figures of one subscription."""

    handled: int = 0
    """Different events."""
    dispatches: int = 0
    retries: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    """By cause."""
    late: int = 0
    """Late events: first dispatches behind later events of their key."""
    letters: int = 0
    longest_gap: int = 0
    """Nanoseconds between two dispatches, while events were produced."""
    last_at: int = -1


@dataclass(slots=True)
class Overlaps:
    """Dispatches of a former owner while another process owned the shard. All of them are allowed."""

    finished: int = 0
    """Started before, and ended after the takeover."""
    about_to_start: int = 0
    """Just about to start when the process was stopped, or heard that its connection was gone."""
    unaware: int = 0
    """Started before the process heard that its connection was gone."""


@dataclass(slots=True)
class Verdict:
    """The rulings, and the figures of the run."""

    rulings: dict[str, Ruling] = field(default_factory=lambda: {rule: Ruling() for rule in RULES})
    """By the rules of the plan."""
    void: list[str] = field(default_factory=list)
    """Why the times of this run cannot be trusted."""
    stalls: list[str] = field(default_factory=list)
    """When the machine stood still."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    """How many events were acknowledged, refused, rolled back, uncertain."""
    uncertain_stored: int = 0
    stored: int = 0
    commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """How many of each kind there were, and how many were skipped."""
    takeovers: "array[int]" = field(default_factory=lambda: array("q"))
    """Nanoseconds from a fault until another process owned the shard."""
    overlaps: Overlaps = field(default_factory=Overlaps)
    counted: Counter[str] = field(default_factory=Counter)
    """Attempts that count though nobody saw them end, by cause."""
    unplanned: Counter[str] = field(default_factory=Counter)
    """Lost connections and silences of workers without a fault. They excuse nothing."""
    doubts: int = 0
    """Transactions whose COMMIT was not answered, or whose lease was lost."""
    table: list[tuple[str, ...]] = field(default_factory=list)
    """Figures of the application, with a first row of headings."""

    @classmethod
    def by(cls, rules: Iterable[str]) -> "Verdict":
        """A verdict by other rules than those of the plan "log"."""
        return cls(rulings={rule: Ruling() for rule in rules})

    @property
    def outcome(self) -> Outcome:
        """Broken if any promise is. Not judged if a finding cannot be, or if the times cannot be trusted."""
        rulings = self.rulings.values()
        if any(ruling.violations for ruling in rulings):
            return "broken"
        return "not judged" if self.void or any(ruling.unjudged for ruling in rulings) else "kept"

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return self.outcome == "kept"
