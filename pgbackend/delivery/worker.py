"""One worker: a started backend within one life of the server.

It registers, then in rounds claims the free shards of the subscriptions that this process knows, with a pump for
each. It ends when it is told to (it drains, commits, gives its shards up), or with `IncarnationChanged`, when
everything it holds in memory is void and a new worker must begin from the durable rows.
"""

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar
from uuid import uuid4

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.pump import Pump
from pgbackend.delivery.redelivery import Redelivery
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.delivery.window import Window
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.maintenance import Maintenance
from pgbackend.log.notify import LEASES, Notifier, Wakeup
from pgbackend.log.tail import Tail
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.settings import Settings
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.leases import Lease, Leases, Survey, SurveyedShard
from pgbackend.subscriptions.overview import Overview
from pgbackend.subscriptions.presence import Presence, Tenure
from pgbackend.subscriptions.sharing import Peer, ShardKey, share

_ROUND = 1.0
"""Seconds between two rounds of claiming, at most: a dead worker's shards do not wait for a long `poll_interval`."""
_JITTER = 0.05
"""Seconds that a worker waits at most between two rounds, however many wake-ups there are; not in step with others."""
_LEFT_LYING = 1.5
"""Seconds after which a free shard is anybody's: two rounds, in which whoever should have it has not taken it."""
_CANCEL_TIMEOUT = 1.0
"""Seconds that dispatchers which are cancelled have to end, before their events go to the next owner."""
_COMMIT_TIMEOUT = 15.0
"""Seconds that the commit may take before a shard is given up while the worker goes on."""
_LAST_STEPS = 4.0
"""Seconds beyond `drain_timeout` that stopping may take: to cancel, to commit, and to give the shards up."""
_OUTLAST_POLL = 0.02
"""Seconds between looks at whether what is at work has ended, before its shard is given up."""
_LONGEST_KEPT = 600.0
"""Seconds after which a shard that was not given up may be held again, at most."""


_Result = TypeVar("_Result")


def process_name() -> str:
    """What the workers of this process are called where others see them."""
    return f"{socket.gethostname()}:{os.getpid()}"


class _Kept:
    """Why a shard was not given up: events that were at work there for too long."""

    __slots__ = ("_slow", "_until", "pause")

    def __init__(self, slow: Sequence[Event], *, pause: float = 0.0, before: "_Kept | None" = None) -> None:
        """`pause`: seconds until it may be tried again, twice as long as after the one `before`."""
        self._slow = {id(event): event for event in slow}
        self.pause: float = min(pause if before is None else 2 * before.pause, _LONGEST_KEPT)
        self._until = time.monotonic() + self.pause

    def blocks(self, pump: Pump) -> bool:
        """Whether one of the events is still at work."""
        return not self._slow.keys().isdisjoint(map(id, pump.at_work()))

    def forbids(self, pump: Pump) -> bool:
        """Whether the pump should not be held now: it would take too long again."""
        return bool(pump.at_work()) and (self.blocks(pump) or time.monotonic() < self._until)


class Worker:
    """Runs the shards of its registrations until `stop` is set."""

    def __init__(
        self,
        *,
        log: Log,
        maintenance: Maintenance,
        settings: Settings,
        registrations: dict[str, Registration],
        wakeup: Wakeup,
        notifier: Notifier,
        channel: str,
        sender: str,
    ) -> None:
        self._log = log
        self._maintenance = maintenance
        self._settings = settings
        self._registrations = registrations
        self._wakeup = wakeup
        self._notifier = notifier
        self._sender = sender
        self._rounds = Wakeup()
        self._one_round = asyncio.Lock()
        self._doubts = 0
        """How often it was in doubt, and was told what it still has."""
        self._id = uuid4()
        self._tenure = Tenure()
        self._pumps: dict[int, tuple[Pump, asyncio.Task[None]]] = {}
        self._leaving: set[tuple[int, bool]] = set()
        """Epochs of the shards that this worker is giving up while it goes on, and whether it does so at once."""
        self._giving_up: set[asyncio.Task[None]] = set()
        """What gives shards up while this worker goes on. It waits for dispatchers, so stopping cancels it."""
        self._kept: dict[int, _Kept] = {}
        """Why shards were not given up, by epoch."""
        self._alone = asyncio.Lock()
        """Held by the one pump that dispatches an event with care."""
        self._free_since: dict[ShardKey, float] = {}
        self._due = asyncio.Event()
        self._leases = Leases(log, schema=settings.schema, worker=self._id)
        self._alterations = Alterations(log, schema=settings.schema)
        self._overview = Overview(log.database, schema=settings.schema)
        self._redelivery = Redelivery(log.database, schema=settings.schema)
        self._committer = Committer(
            Offsets(log, schema=settings.schema, worker=self._id),
            commit_interval=settings.commit_interval,
            apply=self._apply,
        )
        self._presence = Presence(
            log.database,
            schema=settings.schema,
            worker=self._id,
            name=process_name(),
            lease_timeout=settings.lease_timeout,
            channel=channel,
            notify=log.sql.notify,
            tenure=self._tenure,
            on_hint=self._on_hint,
            on_held=self._on_held,
        )
        self._broken: asyncio.Future[None]
        """What a pump has died of."""
        self._tail: Tail | None = None
        self._tasks: asyncio.TaskGroup | None = None

    # A worker's life.

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop` is set, then drain, commit and give up every shard."""
        await self._log.incarnation.enter()
        # Killed workers leave their rows behind. Delete them so that surveys stay cheap.
        await self._leases.delete_dead_workers()
        await self._presence.start()
        try:
            await self._leases.verify_presence()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._tail = Tail(
                    self._log,
                    self._wakeup,
                    poll_interval=self._settings.poll_interval,
                    buffer_bytes=self._settings.buffer_bytes,
                    tasks=tasks,
                )
                self._broken = asyncio.get_running_loop().create_future()
                standing = [
                    tasks.create_task(self._run_rounds(), name="claim shards"),
                    tasks.create_task(self._committer.run(), name="commit offsets"),
                    tasks.create_task(self._run_redelivery(), name="redeliver"),
                    tasks.create_task(self._maintenance.run(), name="maintain the log"),
                    tasks.create_task(self._watch_pumps(), name="watch over the pumps"),
                    tasks.create_task(self._presence.watch(), name="watch over the sign of life"),
                ]
                facts.emit("worker started", worker=str(self._id))
                try:
                    await stop.wait()
                    for task in (standing[0], *self._giving_up):
                        task.cancel()
                    deadline = self._deadline()
                    await self._stop_shards(list(self._pumps), deadline)
                    for task in standing:
                        task.cancel()
                    await self._leave(deadline)
                finally:
                    self._cut_off()
        except BaseExceptionGroup as group:
            # One cause is enough to end it; a new life of the server explains whatever else came with it.
            changed, other = group.split(IncarnationChanged)
            raise _first(changed or other) from group
        finally:
            self._tasks = None
            try:
                if pumps := {task for _, task in self._pumps.values()}:
                    await asyncio.wait(pumps, timeout=_CANCEL_TIMEOUT)
            finally:
                await self._presence.stop()
                facts.emit("worker stopped", worker=str(self._id))

    async def _watch_pumps(self) -> None:
        """Raise what a pump has died of."""
        await self._broken

    def _cut_off(self) -> None:
        """End the pumps that are left, when this worker is cancelled or fails."""
        for pump, task in self._pumps.values():
            pump.lose()
            task.cancel()

    async def _leave(self, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._leases.leave()
                await self._notifier.notify_leases()
        except (DatabaseError, TimeoutError) as error:
            facts.emit("leave failed", level=logging.WARNING, error=str(error) or "PostgreSQL did not answer in time.")

    @property
    def dispatches(self) -> bool:
        """Whether it has registered, and dispatches what it claims."""
        return self._tasks is not None

    def claim_soon(self) -> None:
        """There are new registrations."""
        self._rounds.wake()

    def reconfigured(self, registration: Registration) -> int:
        """What this process runs of a subscription goes on as it was reconfigured; how many events are let go."""
        self._due.set()
        return sum(pump.reconfigured() for pump, _ in self._pumps.values() if pump.registration is registration)

    def redeliver_soon(self) -> None:
        """Dead letters were sent on their way again."""
        self._due.set()

    async def stop_subscription(self, name: str) -> None:
        """Return once nothing of this subscription is in flight here, its offsets are committed and its shards free.

        Dispatches that outlast `drain_timeout` are cancelled.
        """
        deadline = self._deadline()
        if mine := await self._shards_of(name, deadline):
            await self._in_own_task(self._stop_shards(mine, deadline), name=f"stop {name}")
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._notifier.notify_leases()

    async def rest_subscription(self, name: str) -> bool:
        """Whether nothing of this subscription is in flight here any more, its offsets committed and its shards free.

        Nothing is cancelled: when something is at work for longer than `drain_timeout`, dispatching goes on.
        """
        mine = await self._shards_of(name, self._deadline())
        if mine and await self._in_own_task(self._hand_over(mine), name=f"give up {name}") is False:
            return False
        await self._notifier.notify_leases()
        return True

    def lose_subscription(self, name: str) -> None:
        """Its shards have new epochs: begin nothing more under the old ones."""
        for pump, _ in list(self._pumps.values()):
            if pump.registration.name == name:
                self._on_lost(pump.shard)

    def _deadline(self) -> float:
        """When something that begins to stop now has ended, in monotonic seconds."""
        return time.monotonic() + self._settings.drain_timeout + _LAST_STEPS

    async def _shards_of(self, name: str, deadline: float) -> list[int]:
        """The epochs of the shards of this subscription that run here."""
        # A round that claimed before the registration went has ended by then, and its pump is among them. One that
        # takes longer, because PostgreSQL does not answer, begins none.
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()), self._one_round:
                pass
        return [epoch for epoch, (pump, _) in self._pumps.items() if pump.registration.name == name]

    async def _in_own_task(self, call: Coroutine[Any, Any, _Result], *, name: str) -> _Result | None:
        """What the call returns, None if the worker ends first and gives up all it has.

        A caller that stops waiting must not leave pumps that neither run nor end.
        """
        try:
            assert self._tasks is not None  # noqa: S101 - only a running worker has shards
            task = self._tasks.create_task(call, name=name)
        except (AssertionError, RuntimeError):
            call.close()
            return None
        await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    def is_at_work(self, event: Event) -> bool:
        """Whether this very event is being dispatched."""
        return any(event is other for pump, _ in self._pumps.values() for other in pump.at_work())

    def stands_waiting_for(self, registration: Registration | None) -> list[Event]:
        """Events at work where nothing is begun any more, of one subscription or of all; empty where something is."""
        pumps = [pump for pump, _ in self._pumps.values() if registration in (None, pump.registration)]
        return [event for pump in pumps for event in pump.at_work()] if all(pump.halted for pump in pumps) else []

    def states(self) -> dict[str, str]:
        """By subscription: what it is doing here, all its shards considered."""
        states = [(pump.registration.name, pump.state()) for pump, _ in self._pumps.values()]
        # Of several the last one counts: one that says what is wrong; "complete" only when all of them are.
        return dict(sorted(states, key=lambda one: (one[1] != "complete", one[1] != "running")))

    def _on_hint(self, payload: str) -> None:
        if payload == self._sender:
            return
        if payload in (LEASES, ""):
            self._rounds.wake()
        if payload != LEASES:
            self._wakeup.wake()

    def _on_held(self, held: frozenset[int]) -> None:
        """After a time of doubt: what others have taken over meanwhile is lost."""
        self._doubts += 1
        for epoch in set(self._pumps) - held:
            self._on_lost(self._pumps[epoch][0].shard)

    # Claiming and giving up.

    async def _run_rounds(self) -> None:
        backoff = GrowingDelay(self._log.database)
        while True:
            known = self._rounds.count
            try:
                async with self._one_round:
                    await self.run_round()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("claim failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
                continue
            backoff.reset()
            # Bounds the rounds of a time in which many shards change hands, each with a wake-up for all. Before the
            # wait: who has lost a shard after a quiet time is to know at once.
            await asyncio.sleep(_JITTER * random.random())  # noqa: S311 - not a secret
            await self._rounds.wait(since=known, timeout=min(self._settings.poll_interval, _ROUND))

    async def run_round(self) -> None:
        """Drop what others have taken over, then do this worker's part of sharing the shards out."""
        # A worker that runs nothing commits and reads nothing, so it looks for another life of the server here.
        await self._log.incarnation.verify_not_set_back()
        known = set(self._pumps)
        survey = await self._leases.survey()
        held = {shard.epoch for shard in survey.shards if shard.owner == self._id}
        self._kept = {epoch: kept for epoch, kept in self._kept.items() if epoch in self._pumps}
        for epoch in known - held:
            if epoch in self._pumps:
                self._on_lost(self._pumps[epoch][0].shard)
        for pump, _ in self._pumps.values():
            pump.look_whether_calm()
        # Claimed, but the connection broke before its pump began.
        await self._leases.release([epoch for epoch in held if epoch not in known])
        await self._switch_shards(survey)
        self._give_up(self._to_rest(survey), at_once=True)

        me = Peer(self._id, self._able(), asks=True)
        peers = {peer.id: peer for peer in survey.peers} | {self._id: me}
        leaving = {epoch for epoch, _ in self._leaving}
        open_now = {shard.key: shard for shard in survey.claimable()}
        plan = share(
            {key: None if shard.free or shard.epoch in leaving else shard.owner for key, shard in open_now.items()},
            list(peers.values()),
        )
        # One whose pump is still ending here would run twice in this process, and nobody can be asked for it meanwhile.
        here = {pump.shard.lease.key for pump, _ in self._pumps.values()}
        wanted = [
            key for key, worker in plan.items()
            if worker == self._id and open_now[key].owner != self._id and key not in here
        ]  # fmt: skip
        await self._announce(survey, me, asks=any(not open_now[key].free for key in wanted))
        self._give_up(
            shard.epoch
            for key, shard in open_now.items()
            if shard.owner == self._id and key in plan and plan[key] != self._id and peers[plan[key]].asks
        )
        left = [key for key in self._left_lying(open_now, me) if key not in here]
        await self._claim([key for key in wanted if open_now[key].free] + left)

    def _able(self) -> frozenset[str]:
        """The subscriptions whose shards this worker can run now."""
        return frozenset(name for name, registration in self._registrations.items() if not registration.resting)

    async def _switch_shards(self, survey: Survey) -> None:
        """Where the number of shards changes and the old ones are over, let the new ones begin."""
        old: dict[str, bool] = {}
        for shard in survey.shards:
            if shard.old:
                subscription = shard.key[0]
                old[subscription] = old.get(subscription, True) and shard.finished and shard.free
        for subscription in (name for name, are_over in old.items() if are_over and name in self._registrations):
            if await self._alterations.switch(subscription):
                facts.emit("shards switched", subscription=subscription)
                self._rounds.wake()
                await self._notifier.notify_leases()

    def _to_rest(self, survey: Survey) -> list[int]:
        """What this worker has to give up whoever gets it: somebody wants it at rest, or it is over."""
        resting = {shard.epoch for shard in survey.shards if shard.draining}
        return [epoch for epoch, (pump, _) in self._pumps.items() if epoch in resting or pump.shard.is_over]

    async def _announce(self, survey: Survey, me: Peer, *, asks: bool) -> None:
        """Have the others know what this worker runs, and that it asks for some of theirs, as long as it does."""
        told = next((peer for peer in survey.peers if peer.id == self._id), None)
        if told is not None and (asks or told.asks or told.subscriptions != me.subscriptions):
            await self._leases.announce(sorted(me.subscriptions), asks=asks)
            if asks and not told.asks:
                # Once: who has just been told, looks.
                await self._notifier.notify_leases()

    def _left_lying(self, shards: Mapping[ShardKey, SurveyedShard], me: Peer) -> list[ShardKey]:
        """Shards that are free for long: whoever should have them does not take them, so this worker does."""
        now = time.monotonic()
        self._free_since = {key: self._free_since.get(key, now) for key, shard in shards.items() if shard.free}
        return [
            key for key, since in self._free_since.items() if now - since > _LEFT_LYING and key[0] in me.subscriptions
        ]

    async def _claim(self, keys: Sequence[ShardKey]) -> None:
        doubts = self._doubts
        for lease in await self._leases.claim(list(dict.fromkeys(keys))) if keys else ():
            if lease.position > lease.head and (problem := await self._overview.find_mistrust()):
                raise SchemaError(problem)
            registration = self._registrations.get(lease.subscription)
            if registration is None or registration.resting:
                # Unsubscribed in this moment, or it is being moved.
                await self._leases.release([lease.epoch])
                continue
            await self._begin(lease, registration, doubts=doubts)

    async def _begin(self, lease: Lease, registration: Registration, *, doubts: int) -> None:
        """A pump runs for the lease. `doubts`: when it was asked for."""
        assert self._tail is not None  # noqa: S101 - rounds run inside run()
        assert self._tasks is not None  # noqa: S101
        waiting = await self._redelivery.find_attempts(lease) if lease.order != "none" else {}
        if (
            doubts != self._doubts
            or registration.resting
            or self._registrations.get(registration.name) is not registration
        ):
            # Frozen, or cut off, while the answer was on its way: others may have taken it over, and nobody missed it
            # when this worker was told what it still has. If it has it, the next round gives it up and claims it anew.
            self._rounds.wake()
            return
        shard = Shard(
            lease=lease,
            window=Window(
                position=lease.position,
                pending=lease.pending,
                max_events=self._settings.window_events,
                max_bytes=self._settings.window_bytes,
                seen=lease.pending.difference(lease.holes),
            ),
            tenure=self._tenure,
            place=lease.place,
            complete=lease.complete,
            crashes=lease.crashes,
            committed=(lease.position, str(lease.pending), str(lease.holes)),
        )
        pump = Pump(
            registration=registration,
            shard=shard,
            cursor=self._tail.cursor(after=lease.position, strict=lease.order == "strict"),
            note=self._committer.note,
            commit=self._committer.flush,
            alone=self._alone,
            waiting=waiting,
            seconds_until=self._seconds_until,
            prove_end=self._prove_end,
        )
        # Not in the group: it would wait for ever for a dispatcher that swallows its cancellation.
        task = asyncio.create_task(pump.run(), name=f"pump {shard.name}")
        task.add_done_callback(self._on_pump_ended)
        self._pumps[lease.epoch] = (pump, task)
        self._due.set()
        facts.emit(
            "lease claimed", subscription=lease.subscription, shard=lease.shard, epoch=lease.epoch,
            position=lease.position, pending=lease.pending.count(), crashes=lease.crashes,
        )  # fmt: skip

    def _on_pump_ended(self, task: "asyncio.Task[None]") -> None:
        """What a pump dies of ends the worker."""
        if not task.cancelled() and (error := task.exception()) is not None and not self._broken.done():
            self._broken.set_exception(error)

    def _give_up(self, epochs: Iterable[int], *, at_once: bool = False) -> None:
        """Begin to give these shards up, each once nothing is at work there.

        `at_once`: begin nothing there from now on. Otherwise only once what is at work now has ended: the others need
        not stand still for a single slow dispatcher.
        """
        for epoch in set(epochs) & set(self._pumps):
            if (epoch, at_once) not in self._leaving:
                self._leaving.add((epoch, at_once))
                pump, _ = self._pumps[epoch]
                self._in_background(self._share_out(epoch, pump, at_once=at_once), name=f"give up {pump.shard.name}")

    def _in_background(self, giving_up: Coroutine[Any, Any, None], *, name: str) -> None:
        assert self._tasks is not None  # noqa: S101 - rounds run inside run()
        task = self._tasks.create_task(giving_up, name=name)
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)

    async def _share_out(self, epoch: int, pump: Pump, *, at_once: bool) -> None:
        """Give a shard up if what is at work there ends in time; otherwise it stays here."""
        try:
            given_up = (at_once or await self._outlast(pump)) and await self._hand_over([epoch])
        finally:
            self._leaving.discard((epoch, at_once))
        if given_up:
            self._rounds.wake()
            await self._notifier.notify_leases()
        elif at_once:
            # Calls that asked for the rest need not wait any longer.
            with suppress(DatabaseError):
                await self._alterations.refuse_drain(pump.registration.name)

    async def _outlast(self, pump: Pump) -> bool:
        """Whether what is at work now ends within `drain_timeout`. Others are dispatched meanwhile."""
        now_at_work = _Kept(pump.at_work())
        deadline = time.monotonic() + self._settings.drain_timeout
        while now_at_work.blocks(pump) and time.monotonic() < deadline:  # noqa: ASYNC110 - rare, and plain
            await asyncio.sleep(_OUTLAST_POLL)
        return not now_at_work.blocks(pump)

    async def _hand_over(self, epochs: Iterable[int]) -> bool:
        """Give these shards up together once nothing is at work there; whether they were given up.

        When something is at work for longer than `drain_timeout`, all of them stay here and go on. They are not held
        again before that has ended and some time has passed, so slow dispatchers do not stop the shard for good.
        """
        pumps = {epoch: self._pumps[epoch][0] for epoch in epochs if epoch in self._pumps}
        if any(epoch in self._kept and self._kept[epoch].forbids(pump) for epoch, pump in pumps.items()):
            return False
        for pump in pumps.values():
            pump.hold()
        try:
            timeout = self._settings.drain_timeout
            if all(await asyncio.gather(*(pump.until_quiet(timeout) for pump in pumps.values()))):
                await self._retire(pumps)
                return True
            for epoch, pump in pumps.items():
                if slow := pump.at_work():
                    pump.report_slow("shard kept")
                    before = self._kept.get(epoch)
                    self._kept[epoch] = _Kept(slow, pause=max(timeout, _ROUND), before=before)
            return False
        finally:
            for pump in pumps.values():
                pump.go_on()
            self._due.set()

    async def _stop_shards(self, epochs: Iterable[int], deadline: float) -> None:
        """Drain these shards together and give them up; what is still at work after `drain_timeout` is cancelled.

        By the deadline, in monotonic seconds, it has ended, whatever it could do by then.
        """
        pumps = {epoch: self._pumps[epoch][0] for epoch in epochs if epoch in self._pumps}
        await asyncio.gather(*(pump.drain(self._settings.drain_timeout) for pump in pumps.values()))
        await self._retire(pumps, deadline)

    async def _retire(self, epochs: Iterable[int], deadline: float | None = None) -> None:
        """End these pumps, commit, and give their shards up. By the deadline, in monotonic seconds, it has ended."""
        # One may just have gone: two reasons to give a shard up, an end of the lease and of the subscription, may meet.
        leaving = [(epoch, *self._pumps[epoch]) for epoch in epochs if epoch in self._pumps]
        if not leaving:
            return
        for _, pump, task in leaving:
            pump.end()
            task.cancel()
        # Before the shards are given up: the next owner should not dispatch beside those that are cut short.
        await asyncio.wait({task for _, _, task in leaving}, timeout=_CANCEL_TIMEOUT)
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT if deadline is None else deadline - time.monotonic()):
                await self._committer.flush()
                await self._leases.release([epoch for epoch, pump, _ in leaving if not pump.shard.lost])
        except (DatabaseError, TimeoutError) as error:
            # Others take over when this worker is gone; what was not committed is dispatched again.
            text = str(error) or "PostgreSQL did not answer in time."
            facts.emit("release failed", level=logging.WARNING, error=text)
        for epoch, pump, task in leaving:
            pump.lose()
            if not task.done():
                pump.report_slow("dispatcher abandoned")
            self._pumps.pop(epoch, None)
            facts.emit("lease released", subscription=pump.registration.name, shard=pump.shard.lease.shard)

    def _on_lost(self, shard: Shard) -> None:
        """Somebody else has the shard, or it was moved: end its pump; what is at work there may finish first."""
        entry = self._pumps.get(shard.lease.epoch)
        if entry is None or self._tasks is None:
            return
        pump, _ = entry
        if pump.retiring:
            return
        pump.lose()
        facts.emit("lease lost", level=logging.WARNING, subscription=pump.registration.name, shard=shard.lease.shard)
        self._in_background(self._end_lost(shard.lease.epoch, pump), name=f"end {shard.name}")

    async def _end_lost(self, epoch: int, pump: Pump) -> None:
        """End its pump once nothing is at work there, however long that takes: it is not claimed anew here before."""
        if not await pump.until_quiet(self._settings.drain_timeout):
            pump.report_slow("lost shard is still at work")
            await pump.until_quiet(None)
        await self._retire([epoch])
        self._rounds.wake()

    # Failed events that are due again.

    def _apply(self, committed: Committed) -> None:
        """Tell the pumps what is durable now, and end those whose leases are lost."""
        for shard, mark in committed.marks.items():
            self._on_committed(shard, mark)
        for shard in committed.lost:
            self._on_lost(shard)

    def _on_committed(self, shard: Shard, mark: Mark) -> None:
        entry = self._pumps.get(shard.lease.epoch)
        if entry is None:
            return
        if mark.outcomes:
            entry[0].committed(mark)
            self._due.set()
        if shard.is_over and (shard.lease.epoch, True) not in self._leaving:
            self._rounds.wake()

    async def _run_redelivery(self) -> None:
        backoff = GrowingDelay(self._log.database)
        while True:
            self._due.clear()
            now = time.monotonic()
            try:
                await self._redeliver_due(now)
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("redelivery failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
                continue
            backoff.reset()
            times = [due for pump, _ in self._pumps.values() if (due := pump.next_due()) is not None]
            delay = min(min(times, default=now + _ROUND) - time.monotonic(), self._settings.poll_interval, _ROUND)
            try:
                # At most a look each 10 ms, however often something is scheduled.
                await asyncio.sleep(min(max(delay, 0.0), 0.01))
                async with asyncio.timeout(max(delay, 0.0)):
                    await self._due.wait()
            except TimeoutError:
                pass

    async def _redeliver_due(self, now: float) -> None:
        pumps = [pump for pump, _ in self._pumps.values()]
        for pump in pumps:
            pump.passed_due(now)
        requests = [request for pump in pumps if (request := pump.ask_due()) is not None]
        found, gone = await self._redelivery.find_due(requests)
        for due in found:
            if due.epoch in self._pumps:
                self._pumps[due.epoch][0].take_due(due.event, due.letter, begun=due.begun)
        for epoch, positions in gone.items():
            if epoch in self._pumps:
                self._pumps[epoch][0].skip_due(positions)

    # What the pumps ask of the server.

    async def _seconds_until(self, date: datetime) -> float:
        """How long it is to a date by the server's clock; not above 0 when it is past."""
        backoff = GrowingDelay(self._log.database)
        while True:
            try:
                left = await self._log.database.fetchval(
                    "SELECT extract(epoch FROM $1::timestamptz - clock_timestamp())::float8", date
                )
            except DatabaseError as error:
                facts.emit(
                    "asking for the time failed", level=backoff.failed(), failures=backoff.failures, error=str(error)
                )
                await backoff.wait()
            else:
                return float(left)

    async def _prove_end(self) -> int:
        """The log's head, from before everything that is open now."""
        backoff = GrowingDelay(self._log.database)
        while True:
            try:
                return (await self._log.check()).upto
            except DatabaseError as error:
                facts.emit(
                    "proving the end failed", level=backoff.failed(), failures=backoff.failures, error=str(error)
                )
                await backoff.wait()


def _first(group: BaseExceptionGroup[BaseException] | None) -> BaseException:
    """An exception of the group, out of however many groups."""
    error: BaseException | None = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert error is not None  # noqa: S101 - a group is never empty
    return error
