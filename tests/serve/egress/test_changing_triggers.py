"""Triggers are added, removed and changed, while events flow and between two starts of the broker."""

import asyncio
import itertools
from collections import Counter
from time import monotonic
from typing import Any

import pytest
from aiohttp import web

from pgbackend import Backend, DatabaseError, SubscriptionBusyError
from pgbackend.facts import Recorder
from pgbackend.serve.config.load import load
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.torture.proxy import Proxy
from tests.serve.support.broker import Broker, send, serving
from tests.serve.support.configs import config, to, triggers
from tests.serve.support.target import Target, failing, holding
from tests.support.backends import complete, dead_letters, settled, status_of
from tests.support.events import make_event
from tests.support.polling import eventually


async def are_running(broker: Broker, *names: str) -> None:
    """Return once exactly these triggers run."""

    async def they_are() -> bool:
        status = await broker.backend.status()
        return {one.name for one in status.subscriptions if one.state == "running"} == set(names)

    await eventually(f"{', '.join(names)} run, and no other", they_are)


def gone(_request: object) -> web.Response:
    return web.Response(status=410)


async def pauses(broker: Broker, name: str = "billing") -> None:
    """Return once the log says that the trigger is paused."""

    async def is_paused() -> bool:
        return (await status_of(broker.backend, name)).paused is not None

    await eventually("the trigger is paused", is_paused)


class TestPausing:
    """A target answers 410."""

    async def test_a_restart_with_the_same_trigger_keeps_the_pause_and_one_with_another_ends_it(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        target.answer = gone
        both = {"billing": to(target), "witness": to(other_target)}
        async with serving(database, config=triggers(**both)) as broker:
            await send(broker, 1)
            await pauses(broker)
            await other_target.wait(1)
        asked = len(target.requests)
        target.answer = lambda request: web.Response(status=204)
        async with serving(database, config=triggers(**both)) as broker:
            await send(broker, 2)
            await other_target.wait(2)
            assert len(target.requests) == asked
            paused = (await status_of(broker.backend, "billing")).paused
            assert paused is not None
            assert paused.by == "dispatcher"
            assert paused.reason.startswith(
                f"{target.url} answered 410 Gone; change the URL of trigger billing, or run"
            )
        async with serving(database, config=triggers(**{**both, "billing": to(target, "concurrency: 2")})) as broker:
            await settled(broker.backend, "billing")
        assert sorted(target.ids()[asked:]) == ["1", "2"]

    async def test_an_operator_resumes_the_trigger_of_every_process(self, database: str, target: Target) -> None:
        target.answer = gone
        with Recorder() as recorder:
            async with (
                serving(database, config=config(target, "shards: 2")) as broker,
                serving(database, config=config(target, "shards: 2")) as other,
            ):
                await recorder.wait("lease claimed", count=3)
                await send(broker, 1)
                await pauses(other)
                await recorder.wait("subscription paused", count=2)
                target.answer = lambda request: web.Response(status=204)
                await other.backend.resume("billing")
                await settled(broker.backend)
                await recorder.wait("subscription resumed", count=2)

    async def test_a_broker_with_the_old_target_does_not_pause_the_new_one(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """During a rolling deployment. The old broker pauses for itself; the new one gets its shards when it ends."""
        target.answer = gone
        with Recorder() as recorder:
            async with (
                serving(database, config=config(target, "shards: 2")) as old,
                serving(database, config=config(other_target, "shards: 2")) as new,
            ):
                await recorder.wait("lease claimed", count=3)
                await new.backend.produce_many([make_event(key, key=key) for key in map(str, range(20))])
                await recorder.wait("subscription paused")
                await other_target.wait(1)
                assert (await status_of(new.backend)).paused is None
                await old.backend.stop()
                await settled(new.backend)
        assert len(recorder.all("subscription paused")) == 1
        assert sorted(other_target.ids()) == sorted(map(str, range(20)))


class TestAddingAndRemoving:
    async def test_an_added_trigger_gets_what_comes_after_it(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            await send(broker, "before")
            with Recorder() as recorder:
                await broker.configure(config(target))
            assert recorder.all("trigger added", trigger="billing")
            await send(broker, "after")
            await target.wait(1)
            await settled(broker.backend)
        assert target.ids() == ["after"]

    async def test_a_removed_trigger_keeps_its_place(self, database: str, target: Target) -> None:
        async with serving(database, config=config(target)) as broker:
            await send(broker, 1)
            await target.wait(1)
            with Recorder() as recorder:
                await broker.configure("{}")
            assert recorder.all("trigger removed", trigger="billing")
            await send(broker, 2, 3)
            await broker.configure(config(target))
            await target.wait(3)
            await settled(broker.backend)
        assert sorted(target.ids()) == ["1", "2", "3"]

    async def test_a_removed_trigger_finishes_its_requests_and_delays_no_other(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        released = holding(target)
        async with serving(database, config=config(target)) as broker:
            await send(broker, 1)
            await target.wait(1)
            with Recorder() as recorder:
                began = monotonic()
                await broker.triggers.apply(load(triggers(other=to(other_target)), origin="test"))
                assert monotonic() - began < 20  # the backend drains for 30 s
                await send(broker, 2)
                await other_target.wait(1)
                assert not recorder.all("trigger removed")
                # It does not delay the next change either.
                await broker.triggers.apply(load(triggers(third=to(other_target)), origin="test"))
                released.set()
                await recorder.wait("trigger removed", trigger="billing")
            await broker.triggers.converged()
            [shard] = (await status_of(broker.backend, "billing")).shards
            assert (shard.position, shard.pending) == (1, 0)
        assert target.ids() == ["1"]

    async def test_a_trigger_that_returns_while_it_is_removed_loses_and_repeats_nothing(
        self, database: str, target: Target
    ) -> None:
        released = holding(target)
        async with serving(database, config=config(target, "order: strict")) as broker:
            await send(broker, 1, 2)
            await target.wait(1)
            await broker.triggers.apply(load("{}", origin="test"))
            await broker.triggers.apply(load(config(target, "order: strict"), origin="test"))
            released.set()
            await broker.triggers.converged()
            await target.wait(2)
            await settled(broker.backend)
        assert target.ids() == ["1", "2"]

    async def test_a_removed_trigger_waits_for_a_hanging_target_no_longer_than_drain_timeout(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        released = holding(target)
        async with serving(database, config=config(target), drain_timeout=0.5) as broker:
            await send(broker, 1)
            await target.wait(1)
            began = monotonic()
            await broker.configure("{}")
            assert 0.4 < monotonic() - began < 20
            # The event is not settled, so it is dispatched again to the next target.
            await broker.configure(config(other_target))
            await other_target.wait(1)
            await settled(broker.backend)
            released.set()
        assert other_target.ids() == ["1"]


class TestChanging:
    async def test_open_requests_finish_as_they_began_and_the_rest_follows_the_change(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        released = holding(target)
        async with serving(database, config=config(target, "concurrency: 2")) as broker:
            await send(broker, *range(6))
            await target.wait(2)
            with Recorder() as recorder:
                await broker.configure(
                    triggers(
                        billing=f"target: {{url: '{other_target.url}', mode: structured, headers: {{X: new}}}},"
                        "filters: [{not: {exact: {id: '5'}}}]"
                    )
                )
            assert recorder.all("trigger changed", trigger="billing")
            await other_target.wait(3)
            released.set()
            await settled(broker.backend)
        assert sorted(target.ids() + other_target.ids()) == ["0", "1", "2", "3", "4"]
        assert len(target.ids()) == 2
        assert {request.header("x") for request in other_target.requests} == {"new"}
        assert other_target.requests[0].header("content-type") == "application/cloudevents+json; charset=utf-8"

    async def test_an_unchanged_trigger_is_not_touched(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """It keeps its connection, and its pause."""
        other_target.answer = gone
        same = {"billing": to(target), "gone": to(other_target)}
        async with serving(database, config=triggers(**same)) as broker:
            await send(broker, 1)
            await target.wait(1)
            await pauses(broker, "gone")
            with Recorder() as recorder:
                await broker.configure(triggers(**same, third=to(target, "filters: [{exact: {id: none}}]")))
                await send(broker, 2)
                await target.wait(2)
                assert (await status_of(broker.backend, "gone")).state.startswith("paused")
                assert recorder.all("trigger added", trigger="third")
                assert not recorder.all("trigger changed")
                # A change ends the pause.
                other_target.answer = lambda request: web.Response(status=204)
                await broker.configure(triggers(billing=same["billing"], gone=to(other_target, "concurrency: 2")))
                await other_target.wait(3)
            await settled(broker.backend, "gone")
        assert len({request.port for request in target.requests}) == 1
        assert sorted(set(other_target.ids())) == ["1", "2"]

    async def test_a_changed_order_applies_at_once(self, database: str, target: Target) -> None:
        async with serving(database, config=config(target)) as broker:
            await send(broker, *range(20))
            await target.wait(20)
            await broker.configure(config(target, "order: strict, deliveryOptions: {retry: 5}"))
            assert (await status_of(broker.backend, "billing")).order == "strict"
            target.requests.clear()
            await send(broker, *range(20, 60))
            await target.wait(40)
            await settled(broker.backend)
        assert target.ids() == [str(number) for number in range(20, 60)]

    async def test_a_changed_end_applies_at_once_and_a_later_one_continues_the_trigger(
        self, database: str, target: Target
    ) -> None:
        async with serving(database, config=config(target, "order: strict")) as broker:
            await send(broker, *range(1, 4))
            await target.wait(3)
            head = (await broker.backend.status()).head
            await broker.configure(config(target, f"order: strict, bounds: {{byId: {{end: {head + 3}}}}}"))
            await send(broker, *range(4, 9))
            await target.wait(5)
            await complete(broker.backend)
            assert target.ids() == ["1", "2", "3", "4", "5"]
            await broker.configure(config(target, f"order: strict, bounds: {{byId: {{end: {head + 5}}}}}"))
            await target.wait(7)
            await complete(broker.backend)
            await broker.configure(config(target, "order: strict"))
            await target.wait(8)
            await settled(broker.backend)
        assert target.ids() == [str(number) for number in range(1, 9)]

    async def test_a_changed_start_moves_the_trigger_and_latest_does_not(self, database: str, target: Target) -> None:
        async with serving(database, config=config(target, "order: strict")) as broker:
            await send(broker, *range(1, 6))
            await target.wait(5)
            await settled(broker.backend)
            head = (await broker.backend.status()).head
            bounds = f"order: strict, bounds: {{byId: {{start: {head - 2}}}}}"
            await broker.configure(config(target, bounds))
            await target.wait(7)
            for options in (f"{bounds}, concurrency: 2", "order: strict", "order: strict, start: earliest"):
                await broker.configure(config(target, options))
            await send(broker, 6)
            await target.wait(8)
            await settled(broker.backend)
        assert target.ids() == ["1", "2", "3", "4", "5", "4", "5", "6"]

    async def test_the_last_of_many_concurrent_changes_wins(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            files = [triggers(billing=to(target, f"concurrency: {n}"), **{f"t{n}": to(target)}) for n in range(1, 9)]
            async with asyncio.TaskGroup() as group:
                for file in files:
                    group.create_task(broker.triggers.apply(load(file, origin="test")))
            await broker.triggers.converged()
            assert broker.triggers.configuration == load(files[-1], origin="test")
            await are_running(broker, "billing", "t8")

    async def test_replies_of_a_target_are_events_for_the_others(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        numbers = itertools.count(1)
        target.answer = lambda request: web.Response(
            headers={"ce-specversion": "1.0", "ce-id": f"r{next(numbers)}", "ce-source": "/target", "ce-type": "reply"}
        )
        bodies = {
            "billing": to(target, "filters: [{exact: {type: order}}]"),
            "other": to(other_target, "filters: [{exact: {type: reply}}]"),
        }
        async with serving(database, config=triggers(**bodies)) as broker:
            await send(broker, 1, 2)
            await other_target.wait(2)
        assert sorted(other_target.ids()) == ["r1", "r2"]

    async def test_two_processes_that_change_together_lose_and_repeat_nothing(
        self, database: str, target: Target
    ) -> None:
        """The processes of one broker see the same change. The rows must be altered once, and moved once."""
        before = config(target, "order: key, shards: 2")
        async with serving(database, config=before) as one, serving(database, config=before) as other:
            await send(one, *range(1, 21))
            await target.wait(20)
            head = (await one.backend.status()).head
            bounds = f"bounds: {{byId: {{start: {head - 2}, end: {head + 100}}}}}"
            for options in ("order: none", "order: key", f"order: key, {bounds}", f"order: none, {bounds}"):
                file = config(target, f"shards: 2, {options}")
                await asyncio.gather(one.configure(file), other.configure(file))
                await send(other, options)
                await settled(one.backend)
        counts = Counter(target.ids())
        assert len(counts) == 24
        assert {id_ for id_, count in counts.items() if count == 2} == {"19", "20", "order: none", "order: key"}
        assert max(counts.values()) == 2

    async def test_a_chain_of_replies_ends_after_max_hops(self, database: str, target: Target) -> None:
        numbers = itertools.count(1)
        target.answer = lambda request: web.Response(
            headers={"ce-specversion": "1.0", "ce-id": f"r{next(numbers)}", "ce-source": "/target", "ce-type": "reply"}
        )
        async with serving(database, config=config(target), max_hops=3) as broker:
            await send(broker, "first")
            await target.wait(3)
            await settled(broker.backend)
        assert target.ids() == ["first", "r1", "r2"]

    async def test_metrics_count_a_trigger_until_it_is_removed(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """Dispatches to the dead-letter URL do not count as those of the trigger."""
        failing(target, 400, times=1)
        with Metrics() as metrics:
            options = f"deliveryOptions: {{deadLetterURL: '{other_target.url}'}}"
            async with serving(database, config=config(target, options), metrics=metrics) as broker:
                await send(broker, 1, 2, 3)
                await target.wait(3)
                await other_target.wait(1)
                await settled(broker.backend)
                said = (await metrics.exposition(None))[0].decode()
                taken = [line for line in said.splitlines() if "consumed" in line and '"billing"' in line]
                assert sorted(line.rpartition(" ")[2] for line in taken if "_total" in line) == ["1.0", "2.0"]
                await broker.configure("{}")
                assert '"billing"' not in (await metrics.exposition(None))[0].decode()


class TestShards:
    async def test_the_number_of_shards_can_change_while_events_are_delivered(
        self, database: str, target: Target
    ) -> None:
        """Two processes see each change at about the same time."""
        before = config(target, "order: key")
        async with serving(database, config=before) as one, serving(database, config=before) as other:
            count = 0
            for options in ("order: key, shards: 4", "shards: 3", "order: strict", "order: key, shards: 2"):
                await send(one, *range(count, count + 20))
                count += 20
                file = config(target, options)
                await asyncio.gather(one.configure(file), other.configure(file))
                await one.triggers.converged()
                await other.triggers.converged()
                [billing] = (await one.backend.status()).subscriptions
                assert f"shards: {len([s for s in billing.shards if s.until is None])}" in f"shards: 1, {options}"
            await target.wait(count)
            await settled(one.backend)
        assert sorted(map(int, target.ids())) == list(range(count))

    async def test_the_number_of_shards_can_change_between_two_starts(self, database: str, target: Target) -> None:
        async with serving(database, config=config(target, "shards: 2")) as broker:
            await send(broker, 1)
            await target.wait(1)
        async with serving(database, config=config(target)) as broker:
            await send(broker, 2)
            await target.wait(2)
            [billing] = (await broker.backend.status()).subscriptions
            assert len(billing.shards) == 1
        assert target.ids() == ["1", "2"]


class TestBounds:
    async def test_bounds_may_lie_beyond_the_head_of_the_log(self, database: str, target: Target) -> None:
        bounds = "order: strict, bounds: {byId: {start: 2, end: 5}}"
        async with serving(database, config=config(target, bounds)) as broker:
            for number in range(1, 7):
                await send(broker, number)
            await target.wait(2)
            await complete(broker.backend)
        assert target.ids() == ["3", "4"]


class TestFailing:
    async def test_a_failed_change_delays_no_other_and_is_tried_again(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            await broker.backend.subscribe("billing", print)  # takes the name in this process
            with Recorder() as recorder:
                file = load(triggers(billing=to(target), other=to(target)), origin="test")
                await asyncio.wait_for(broker.triggers.apply(file), 30)
                await recorder.wait("trigger change failed", trigger="billing", count=2)
                assert recorder.all("trigger added", trigger="other")
                await broker.backend.unsubscribe("billing")
                await recorder.wait("trigger added", trigger="billing")
            await broker.triggers.converged()
            await send(broker, 1)
            await target.wait(2)

    async def test_a_change_that_postgresql_refuses_holds_up_no_other_file(
        self, database: str, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subscribe = Backend.subscribe

        async def refuse(self: Backend, name: str, *args: Any, **options: Any) -> None:
            if name == "billing":
                raise DatabaseError("permission denied")
            await subscribe(self, name, *args, **options)

        async with serving(database) as broker:
            with Recorder() as recorder:
                with monkeypatch.context() as patched:
                    patched.setattr(Backend, "subscribe", refuse)
                    file = load(triggers(billing=to(target), other=to(target)), origin="test")
                    await asyncio.wait_for(broker.triggers.apply(file), 30)
                    assert recorder.all("trigger not changed yet", trigger="billing")
                    assert recorder.all("trigger added", trigger="other")
                await recorder.wait("trigger added", trigger="billing")

    async def test_a_change_that_fails_half_way_and_is_taken_back_leaves_the_old_terms(
        self, database: str, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reshard = Backend.reshard

        async def refuse(self: Backend, name: str, shards: int) -> None:
            if shards == 2:
                raise SubscriptionBusyError("busy", workers=["other"])
            await reshard(self, name, shards)

        monkeypatch.setattr(Backend, "reshard", refuse)
        old = config(target)
        async with serving(database, config=old) as broker:
            with Recorder() as recorder:
                await broker.triggers.apply(load(config(target, "order: key, shards: 2"), origin="test"))
                await recorder.wait("trigger not changed yet", trigger="billing")
                assert (await status_of(broker.backend)).order == "key"
            await broker.configure(old)
            status = await status_of(broker.backend)
        assert status.order == "none"


class TestRestarting:
    async def test_a_restart_with_a_changed_file_has_the_effect_of_a_reload(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        failing(target, 400, times=1)
        async with serving(database, config=config(target, "bounds: {byId: {end: 9999}}")) as broker:
            await send(broker, *range(1, 6))
            await target.wait(5)
            await settled(broker.backend)
            assert len(await dead_letters(broker.backend)) == 1
            head = (await broker.backend.status()).head
        options = f"order: strict, bounds: {{byId: {{start: {head - 2}, end: {head + 2}}}}}"
        for _ in range(2):  # the second time the start is the same, so nothing moves
            async with serving(database, config=config(other_target, options)) as broker:
                await other_target.wait(2)
                await settled(broker.backend)
                assert (await status_of(broker.backend, "billing")).order == "strict"
        async with serving(database, config=config(other_target, options)) as broker:
            await send(broker, 6, 7)
            await other_target.wait(3)
            await complete(broker.backend)
        assert other_target.ids() == ["4", "5", "6"]


class TestWithoutPostgres:
    async def test_a_change_waits_until_postgresql_is_back(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """PostgreSQL goes away in the middle of the change, once with triggers removed and not yet added."""
        async with Proxy(database) as proxy:
            before = triggers(old=to(target), same=to(target), moved=to(target))
            async with serving(proxy.dsn, config=before) as broker:
                await send(broker, 1)
                await target.wait(3)
                for name in ("old", "same", "moved"):
                    # An offset that the cut keeps from being committed would be a repeat.
                    await settled(broker.backend, name)
                with Recorder() as recorder:
                    proxy.cut()
                    new = triggers(new=to(other_target), same=to(target), moved=to(other_target, "order: strict"))
                    applying = asyncio.create_task(broker.triggers.apply(load(new, origin="test")))
                    await recorder.wait("trigger not changed yet", count=2)
                    assert not applying.done()
                    proxy.restore()
                    await applying
                    await broker.triggers.converged()
                    proxy.cut()
                    applying = asyncio.create_task(broker.triggers.apply(load(before, origin="test")))
                    # The connection comes and goes at various points of the change.
                    for _ in range(6):
                        proxy.restore()
                        await asyncio.sleep(0.05)
                        proxy.cut()
                        await asyncio.sleep(0.05)
                    proxy.restore()
                    await applying
                    await broker.triggers.converged()
                await send(broker, 2)
                await target.wait(6)
                for name in ("old", "same", "moved"):
                    await settled(broker.backend, name)
                assert (await status_of(broker.backend, "moved")).order == "none"
        assert sorted(target.ids()) == ["1", "1", "1", "2", "2", "2"]
        assert other_target.requests == []

    async def test_a_broker_with_a_waiting_change_can_stop(self, database: str, target: Target) -> None:
        async with Proxy(database) as proxy, serving(proxy.dsn, config=triggers(a=to(target))) as broker:
            with Recorder() as recorder:
                await broker.configure(triggers(a=to(target), b=to(target)))
                stop_at = asyncio.create_task(recorder.wait("trigger not changed yet"))
                proxy.cut()
                applying = asyncio.create_task(broker.triggers.apply(load(triggers(c=to(target)), origin="test")))
                await stop_at
                applying.cancel()
                await asyncio.wait({applying})
