"""Rules: which attempts count, and so which events become dead letters, and with how many attempts.

An attempt counts if it failed: its handler raised. An attempt whose end nobody saw counts only if

- the plan killed its process during it, or after it and before its outcome was committed;
- or three lives of the server in a row ended during an attempt of this event: an event may be what ends them;
- or the plan kept its process from reporting that it lives: see `timeline.py`. An attempt never counts before the
  lease's time after its start is over.

The first kind must count, because the event may be what kills the process.

The server's record says which attempts started: each row of `redeliveries` in which a worker has started an attempt,
and what followed it. The rule is checked there, for each attempt that counts. Each dispatch is then checked against it:
if its number is n, attempt n - 1 must have counted. So the number of attempts of a dead letter follows exactly: all
attempts up to that number have failed or counted, and no later one has; the number is what `RETRY` allows, or else its
last attempt was rejected.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pgbackend.torture.audit import Start
from pgbackend.torture.load import REJECTED, RETRY, Terms, failures
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.progress import Dispatch, Progress
from pgbackend.torture.verdict.rulings import ATTEMPTS, LETTERS, SECOND, Cause, Verdict
from pgbackend.torture.verdict.stored import is_owed
from pgbackend.torture.verdict.timeline import AFTERMATH, TOLERANCE, Timeline

_LIVES = 3
_Key = tuple[str, int]
"""A subscription and a position."""


@dataclass(slots=True)
class _Started:
    """An attempt that a worker started."""

    process: str
    at: int
    life: int


class Attempts:
    """Checks the attempts that started against what the processes noted of them."""

    def __init__(self, progress: Mapping[str, Progress], timeline: Timeline, verdict: Verdict) -> None:
        self._progress = progress
        self._timeline = timeline
        self._verdict = verdict
        self._ruling = verdict.rulings[ATTEMPTS]
        self._processes: dict[str, str] = {}
        """The process of each worker."""
        self._started: dict[tuple[_Key, str], _Started] = {}
        """The last attempt of each event that each worker started."""
        self._ended_lives: dict[_Key, list[int]] = defaultdict(list)
        """The lives of the server that ended during an attempt of the event."""
        self._counted: dict[_Key, set[int]] = defaultdict(set)
        """Attempts that count though nobody saw them end."""
        self._later: list[Dispatch] = []
        """Dispatches whose attempt before did not fail."""

    def dispatched(self, dispatch: Dispatch) -> None:
        """Note a dispatch, in the order of time."""
        if dispatch.attempt > 1:
            self._ruling.checked += 1
            if dispatch.attempt - 1 not in self._failed(dispatch.subscription, dispatch.position):
                self._later.append(dispatch)

    def read(self, starts: Iterable[Start]) -> None:
        """Check the server's record, after all dispatches were noted."""
        for start in starts:
            if start.subscription not in self._progress:
                continue
            if start.started_before is not None:
                self._check_end(start, start.started_before)
            if start.started is not None:
                self._note_start(start, start.started)
        for dispatch in self._later:
            if dispatch.attempt - 1 not in self._counted[dispatch.subscription, dispatch.position]:
                self._ruling.violated(f"the attempt before neither failed nor counts: {dispatch}")

    def made(self, subscription: str, position: int) -> set[int]:
        """The numbers of the attempts that failed or count."""
        return self._failed(subscription, position) | self._counted.get((subscription, position), set())

    def has_failed(self, subscription: str, position: int, attempt: int) -> bool:
        return attempt in self._failed(subscription, position)

    def _note_start(self, start: Start, worker: str) -> None:
        process = self._processes.setdefault(worker, start.made_by)
        if process == start.made_by:
            # A worker that takes its own start back names the one before it again, whose start is not new.
            life = self._timeline.life(start.life)
            self._started[(start.subscription, start.position), worker] = _Started(process, start.at, life)

    def _check_end(self, start: Start, worker: str) -> None:
        """Check what followed an attempt that had started."""
        self._ruling.checked += 1
        key = (start.subscription, start.position)
        before = self._started[key, worker]
        is_own, is_same_life = start.made_by == before.process, self._timeline.life(start.life) == before.life
        lives = self._ended_lives[key]
        if not is_same_life and lives[-1:] != [before.life]:
            lives.append(before.life)
        assert start.attempt_before is not None  # noqa: S101 - the row was there
        number = start.attempt_before + 1
        # A row is deleted when its event is settled: by the worker that had started the attempt, or by a later one that
        # found that no attempt was left.
        counts = start.attempt == number if start.attempt is not None else not (is_own and is_same_life)
        what = f"attempt {number} of {key[0]} position {key[1]}, which {before.process} had started"
        if not counts:
            if not is_own and start.started != worker and self._timeline.was_killed(before.process, start.at):
                self._ruling.violated(f"{what} and was killed during, does not count for {start.made_by}")
        elif number not in self._failed(*key):
            self._counted[key].add(number)
            cause = self._find_cause(before, lives, start.at)
            if self._ruling.is_explained(
                cause,
                f"{what} at {before.at / SECOND:.6f}, counts for {start.made_by} at {start.at / SECOND:.6f}, "
                "and its process lives",
            ):
                assert cause is not None  # noqa: S101 - it explains
                self._verdict.counted[cause.kind] += 1

    def _find_cause(self, before: _Started, lives: list[int], at: int) -> Cause | None:
        """Why an attempt that had started counts, though it did not fail."""
        if self._timeline.was_killed(before.process, at):
            return Cause("kill", before.at)
        last = before.life
        if lives[-_LIVES:] == list(range(last - _LIVES + 1, last + 1)):
            return Cause("three lives of the server", before.at)
        if at - before.at < AFTERMATH - TOLERANCE:
            return None
        return self._timeline.find_cause_of_silence(before.process, at)

    def _failed(self, subscription: str, position: int) -> set[int]:
        progress = self._progress.get(subscription)
        return progress.failed_attempts(position) if progress is not None and position in progress else set()


def check_letters(
    name: str,
    terms: Terms,
    events: Events,
    attempts: Attempts,
    letters: Mapping[str, int],
    timeline: Timeline,
    verdict: Verdict,
) -> None:
    """Check that the subscription has the dead letters that it must have, with their attempts, and no other."""
    ruling, left = verdict.rulings[LETTERS], dict(letters)
    for position, id_ in events.stored():
        number, fails = left.pop(id_, None), failures(name, terms, id_)
        must_be = fails == REJECTED or fails >= RETRY.attempts
        if number is None:
            if must_be:
                ruling.checked += 1
                if is_owed(name, terms, id_, events, timeline):
                    ruling.violated(f"{name} has no dead letter of {id_} at {position}, which always fails")
            continue
        ruling.checked += 1
        made = attempts.made(name, position)
        is_last = number == RETRY.attempts or (fails == REJECTED and attempts.has_failed(name, position, number))
        if made != set(range(1, number + 1)) or not is_last:
            ruling.violated(
                f"{name} has a dead letter of {id_} at {position} with {number} attempts. It fails "
                f"{'at once' if fails == REJECTED else f'{fails} times'}, and these attempts count: {sorted(made)}"
            )
    for id_ in left:
        ruling.violated(f"{name} has a dead letter of {id_}, which is not in the log")
