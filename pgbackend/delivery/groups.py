"""Groups: events that one call of a dispatcher handles, in batches (`batch`) or in a transaction (`transactional`).

    ready ──take up to `batch`──▶ at work ──returns──▶ settled
                                     │ raises
                                     ├──it was one event──▶ failed, as any other
                                     ├──Failed──▶ its events failed; the others are handled, or rolled back: again
                                     └──else──▶ again in halves, until an event that fails is alone

A group is at work under its first event. Its promise is that of a single dispatch: each event is settled, failed or put
back, and in ordered modes no event overtakes one of its lane that failed.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Backlog
from pgbackend.delivery.deliverers import Deliverer
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.feed import Feed
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.registration import Dispatch, Handling, Registration
from pgbackend.delivery.settlement import Settlement
from pgbackend.delivery.shard import Shard
from pgbackend.delivery.transactions import LeaseLost, PutOff, Transactions
from pgbackend.errors import Failed, Pause, shown
from pgbackend.postgres.connections import Connection
from pgbackend.thrown import Thrown, describe, leave_process


@dataclass(frozen=True, slots=True)
class _Target:
    """The target of a group: the options as they were when it was taken, whatever `reconfigure()` says meanwhile."""

    deliverer: Deliverer
    dispatch: Dispatch
    handling: Handling
    health: TargetHealth
    is_fresh: bool
    """Whether the events come from `Backlog.ready`, so that nothing is on record about them."""
    probe: bool = False


class Groups:
    """Dispatches the groups of a shard, and hands what comes of them to the settlement."""

    def __init__(
        self,
        registration: Registration,
        shard: Shard,
        gate: Gate,
        backlog: Backlog,
        settlement: Settlement,
        feed: Feed,
        transactions: Transactions,
        *,
        stir: Callable[[], None],
    ) -> None:
        """`stir`: called when something in the backlog or the window may have changed."""
        self._registration = registration
        self._shard = shard
        self._gate = gate
        self._backlog = backlog
        self._settlement = settlement
        self._feed = feed
        self._transactions = transactions
        self._stir = stir
        self._filling: asyncio.Future[None] | None = None
        """The deliverer whose batch is not full yet waits for it."""
        self._filling_for: Handling | None = None
        """How that batch was to be handled when the wait began."""

    async def deliver_ready(self, deliverer: Deliverer) -> None:
        """Dispatch the next group, once it is full or has waited for long enough."""
        handling, backlog = self._registration.handling, self._backlog
        if handling.batch_wait and not self._is_filled():
            if self._filling is not None:
                # Another deliverer waits for the same batch.
                await deliverer.idle()
                return
            await self._fill(handling)
            if not backlog.ready or self._must_wait(self._registration.health) or self._is_outdated(handling):
                return
        group = [Delivery(event) for event in backlog.take_group(handling.batch or 1)]
        if backlog.ready:
            deliverer.wake_next()
        await self._dispatch(self._target(deliverer, self._registration.dispatch, is_fresh=True), group)
        # A dispatcher that never waits must not keep commits and other subscriptions waiting.
        await asyncio.sleep(0)

    async def deliver(self, deliverer: Deliverer, delivery: Delivery, dispatch: Dispatch, *, probe: bool) -> None:
        """Dispatch a delivery by itself."""
        await self._dispatch(self._target(deliverer, dispatch, is_fresh=False, probe=probe), [delivery])

    def look(self) -> None:
        """Something has changed: a batch that is being filled may be full."""
        if self._filling is not None and (self._is_filled() or self._is_outdated(self._filling_for)):
            _wake(self._filling)

    def _is_filled(self) -> bool:
        """Whether a batch would gain nothing from waiting, or must not wait."""
        backlog = self._backlog
        return bool(
            backlog.has_group(self._registration.handling.batch or 1) or self._shard.window.full or self._feed.waits
            or backlog.retries or backlog.given_up or self._registration.health.held or self._gate.halted
        )  # fmt: skip

    def _is_outdated(self, handling: Handling | None) -> bool:
        """Whether the subscription was reconfigured since it had this handling."""
        return handling is not self._registration.handling

    async def _fill(self, handling: Handling) -> None:
        """Return when a batch has waited for long enough, or need not wait any more."""
        loop = asyncio.get_running_loop()
        self._filling, self._filling_for = loop.create_future(), handling
        alarm = loop.call_later(handling.batch_wait, _wake, self._filling)
        try:
            await self._filling
        finally:
            self._filling = self._filling_for = None
            alarm.cancel()

    def _target(self, deliverer: Deliverer, dispatch: Dispatch, *, is_fresh: bool, probe: bool = False) -> _Target:
        registration = self._registration
        return _Target(deliverer, dispatch, registration.handling, registration.health, is_fresh, probe)

    async def _dispatch(self, target: _Target, group: list[Delivery]) -> None:
        """Dispatch these deliveries together, and in parts as far as need be."""
        rest, suspects = group, 0
        while rest:
            # The first `suspects` of them have failed together.
            size = (suspects + 1) // 2 or len(rest)
            now, later = rest[:size], rest[size:]
            raised = await self._call(target, now)
            if raised is None:
                rest, suspects = later, max(suspects - size, 0)
            elif self._is_no_attempt(raised):
                self._put_back(target, rest)
                await self._recover(raised)
                return
            elif named := _named(raised, now):
                rest, suspects = self._fail(target, named, now, later), 0
            elif size == 1:
                rest, suspects = self._fail(target, {0: raised}, now, later), 0
            elif self._ends_all(target, now[0], raised):
                self._put_back(target, rest)
                return
            else:
                suspects = size
                facts.emit(
                    "batch failed", shard=self._shard.name, events=size, error=describe(raised),
                    effect="Its events are dispatched again in halves.",
                )  # fmt: skip
            self._stir()
            if rest and self._must_wait(target.health):
                self._put_back(target, rest)
                return

    async def _call(self, target: _Target, group: Sequence[Delivery]) -> BaseException | None:
        """Call the dispatcher once. Returns what it raised; if nothing, the deliveries are settled."""
        first = group[0]
        work: Event | list[Event] = first.event if target.handling.batch is None else [one.event for one in group]

        async def dispatch(_: Event) -> object:
            if not target.handling.transactional:
                return await target.dispatch(work)
            await self._transactions.run(handle, group, are_fresh=target.is_fresh)
            return None

        async def handle(connection: Connection) -> object:
            if target.health.paused is not None:
                # While PostgreSQL began the transaction.
                raise PutOff("the subscription was paused before its dispatcher was called")
            return await target.dispatch(work, connection)

        raised = await target.deliverer.dispatch(first.slot, first.event, dispatch)
        if raised is None:
            self._handled(target, group)
        return raised

    def _handled(self, target: _Target, deliveries: Iterable[Delivery]) -> None:
        """The dispatcher has handled these. In transactional subscriptions that is committed."""
        for delivery in deliveries:
            if target.handling.transactional:
                self._settlement.committed(delivery, target.health)
            elif target.is_fresh:
                self._settlement.handled_at_once(delivery.event, target.health)
            else:
                self._settlement.handled(delivery, target.health)

    def _fail(
        self, target: _Target, named: Mapping[int, BaseException], group: Sequence[Delivery], later: Sequence[Delivery]
    ) -> list[Delivery]:
        """Some of a group failed, by their places in it. Returns what is to be dispatched again, and what is left.

        In ordered modes an event waits in the backlog for those before it in its lane that failed. If one before it is
        dispatched again, it waits for that, whether it failed or not: retries come in no order.
        """
        handled: list[Delivery] = []
        failed: list[tuple[Delivery, BaseException]] = []
        rest: list[Delivery] = []
        held: list[Event] = []
        open_lanes, blocked_lanes = set[object](), set[object]()
        for index, delivery in enumerate((*group, *later)):
            lane = self._backlog.lane_of(delivery.event)
            error = named.get(index)
            if error is None and index < len(group) and not target.handling.transactional:
                handled.append(delivery)
            elif lane in blocked_lanes or (error is not None and lane in open_lanes):
                blocked_lanes.add(lane)
                held.append(delivery.event)
            elif error is not None:
                failed.append((delivery, error))
                if lane is not None:
                    blocked_lanes.add(lane)
            else:
                rest.append(delivery)
                if lane is not None:
                    open_lanes.add(lane)
        # First: the last event that leaves a lane takes the next one from there.
        self._backlog.hold_back(held)
        self._ask_filter_again(target)
        self._handled(target, handled)
        for delivery, error in failed:
            # A target that fails only for some of a group is not down.
            at_fault = len(named) == len(group)
            self._settlement.failed(delivery, error, target.health, probe=target.probe, at_fault=at_fault)
        return rest

    def _is_no_attempt(self, raised: BaseException) -> bool:
        """Whether the transaction failed by no fault of the events."""
        # By its type: `isinstance()` would also ask the object, whose answer may raise.
        return issubclass(type(raised), PutOff | LeaseLost)

    async def _recover(self, raised: BaseException) -> None:
        """Return when it is time to try again, or the shard is given up."""
        if isinstance(raised, PutOff):
            await self._transactions.pause(raised)
        else:
            facts.emit(
                "transaction without effect", level=logging.WARNING, shard=self._shard.name, error=describe(raised)
            )
            await self._transactions.report_lost()

    def _ends_all(self, target: _Target, first: Delivery, raised: BaseException) -> bool:
        """Whether what a whole batch raised ends dispatching: a pause, or the end of the process."""
        if issubclass(type(raised), Pause):
            self._settlement.pause(first.event, Thrown.of(raised), target.health)
            return True
        return leave_process(raised, subscription=self._registration.name, position=first.event.position)

    def _put_back(self, target: _Target, deliveries: Sequence[Delivery]) -> None:
        """These wait again as they did before they were taken."""
        if self._gate.stopped or self._shard.lost:
            return
        if target.is_fresh:
            self._backlog.put_back_group([delivery.event for delivery in deliveries])
        else:
            # It was dispatched by itself.
            self._settlement.put_back(deliveries[0])
        self._ask_filter_again(target)

    def _ask_filter_again(self, target: _Target) -> None:
        """If the subscription was reconfigured during a dispatch, the new filter counts for what waits again."""
        if target.health.retired:
            self._settlement.drop_refused()

    def _must_wait(self, health: TargetHealth) -> bool:
        """Whether no new call may start."""
        return self._gate.halted or health.held or not self._shard.may_dispatch()


def _named(raised: BaseException, group: Sequence[Delivery]) -> dict[int, BaseException]:
    """By their places in the group: the errors of the events that a `Failed` names. Empty if it names any other."""
    if not issubclass(type(raised), Failed):
        return {}
    places = {delivery.event: index for index, delivery in enumerate(group)}
    try:
        named = {places[event]: error for event, error in raised.errors.items()}  # type: ignore[attr-defined] # Failed
    except Exception:  # noqa: BLE001 - a user's class may do anything
        return {}
    return {index: _as_error(error) for index, error in sorted(named.items())}


def _as_error(error: object) -> BaseException:
    return error if issubclass(type(error), BaseException) else RuntimeError(shown(error))  # type: ignore[return-value] # just seen


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
