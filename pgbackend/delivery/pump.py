"""One shard being delivered: events in from a cursor, through the dispatcher, out as settled positions.

States of an event in a pump, with what moves it on:

    read ──filter, start or shard says no──▶ skipped
     │   ├──behind the end──▶ pending, until the end is another one
     │   ╰──filter fails, or is not asked yet──▶ in doubt: dispatched like a retry, and the filter is asked just before
     │ admit: the window has room
     ▼
    ready ──────── a worker takes it ──────▶ dispatching ──returns──▶ settled
     ▲ key: its key is free                     │ raises
     │ strict: it is the only one               ├── attempts left ──▶ scheduled: order "none" hands it over to
     │                                          │     `redeliveries` and is rid of it; in ordered modes it stays
     └───── due again ◀─────────────────────────┘     in the window, its key or shard waits, and only count and time
                                                      are durable
                                                ├── none left, or Reject ──▶ the dead-letter dispatcher's turn, if
                                                │     there is one, else buried
                                                ├── Pause ──▶ back to where it was taken from, and nothing is taken
                                                │     from there until the subscription is reconfigured
                                                └── (the process dies) ──▶ the next owner's, see care.py

The pump's promises: no more is in flight than the window's bounds; nothing begins while the lease is in doubt; no
transaction is open while a dispatcher runs (I4); a position is settled only after what became of it is on its way into
the same commit (I7).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic
from typing import Any

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery import turns
from pgbackend.delivery.care import Care, ProcessDied
from pgbackend.delivery.due import Due
from pgbackend.delivery.feed import Feed, settle_all
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.lanes import Lanes, sift
from pgbackend.delivery.outcomes import (
    Buried,
    Finished,
    LetterDelivered,
    LetterFailed,
    Outcome,
    Scheduled,
    Skipped,
    outcome_key,
)
from pgbackend.delivery.registration import Registration, complete
from pgbackend.delivery.shard import DueRequest, Mark, Shard, Waiting
from pgbackend.errors import DatabaseError
from pgbackend.failures import Thrown, describe, leave_process
from pgbackend.log.ranges import RangeSet
from pgbackend.log.tail import Cursor
from pgbackend.model import Failure
from pgbackend.postgres.reconnect import GrowingDelay

_LONGEST = 1e9
"""Seconds that an event may have to wait to be tried again: 30 years."""
_LEASE_POLL = 0.05
_BREATH = 0.02
"""Seconds after which a worker lets the event loop's other tasks run."""


@dataclass(frozen=True, slots=True)
class _Again:
    """An event that is dispatched once more."""

    event: Event
    handed_over: bool
    """Whether it left the window, so that its settling is an outcome and not a position."""
    letter: int | None = None
    begun: bool = False
    """Whether its last attempt killed the process that made it."""
    noted: bool = False
    """Whether it is noted that its next attempt has begun."""

    @property
    def slot(self) -> int:
        """Its key among what is being dispatched: after a seek an event may be at work as itself and as a letter."""
        return self.event.position if self.letter is None else -self.letter


class Pump:
    """Delivers one shard until it is stopped or its lease is lost."""

    def __init__(
        self,
        *,
        registration: Registration,
        shard: Shard,
        cursor: Cursor,
        note: Callable[[Shard], None],
        commit: Callable[[], Awaitable[None]],
        alone: asyncio.Lock,
        waiting: dict[int, Waiting],
        seconds_until: Callable[[datetime], Awaitable[float]],
        prove_end: Callable[[], Awaitable[int]],
    ) -> None:
        """`note`: tells the committer, and `commit` has it commit at once.

        `alone`: held by whoever dispatches with care. `waiting`: what a former owner of an ordered shard had waiting,
        by position.
        """
        self.registration = registration
        self.shard = shard
        self._note = note
        self._commit = commit
        self._alone = alone
        self._care = Care(crashes=shard.lease.crashes, most=shard.window.max_events)
        self._waiting = waiting
        self._seconds_until = seconds_until
        self._prove_end = prove_end
        lease = self._lease = shard.lease
        self._strict = lease.order == "strict"
        self._ordered = lease.order != "none"
        self._ready: deque[Event] = deque()
        self._again: deque[_Again] = deque()
        self._letters: deque[_Again] = deque()
        """The same for the dead-letter dispatcher: a target that is down does not hold them."""
        self._lanes = Lanes(single=self._strict)
        self._due = Due(shard)
        self._idle: list[asyncio.Future[None]] = []
        self._probe_turn = asyncio.Lock()
        self._timers: dict[asyncio.TimerHandle, _Again] = {}
        self._active: dict[int, Event] = {}
        """What is being dispatched, by slot."""
        self._doubts: set[int] = set()
        """Positions of events that the filter has not decided on."""
        self._quiet: asyncio.Event = asyncio.Event()
        self._stopping = False
        self._holds = 0
        """How many want nothing begun for now."""
        self._halted = False
        """Whether nothing is begun: it is stopping, or somebody holds it."""
        self._ended = False
        """Whether what still runs of it is being cancelled."""
        self._runner: asyncio.Task[Any] | None = None
        self._feed = Feed(
            registration=registration,
            shard=shard,
            cursor=cursor,
            note=note,
            take=self._make_ready,
            take_run=self._make_run_ready,
            let_go=self._forget_waiting,
            waiting=self._waiting,
            passes=self._passes,
        )
        self._feeding: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._workers = self._spare = self._wanted_workers()
        """How many workers there may be, and how many of them may still be made; below 0, so many are to leave."""

    # The pump's life.

    async def run(self) -> None:
        """Deliver until cancelled."""
        if self._stopping:
            return
        name = self.shard.name
        self._runner = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if not self._lease.complete:
                self._feeding = tasks.create_task(self._feed.run(), name=f"feed {name}")
                bounded = self._lease.end_position is not None or self._lease.end_at is not None
                # A shard that ends for good does not speak for those that take over from it.
                if bounded and self._lease.until is None:
                    tasks.create_task(self._finish(), name=f"finish {name}")
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                # Before its workers are cancelled: one whose dispatcher swallows that finds it here, and ends.
                self._ended = True
                self._begin_no_more()

    def hold(self) -> None:
        """Begin nothing until `go_on()`. What waits here stays."""
        self._holds += 1
        self._halted = True

    async def until_quiet(self, timeout: float | None) -> bool:
        """Whether nothing is being dispatched any more, within `timeout` seconds. Hold it, or end it, before."""
        if self._active:
            self._quiet.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._quiet.wait()
        return not self._active

    def go_on(self) -> None:
        """End one `hold()`."""
        self._holds -= 1
        if self._holds == 0 and not self._stopping:
            self._halted = False
            self._wake_all()

    async def drain(self, timeout: float) -> None:
        """Begin nothing more; return once nothing is being dispatched, after `timeout` seconds at the latest.

        Async dispatchers that are still at work by then are cancelled. Threads cannot be: they are named in the log.
        """
        self._begin_no_more()
        if self._feeding is not None:
            self._feeding.cancel()
        if not await self.until_quiet(timeout):
            self.report_slow("drain timed out")
        self.end()

    def end(self) -> None:
        """Begin nothing more, and leave what waits here to the shard's next owner. Nothing should be at work by now."""
        self._begin_no_more()
        if self._feeding is not None:
            self._feeding.cancel()
        self._feed.close()
        if self.shard.is_over:
            # Those that take over find in its offset what is left: nobody reads for this shard again.
            self.shard.window.seal()
            self._note(self.shard)

    def at_work(self) -> list[Event]:
        """The events that are being dispatched."""
        return list(self._active.values())

    def report_slow(self, fact: str) -> None:
        """Name in the log what is still being dispatched."""
        facts.emit(
            fact,
            level=logging.WARNING,
            shard=self.shard.name,
            events=[event.id for event in self._active.values()][:10],
            threads=self.registration.threads is not None,
        )

    def _begin_no_more(self) -> None:
        self._stopping = self._halted = True
        self._ready.clear()
        self._again.clear()
        self._letters.clear()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def reconfigured(self) -> int:
        """Go on as the registration says now; how many of the events that wait here are let go, as it refuses them."""
        if self._stopping:
            return 0
        before, self._workers = self._workers, self._wanted_workers()
        self._spare += self._workers - before
        refused = self._let_go()
        # All of them: some may have to leave, and each of the others finds more to do or sleeps again.
        self._wake_all()
        return refused

    def _wanted_workers(self) -> int:
        return 1 if self._strict else self.registration.concurrency

    @property
    def halted(self) -> bool:
        """Whether it begins nothing now."""
        return self._halted

    @property
    def retiring(self) -> bool:
        """Whether it has been told to end."""
        return self._stopping

    def look_whether_calm(self) -> None:
        """Have the crashes of former owners forgotten, once all that these had open is settled."""
        shard = self.shard
        if (
            shard.crashes
            and not (shard.calm or self._due)
            and self._care.is_past()
            and (self._lease.complete or shard.window.is_settled(self._lease.last_open))
        ):
            shard.calm = True
            self._care.taken = False
            self._note(shard)

    def state(self) -> str:
        """What it is doing, in a word or two, for `status()`."""
        if self.shard.complete:
            return "complete"
        health = self.registration.health
        if health.paused is not None:
            return f"paused: {health.paused}"
        if health.down:
            return "target down"
        if self._feed.blocked:
            return "waiting for an open transaction"
        if self._ordered and self._feed.waits and not (self._ready or self._again or self._active):
            return "waiting for failed events: the window is full behind them"
        return "running"

    def lose(self) -> None:
        """The lease is gone: begin nothing more, commit nothing more. What is at work may end."""
        self.shard.lost = True
        self._stopping = self._halted = True

    # What the window has taken on: ready, or behind others.

    def _make_ready(self, event: Event) -> None:
        """Queue an event, or park it behind its key, or hold it back until its noted time has come."""
        # First its lane: a late event of the same one may have it, and what was noted waits until it is free.
        if self._ordered and not self._lanes.enter(event):
            return
        if self._hold_back(event):
            return
        self._ready.append(event)
        if len(self._ready) == 1:
            # Whoever takes it wakes the next one, should there be more by then.
            self._wake()

    def _make_run_ready(self, events: Sequence[Event]) -> None:
        """Queue events that have no lane, and wait for nothing."""
        self._ready.extend(events)
        self._wake()

    def _vacate(self, event: Event) -> None:
        """The event is done with: the next of its lane may go."""
        following = self._lanes.leave(event)
        if following is not None and not self._hold_back(following):
            self._ready.append(following)
            self._wake()

    def _hold_back(self, event: Event) -> bool:
        """Whether the event does not go straight on.

        An event that failed under a former owner comes when it is due. An event in doubt goes the way of retries.
        """
        before = self._waiting.pop(event.position, None) if self._waiting else None
        if before is None:
            if event.position not in self._doubts:
                return False
            self._again.append(_Again(event, handed_over=False))
            self._wake()
            return True
        again = _Again(
            event.with_delivery(attempt=before.attempt + 1, failure=before.failure),
            handed_over=False,
            begun=before.begun,
        )
        # What is left of it: one behind others of its lane may have waited there for long.
        self._later(before.due_at - monotonic(), again)
        return True

    def _let_go(self) -> int:
        """Settle what waits here and does not pass the filter any more; how many events that were."""
        if self.registration.filter is None or self.shard.lost:
            return 0
        # Those behind a key first: what is let go in front of them makes the next one ready.
        parked = self._lanes.sift(self._passes)
        for event in parked:
            self._forget_waiting(event.position, event.position + 1)
            self.shard.window.settle(event.position)
        gone = [_Again(event, handed_over=False) for event in sift(self._ready, self._passes)]
        in_doubt = sift(self._ready, lambda event: event.position not in self._doubts)
        self._again.extend(_Again(event, handed_over=False) for event in in_doubt)
        for queue in (self._again, self._letters):
            refused = [again for again in queue if again.letter is None and not self._passes(again.event)]
            for again in refused:
                queue.remove(again)
            gone += refused
        for timer, again in list(self._timers.items()):
            if not self._passes(again.event):
                timer.cancel()
                del self._timers[timer]
                gone.append(again)
        for again in gone:
            self._done(again, Finished(position=again.event.position))
        if parked:
            self._feed.make_room()
            self._note(self.shard)
        return len(parked) + len(gone)

    def _passes(self, event: Event) -> bool:
        """Whether the event is wanted, as far as is known by now: see `Registration.passes()`."""
        if self._care.taken and self.registration.filter is not None:
            # The filter may be what kills the process: it is asked after it is noted that the attempt has begun.
            self._doubts.add(event.position)
            return True
        return self.registration.passes(event, self._doubts)

    def _forget_waiting(self, lower: int, upper: int) -> None:
        """These events are let go: should one have failed under a former owner, nobody is to try it again."""
        if not self._waiting:
            return
        for position in [lower] if upper == lower + 1 else [one for one in self._waiting if lower <= one < upper]:
            if self._waiting.pop(position, None) is not None:
                self.shard.note(Finished(position=position))

    # What is due again.

    def ask_due(self) -> DueRequest | None:
        """What this pump would take now of the events that are due again; None when it has no room, or is paused."""
        if self._halted or self.shard.lost:
            return None
        registration = self.registration
        return self._due.ask(registration.health, dead_letters=registration.dispatch_dead is not None)

    def take_due(self, event: Event, letter: int | None, *, begun: bool) -> None:
        """Take an event that is due again; one that does not pass the filter any more is let go.

        `begun`: its last attempt killed the process that made it.
        """
        if self._stopping or (letter is None and event.position in self._due):
            return
        self._due.begin(event, letter=letter)
        again = _Again(event, handed_over=True, letter=letter, begun=begun)
        if letter is None and not self._passes(event):
            self._done(again, Finished(position=event.position))
            return
        self._queue_of(event).append(again)
        self._wake()

    def skip_due(self, positions: Sequence[int]) -> None:
        """Skip failed events whose rows are gone from the log."""
        fresh = [position for position in positions if position not in self._due]
        if self._stopping or self.shard.lost or not fresh:
            return
        for position in fresh:
            self._due.skip(position)
            self.shard.note(Finished(position=position))
        for lower, upper in RangeSet.of(fresh):
            self.shard.note(Skipped(lower=lower, upper=upper))
        self._note(self.shard)

    def next_due(self) -> float | None:
        """When something that this pump scheduled is due, in monotonic seconds."""
        return self._due.next()

    def passed_due(self, now: float) -> None:
        """The due times up to now have been seen to."""
        self._due.passed(now)

    def committed(self, mark: Mark) -> None:
        """What the mark says is durable now: events that were handed over may be found due again."""
        self._due.committed(mark)
        for outcome in mark.outcomes.values():
            if isinstance(outcome, Buried):
                facts.emit(
                    "event buried", level=logging.WARNING, subscription=self.registration.name,
                    position=outcome.position, event_id=outcome.event_id, event_source=outcome.event_source,
                    error=outcome.failure.error,
                )  # fmt: skip

    # Delivering: ready → dispatcher → settled.

    async def _work(self) -> None:
        """A standing worker: takes one event after the other. A task an event would cost 6 µs each.

        It ends when fewer are wanted, and when a dispatcher has left something behind in its task. Then another one,
        in a task of its own, goes on in its place.
        """
        task, registered, context = _current_task(), self.registration.context, copy_context()
        try:
            while (
                not self._stopping
                and self._spare >= 0
                and registered is self.registration.context
                and not self._is_spent(task, context)
            ):
                await self._work_once(task, context)
        except asyncio.CancelledError:
            if self._is_ending():
                raise
            # A dispatcher asked for it, and has returned since.
        self._spare += 1
        self._wake_if_more()

    def _is_ending(self) -> bool:
        """Whether a cancellation is meant for the pump: its own task is then cancelled before any deliverer runs."""
        return self._ended or (self._runner is not None and self._runner.cancelling() > 0)

    def _is_spent(self, task: "asyncio.Task[Any]", context: Context) -> bool:
        """Whether the next event must not run in this task.

        Its context is not what it was (copies that nobody has changed compare equal at once, in 0.1 µs), or it was
        cancelled by a dispatcher or by something that this has left behind.
        """
        try:
            return task.cancelling() > 0 or copy_context() != context
        except Exception:  # noqa: BLE001 - comparing values of users' variables may raise anything
            return True

    async def _work_once(self, task: "asyncio.Task[Any]", context: Context) -> None:
        """Do what is most urgent, or wait until there is something to do."""
        shard, ready = self.shard, self._ready
        health = self.registration.health
        if self._halted or health.paused is not None or not (ready or self._again or self._letters):
            await self._wait()
        elif not shard.may_dispatch():
            # In doubt, not lost: the heartbeat says which within moments.
            await asyncio.sleep(_LEASE_POLL)
        elif self._letters:
            again = self._letters.popleft()
            self._wake_if_more()
            await self._retry(again, probe=False)
        elif health.down:
            await self._probe()
        elif self._again:
            again = self._again.popleft()
            self._wake_if_more()
            await self._retry(again, probe=False)
        elif self._care.taken:
            await self._retry(_Again(ready.popleft(), handed_over=False), probe=False)
        else:
            await self._deliver(task, context)

    async def _deliver(self, task: "asyncio.Task[Any]", context: Context) -> None:
        """The straight way: dispatch what is ready, until something else wants to be done."""
        shard, window, tenure, feed = self.shard, self.shard.window, self.shard.tenure, self._feed
        ready, again, letters, active = self._ready, self._again, self._letters, self._active
        health, dispatch, ordered = self.registration.health, self.registration.dispatch, self._ordered
        if len(ready) > 1:
            # One wakes the next, so that all are at work when dispatching takes time, and one when it does not.
            self._wake()
        turn = turns.mine()
        breath = monotonic() + _BREATH
        while (
            ready
            and not (again or letters or health.held or self._halted)
            and (now := monotonic()) < tenure.valid_until
        ):
            if now > breath:
                # A dispatcher that never waits for anything must not keep commits and other subscriptions waiting.
                await asyncio.sleep(0)
                breath = monotonic() + _BREATH
                continue
            event = ready.popleft()
            position = event.position
            active[position] = turn.event = event
            try:
                if (result := await dispatch(event)) is not None:
                    await complete(result)
            except BaseException as error:
                if self._is_cut_off(error, task):
                    raise
                self._fail(event, error, health)
            else:
                if not shard.lost:
                    window.settle(position)
                    if not shard.noted:
                        self._note(shard)
                if health.failing:
                    self._succeed(health)
                if ordered:
                    self._vacate(event)
                if feed.waits:
                    feed.make_room()
            finally:
                del active[position]
                if not active and self.halted:
                    self._quiet.set()
            try:
                # As `_is_spent()`, which costs twice as much.
                if task.cancelling() or copy_context() != context:
                    return
            except Exception:  # noqa: BLE001 - as there
                return

    def _is_cut_off(self, error: BaseException, task: "asyncio.Task[Any]") -> bool:
        """Whether a dispatch ends because its deliverer does. Whatever else it ends with is a failure of its event."""
        if issubclass(type(error), asyncio.CancelledError):
            return self._is_ending()
        # The interpreter closes a task that nobody runs any more.
        return issubclass(type(error), GeneratorExit) and not _is_running(task)

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        try:
            await future
        finally:
            if future in self._idle:
                self._idle.remove(future)

    def _wake(self) -> None:
        """Wake one idle worker, or make one while there may be more; it wakes the next when there is more to do."""
        while self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                return
        # Its tasks may be ending by now, and take in no more.
        if self._spare > 0 and self._tasks is not None and not self._halted:
            self._spare -= 1
            context = turns.begin(self.registration.context.copy())
            self._tasks.create_task(self._work(), name=f"deliver {self.shard.name}", context=context)

    def _wake_all(self) -> None:
        for _ in range(len(self._idle)):
            self._wake()
        self._wake_if_more()

    def _wake_if_more(self) -> None:
        if self._ready or self._again or self._letters:
            self._wake()

    async def _probe(self) -> None:
        """While the target is down: one event at a time, at the times that its health allows."""
        health = self.registration.health
        async with self._probe_turn:
            while health.down and health.paused is None and not self._halted and not self._letters:
                left = health.next_probe - monotonic()
                if left <= 0 and not health.probing:
                    break
                # Another shard's probe may take long; what is for the dead-letter dispatcher does not wait for it.
                await asyncio.sleep(min(left, _LEASE_POLL) if left > 0 else _LEASE_POLL)
            if not health.down or health.paused is not None or self._halted or self._letters:
                return
            if not self.shard.may_dispatch():
                return
            health.probing = True
            try:
                # In turn: what is due again, whoever has most attempts left; then what is new, the last one, because
                # the first ones may be a run of bad events, with the good ones behind it.
                if self._again and (health.probes % 2 or not self._ready):
                    again = min(self._again, key=_attempt)
                    self._again.remove(again)
                    await self._retry(again, probe=True)
                elif self._ready:
                    await self._retry(_Again(self._ready.pop(), handed_over=False), probe=True)
            finally:
                health.probing = False

    async def _retry(self, again: _Again, *, probe: bool) -> None:
        """Dispatch an event that is not in the straight way from the log: again, as a probe, as a letter, with care."""
        if not (again.begun or self._care.taken):
            await self._dispatch(again, probe=probe)
            return
        health = self.registration.health
        try:
            # What is known to kill waits as long as it takes; the others no longer than there is care.
            async with asyncio.timeout(None if again.begun else self._care.left()):
                await self._alone.acquire()
        except TimeoutError:
            self._care.taken = False
            if not self._is_let_go(again, health):
                self._put_back(again)
            return
        except asyncio.CancelledError:
            self._put_back(again)
            raise
        try:
            if self._stopping or self._is_let_go(again, health):
                return
            health = self.registration.health
            if self._halted or health.paused is not None or (health.down and not probe and again.event.failure is None):
                # Since it was taken; by what was alone before it, perhaps.
                self._put_back(again)
                return
            # At work from here on: who drains waits for its end.
            self._active[again.slot] = again.event
            noted: _Again | None = None
            try:
                noted = await self._note_attempt(again)
                if noted is not None and not self._is_let_go(noted, health):
                    await self._dispatch(noted, probe=probe)
                    self._care.handled(concurrency=self.registration.concurrency)
            except asyncio.CancelledError:
                # This process ends, or its lease, and nobody can say that it was this event's doing.
                self._put_back(replace(again, noted=True, handed_over=again.handed_over or not self._ordered))
                raise
            finally:
                self._active.pop(again.slot, None)
                if self.halted and not self._active:
                    self._quiet.set()
        finally:
            self._alone.release()

    def _is_let_go(self, again: _Again, health: TargetHealth) -> bool:
        """Let an event go that is not wanted any more, if it was reconfigured since its target had this health."""
        if health is self.registration.health or again.letter is not None or self._passes(again.event):
            return False
        self._done(again, Finished(position=again.event.position))
        return True

    def _put_back(self, again: _Again) -> None:
        """It is to be dispatched later, as what it is now: what was done with it was no attempt."""
        if again.noted:
            self._record(again, attempt=again.event.attempt - 1, begun=again.begun)
            if again.handed_over and not again.begun:
                # With that it is found among what is due.
                return
        if not self._stopping:
            self._queue_of(again.event).appendleft(replace(again, noted=False))

    async def _note_attempt(self, again: _Again) -> _Again | None:
        """The event, once it is durable that its next attempt has begun; None when it or the shard was given up."""
        event, retry = again.event, self.registration.retry
        if again.begun and event.attempt > retry.attempts:
            # What it did to the process that made its last attempt, nobody could say at the time.
            self._fail(event.with_delivery(attempt=retry.attempts, failure=event.failure), ProcessDied(), again=again)
            return None
        noted = self._record(again, attempt=event.attempt, begun=True)
        if not (self._ordered or again.handed_over):
            # It has left the window with that, and is at work as one of those that are due again.
            self._due.begin(event)
            self.shard.window.settle(event.position)
            self._feed.make_room()
            again = replace(again, handed_over=True)
        again = replace(again, noted=True)
        backoff = GrowingDelay(cap=1.0)
        while not self._stopping:
            try:
                await self._commit()
                break
            except DatabaseError as error:
                if self.shard.outcomes.get(outcome_key(noted)) is not noted:
                    # It was committed; what was refused is another shard's.
                    break
                facts.emit("attempt not noted", level=backoff.failed(), shard=self.shard.name, error=str(error))
            await backoff.wait()
        while not self._stopping:
            if self.shard.may_dispatch():
                return again
            await asyncio.sleep(_LEASE_POLL)
        self._record(again, attempt=event.attempt - 1, begun=again.begun)
        return None

    def _record(self, again: _Again, *, attempt: int, begun: bool) -> Outcome:
        """Note how many attempts the event has behind it, and whether the last of them has only begun."""
        event, error = again.event, describe(ProcessDied())
        delay = min(self.registration.retry.wait_before(max(attempt, 1)), _LONGEST) if begun else 0.0
        outcome: Outcome
        if again.letter is not None:
            outcome = LetterFailed(
                letter=again.letter, attempt=attempt, delay=delay, error=error, details={}, started=begun
            )  # fmt: skip
        else:
            outcome = Scheduled(
                position=event.position, attempt=attempt, delay=delay, error=error, failure=event.failure, started=begun
            )
        if not self.shard.lost:
            self.shard.note(outcome)
            self._note(self.shard)
        return outcome

    async def _dispatch(self, again: _Again, *, probe: bool) -> None:
        """Dispatch it, and note what becomes of it."""
        event, health = again.event, self.registration.health
        dispatch = self.registration.dispatch if event.failure is None else self.registration.dispatch_dead
        if dispatch is None:
            # It was on its way to a dead-letter dispatcher that this process does not have.
            assert event.failure is not None  # noqa: S101 - only those have none
            self._done(again, _buried(event, event.failure))
            return
        self._active[again.slot] = turns.mine().event = event
        task = _current_task()
        # A dead letter was taken on once, and so was what goes to the dead-letter dispatcher.
        in_doubt = again.letter is None and event.failure is None and event.position in self._doubts
        try:
            if in_doubt:
                if not self.registration.matches(event):
                    self._done(again, Finished(position=event.position))
                    return
                self._doubts.discard(event.position)
                in_doubt = False
            if (result := await dispatch(event)) is not None:
                await complete(result)
        except BaseException as error:
            if self._is_cut_off(error, task):
                raise
            # What the filter throws says nothing about the target.
            self._fail(event, error, health, probe=probe, again=again, asked=not in_doubt)
        else:
            if event.failure is None:
                self._succeed(health)
            if again.letter is not None:
                self._done(again, LetterDelivered(letter=again.letter))
            else:
                self._done(again, Finished(position=event.position))
        finally:
            del self._active[again.slot]
            if self._halted and not self._active:
                self._quiet.set()

    def _succeed(self, health: TargetHealth) -> None:
        if health.succeeded():
            facts.emit("target is up", level=logging.WARNING, subscription=self.registration.name)
            self._wake_all()

    def _fail(
        self,
        event: Event,
        error: BaseException,
        health: TargetHealth | None = None,
        *,
        probe: bool = False,
        again: _Again | None = None,
        asked: bool = True,
    ) -> None:
        """Decide what becomes of an event that failed, and have it committed.

        `health`: of the target that it had, if that is not the one of now. `asked`: whether the target was asked at
        all.
        """
        leave_process(error, subscription=self.registration.name, position=event.position)
        thrown = Thrown.of(error)
        registration, retry = self.registration, self.registration.retry
        health = health or registration.health
        if health.retired and (again is None or again.letter is None) and not self._passes(event):
            # Reconfigured while it was at work: it is not wanted any more.
            self._done(again or _Again(event, handed_over=False), Finished(position=event.position))
            return
        if thrown.pauses and event.failure is None:
            self._pause(event, thrown, health, again)
            return
        again = again or _Again(event, handed_over=False)
        text, details = thrown.error, thrown.details
        facts.emit(
            "dispatch failed",
            subscription=registration.name, position=event.position, event_id=event.id, event_source=event.source,
            attempt=event.attempt, error=text,
        )  # fmt: skip
        # In strict order every attempt counts: nothing can be probed past the event that fails.
        if event.failure is None and not thrown.final and not self._strict and asked:
            down = health.failed(event.position, now=monotonic(), probe=probe)
            if down:
                facts.emit("target is down", level=logging.WARNING, subscription=registration.name, error=text)
        if event.attempt < retry.attempts and not thrown.final:
            delay = max(retry.wait_before(event.attempt), min(thrown.delay, retry.max_delay))
            # Beyond all dates that PostgreSQL has, it would be refused, with every other shard's commit.
            delay = min(delay, _LONGEST)
            facts.emit(
                "retry scheduled", level=logging.DEBUG,
                subscription=registration.name, position=event.position, attempt=event.attempt, delay=delay,
            )  # fmt: skip
            self._schedule(again, attempt=event.attempt, delay=delay, error=text, details=details)
            return
        if again.letter is not None:
            self._done(
                again, LetterFailed(letter=again.letter, attempt=event.attempt, delay=None, error=text, details=details)
            )
            return
        failure = Failure(error=text, attempts=event.attempt, details=details)
        if event.failure is not None:
            # Why it was given up counts; why the dead-letter dispatcher gave it up as well is a detail.
            failure = replace(event.failure, details={**event.failure.details, "dead_letter_error": text})
        if event.failure is None and registration.dispatch_dead is not None:
            facts.emit(
                "event given up", level=logging.WARNING, subscription=registration.name, position=event.position,
                event_id=event.id, event_source=event.source, error=text,
            )  # fmt: skip
            self._schedule(
                _Again(event.with_delivery(attempt=0, failure=failure), handed_over=again.handed_over),
                attempt=0, delay=0.0, error=text, details=details,
            )  # fmt: skip
            return
        self._done(again, _buried(event, failure))

    def _pause(self, event: Event, signal: Thrown, health: TargetHealth, again: _Again | None) -> None:
        """Put the event back where it was taken from, and take nothing more for a target that wants nothing more."""
        if again is not None:
            self._put_back(again)
        elif not self._stopping:
            self._ready.appendleft(event)
        reason = signal.reason or "no reason was given"
        if health.pause(reason):
            facts.emit(
                "subscription paused", level=logging.WARNING,
                subscription=self.registration.name, reason=reason, position=event.position,
                event_id=event.id, event_source=event.source, details=signal.details,
            )  # fmt: skip

    def _schedule(self, again: _Again, *, attempt: int, delay: float, error: str, details: dict[str, str]) -> None:
        """Note that the event is to be dispatched again, as attempt number `attempt + 1`."""
        event = again.event
        if again.letter is not None:
            self._done(
                again, LetterFailed(letter=again.letter, attempt=attempt, delay=delay, error=error, details=details)
            )
            return
        outcome = Scheduled(
            position=event.position, attempt=attempt, delay=delay, error=error, failure=event.failure
        )  # fmt: skip
        if self._ordered:
            # Only the count and the time are durable; the position stays pending, and its key waits.
            if not self.shard.lost:
                self.shard.note(outcome)
                self._note(self.shard)
            self._later(delay, _Again(event.with_delivery(attempt=attempt + 1), handed_over=False))
        else:
            self._done(again, outcome)

    def _queue_of(self, event: Event) -> deque[_Again]:
        return self._again if event.failure is None else self._letters

    def _later(self, delay: float, again: _Again) -> None:
        if self._stopping:
            return

        def due() -> None:
            self._timers.pop(timer, None)
            self._queue_of(again.event).append(again)
            self._wake()

        timer = asyncio.get_running_loop().call_later(delay, due)
        self._timers[timer] = again

    def _done(self, again: _Again, outcome: Outcome) -> None:
        """The event leaves the pump; what became of it is committed with the offset."""
        event = again.event
        self._doubts.discard(event.position)
        if self.shard.lost:
            return
        if again.handed_over:
            self.shard.note(outcome)
        else:
            # In ordered modes a failed event has a row to be forgotten; otherwise a first failure leaves one behind.
            if self._ordered or not isinstance(outcome, Finished):
                self.shard.note(outcome)
            if not self._ordered and isinstance(outcome, Scheduled):
                self._due.begin(event)
            self.shard.window.settle(event.position)
            if self._ordered:
                self._vacate(event)
            self._feed.make_room()
        self._note(self.shard)

    # Coming to an end.

    async def _finish(self) -> None:
        """Once the subscription's end is reached, say so durably."""
        await settle_all(self.shard, seconds_until=self._seconds_until, prove_end=self._prove_end)
        if not self.shard.complete:
            self.shard.complete = True
            if self._feeding is not None:
                # What is read now is for a later end, should there be one: left unread, it costs nothing till then.
                self._feeding.cancel()
            self._feed.close()
            self._note(self.shard)
            facts.emit("subscription complete", subscription=self.registration.name, shard=self.shard.lease.shard)


def _buried(event: Event, failure: Failure) -> Buried:
    return Buried(position=event.position, failure=failure, event_id=event.id, event_source=event.source)


def _attempt(again: _Again) -> int:
    return again.event.attempt


def _current_task() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - deliverers are tasks
    return task


def _is_running(task: "asyncio.Task[Any]") -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:  # there is no event loop any more
        return False
