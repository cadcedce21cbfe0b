"""Triggers end to end: events in over HTTP, through the log, out to real targets."""

import asyncio
from base64 import b64decode
from itertools import pairwise
from time import monotonic
from typing import cast

import asyncpg
from aiohttp import web

from pgbackend.facts import Recorder
from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, Broker, send, serving
from tests.serve.support.configs import config
from tests.serve.support.target import Request, Target, failing
from tests.support.backends import complete, dead_letters, settled

FAST = "backoffPolicy: constant, backoffDelay: PT0.01S"


async def test_events_of_every_mode_arrive_unchanged_and_in_log_order(
    database: str, target: Target, other_target: Target
) -> None:
    config = f"""
        triggers:
          binary: {{target: {{url: '{target.url}'}}, order: strict}}
          structured: {{target: {{url: '{other_target.url}', mode: structured}}, order: strict}}
        """
    json_type = {"content-type": "application/json"}
    async with serving(database, config=config) as broker:
        assert (await broker.send(HEADERS | json_type | {"ce-id": "1"}, b' {"n": 1.00}\n')).status == 202
        assert (await broker.send(HEADERS | {"ce-id": "2"}, bytes(range(256)))).status == 202
        assert (await broker.send(HEADERS | {"ce-id": "3"})).status == 202
        text = b'{"specversion":"1.0","id":"4","source":"/","type":"t","time":"2026-01-01T00:00:60.123456789Z",'
        text += b'"data":null}'
        assert (await broker.send(STRUCTURED, text)).status == 202
        text = (
            b'[{"specversion":"1.0","id":"5","source":"/","type":"t","datacontenttype":"text/plain","data":"\\u00e9"},'
        )
        text += b'{"specversion":"1.0","id":"6","source":"/","type":"t","x":-1,"y":true,"data":[ 1 , {"b":2,"a":1}]}]'
        assert (await broker.send(BATCH, text)).status == 202
        await target.wait(6)
        await other_target.wait(6)

        stored = await broker.stored()
    assert target.ids() == other_target.ids() == ["1", "2", "3", "4", "5", "6"]
    for kept, binary, structured in zip(stored, target.requests, other_target.requests, strict=True):
        assert binary.body == (kept.data_bytes or b"")
        expected = kept.attributes_text
        assert structured.event().attributes_text == expected
        # In binary mode, JSON data without a content type gets one, because no envelope implies it.
        if kept.row[11] == "json":
            expected.setdefault("datacontenttype", "application/json")
        assert binary.event().attributes_text == expected
    assert other_target.requests[0].event().get_data() == {"n": 1.0}
    assert other_target.requests[1].event().data_bytes == bytes(range(256))
    assert b'"data":[ 1 , {"b":2,"a":1}]' in other_target.requests[5].body
    assert b'"data":null' in other_target.requests[3].body


async def test_filtered_events_count_as_settled(database: str, target: Target) -> None:
    options = "filters: [{prefix: {type: order.}}, {not: {exact: {subject: draft}}}]"
    async with serving(database, config=config(target, options)) as broker:
        await send(broker, 1, type="order.created")
        await send(broker, 2, type="order.created", subject="draft")
        await send(broker, 3, type="Order.created")
        await send(broker, 4, type="order.paid", subject="final")
        await target.wait(2)
        await settled(broker.backend)
    assert sorted(target.ids()) == ["1", "4"]


class TestRetries:
    async def test_a_failed_event_is_retried_until_it_is_delivered(self, database: str, target: Target) -> None:
        failing(target, 503, times=3)
        async with serving(database, config=config(target, f"deliveryOptions: {{retry: 3, {FAST}}}")) as broker:
            await send(broker, 1)
            await target.wait(4)
            await settled(broker.backend)
            assert await dead_letters(broker.backend) == []
        assert target.ids() == ["1"] * 4

    async def test_waits_follow_the_policy(self, database: str, target: Target) -> None:
        failing(target, 500, times=3)
        options = "deliveryOptions: {retry: 3, backoffPolicy: exponential, backoffDelay: PT0.15S}"
        with Recorder() as recorder:
            async with serving(database, config=config(target, options)) as broker:
                await send(broker, 1)
                times = [request.at for request in await target.wait(4)]
        waits = [later - earlier for earlier, later in pairwise(times)]
        meant = [fact["delay"] for fact in recorder.all("retry scheduled")]
        for wait, delay, least in zip(waits, meant, (0.3, 0.6, 1.2), strict=True):
            # Check the scheduled delay: a busy machine adds to the real one.
            assert least <= cast("float", delay) <= least * 1.1
            assert wait >= least - 0.01

    async def test_without_retries_there_is_one_attempt(self, database: str, target: Target) -> None:
        failing(target, 503, times=100)
        async with serving(database, config=config(target, "deliveryOptions: {retry: 0}")) as broker:
            await send(broker, 1)
            await settled(broker.backend)
            [letter] = await dead_letters(broker.backend)
        assert len(target.requests) == 1
        assert letter.failure.attempts == 1

    async def test_a_final_status_is_not_retried(self, database: str, target: Target) -> None:
        failing(target, 403, times=100)
        async with serving(database, config=config(target, f"deliveryOptions: {{retry: 5, {FAST}}}")) as broker:
            await send(broker, 1)
            await settled(broker.backend)
            [letter] = await dead_letters(broker.backend)
        assert len(target.requests) == 1
        assert "403" in letter.failure.error

    async def test_retry_after_is_obeyed(self, database: str, target: Target) -> None:
        failing(target, 429, times=1, Retry_After="1")
        async with serving(database, config=config(target, f"deliveryOptions: {{retry: 1, {FAST}}}")) as broker:
            await send(broker, 1)
            first, second = await target.wait(2)
        assert second.at - first.at >= 1.0

    async def test_retry_after_is_obeyed_up_to_backoff_max(self, database: str, target: Target) -> None:
        failing(target, 503, times=1, Retry_After="3600")
        options = f"deliveryOptions: {{retry: 1, backoffMax: PT0.5S, {FAST}}}"
        async with serving(database, config=config(target, options)) as broker:
            await send(broker, 1)
            first, second = await target.wait(2)
        assert second.at - first.at >= 0.5

    async def test_a_target_that_was_down_gets_its_events_when_it_is_back(self, database: str, target: Target) -> None:
        down = True

        def answer(request: Request) -> web.Response:
            return web.Response(status=503 if down else 204)

        target.answer = answer
        options = "deliveryOptions: {retry: 1000, backoffPolicy: constant, backoffDelay: PT0.05S, backoffMax: PT0.1S}"
        async with serving(database, config=config(target, options)) as broker:
            await send(broker, *range(5))
            await target.wait(10)
            down = False
            await settled(broker.backend)
            assert await dead_letters(broker.backend) == []
        assert set(target.ids()) == {"0", "1", "2", "3", "4"}


class TestDeadLetters:
    async def test_a_given_up_event_goes_to_the_dead_letter_url_with_the_reason(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        failing(target, 500, times=100)
        options = f"deliveryOptions: {{retry: 1, {FAST}, deadLetterURL: '{other_target.url}dead'}}"
        headers = "headers: {Authorization: Bearer secret}"
        config = f"triggers: {{billing: {{target: {{url: '{target.url}live', {headers}}}, {options}}}}}"
        async with serving(database, config=config) as broker:
            await send(broker, 1, subject="s")
            [dead] = await other_target.wait(1)
            await settled(broker.backend)
            assert await dead_letters(broker.backend) == []
            [kept] = await broker.stored()
        assert target.ids() == ["1", "1"]
        assert dead.path == "/dead"
        assert dead.header("authorization") is None, "a secret of one target went to another"
        assert dead.event().attributes_text == kept.attributes_text | {
            "knativeerrordest": target.url + "live",
            "knativeerrorcode": "500",
            "knativeerrordata": "bm8=",
        }

    async def test_the_dead_letter_url_gets_the_same_retries_before_the_log_keeps_the_event(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        failing(target, 400, times=100)
        failing(other_target, 502, times=100)
        options = f"deliveryOptions: {{retry: 2, {FAST}, deadLetterURL: '{other_target.url}'}}"
        async with serving(database, config=config(target, options)) as broker:
            await send(broker, 1, data={"n": 1})
            await other_target.wait(3)
            await settled(broker.backend)
            [letter] = await dead_letters(broker.backend)
        assert (len(target.requests), len(other_target.requests)) == (1, 3)
        assert letter.event.data_bytes == b'{"n": 1}'
        assert letter.failure.error == f"Reject: {target.url} answered 400 Bad Request"
        assert letter.failure.details["knativeerrorcode"] == "400"

    async def test_a_dead_letter_url_that_recovers_gets_the_event(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        failing(target, 400, times=100)
        failing(other_target, 503, times=2)
        options = f"deliveryOptions: {{retry: 2, {FAST}, deadLetterURL: '{other_target.url}'}}"
        async with serving(database, config=config(target, options)) as broker:
            await send(broker, 1)
            await other_target.wait(3)
            await settled(broker.backend)
            assert await dead_letters(broker.backend) == []

    async def test_without_a_target_url_events_go_to_the_dead_letter_url_at_once(
        self, database: str, target: Target
    ) -> None:
        config = f"triggers: {{billing: {{deliveryOptions: {{retry: 5, deadLetterURL: '{target.url}'}}}}}}"
        async with serving(database, config=config) as broker:
            await send(broker, 1)
            [dead] = await target.wait(1)
            await settled(broker.backend)
        assert b64decode(dead.event().attributes_text["knativeerrordata"]) == b"the trigger has no target URL"

    async def test_without_any_url_the_log_keeps_the_event(self, database: str) -> None:
        async with serving(database, config="triggers: {billing: }") as broker:
            await send(broker, 1)
            await settled(broker.backend)
            [letter] = await dead_letters(broker.backend)
        assert letter.event.id == "1"

    async def test_a_dead_letter_can_be_redelivered(self, database: str, target: Target) -> None:
        failing(target, 400, times=1)
        async with serving(database, config=config(target)) as broker:
            await send(broker, 1)
            await settled(broker.backend)
            assert await broker.backend.redeliver(subscription="billing") == 1
            await target.wait(2)
        assert target.ids() == ["1", "1"]


class TestOrderAndConcurrency:
    async def test_strict_order_survives_failures(self, database: str, target: Target) -> None:
        failing(target, 503, times=2)
        async with serving(
            database, config=config(target, f"order: strict, deliveryOptions: {{retry: 5, {FAST}}}")
        ) as broker:
            await send(broker, *range(20))
            await target.wait(22)
            await settled(broker.backend)
        assert target.ids() == ["0", "0"] + [str(number) for number in range(20)]

    async def test_events_of_one_key_arrive_one_after_another(self, database: str, target: Target) -> None:
        async with serving(database, config=config(target, "order: key, shards: 4")) as broker:
            for number in range(30):
                await send(broker, number, partitionkey=str(number % 3))
            await target.wait(30)
            await settled(broker.backend)
        for key in range(3):
            ids = [id_ for id_ in map(int, target.ids()) if id_ % 3 == key]
            assert ids == sorted(ids)

    async def test_concurrency_is_how_many_requests_are_open_at_a_time(self, database: str, target: Target) -> None:
        open_now = most = 0

        async def answer(request: Request) -> web.Response:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0.02)
            open_now -= 1
            return web.Response(status=204)

        target.answer = answer
        async with serving(database, config=config(target, "concurrency: 3")) as broker:
            await send(broker, *range(30))
            await target.wait(30)
            await settled(broker.backend)
        assert most == 3


class TestStartAndBounds:
    async def test_a_new_trigger_starts_at_the_end_of_the_log(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            await send(broker, "before")
        async with serving(database, config=config(target)) as broker:
            await send(broker, "after")
            await target.wait(1)
            await settled(broker.backend)
        assert target.ids() == ["after"]

    async def test_start_earliest_delivers_the_whole_log(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            await send(broker, "before")
        async with serving(database, config=config(target, "start: earliest")) as broker:
            await target.wait(1)
            await settled(broker.backend)
        assert target.ids() == ["before"]

    async def test_an_existing_trigger_continues_at_its_place(self, database: str, target: Target) -> None:
        for start in ("latest", "earliest"):
            async with serving(database, config=config(target, f"start: {start}")) as broker:
                await send(broker, start)
                await target.wait(1)
                await settled(broker.backend)
        assert target.ids() == ["latest", "earliest"]

    async def test_bounds_by_position_are_exclusive_and_complete_the_trigger(
        self, database: str, target: Target
    ) -> None:
        async with serving(database) as broker:
            await send(broker, *range(1, 9))
            first = (await broker.backend.status()).head - 7
        bounds = f"bounds: {{byId: {{start: {first + 1}, end: {first + 5}}}}}, order: strict"
        async with serving(database, config=config(target, bounds)) as broker:
            await target.wait(3)
            await complete(broker.backend)
        assert target.ids() == ["3", "4", "5"]

    async def test_bounds_by_date_compare_the_recorded_time(self, database: str, target: Target) -> None:
        async with serving(database) as broker:
            await send(broker, "old")
        await asyncio.sleep(0.01)
        async with serving(database) as broker:
            now = await _clock(broker)
            await send(broker, "new")
        async with serving(database, config=config(target, f"bounds: {{byDate: {{start: '{now}'}}}}")) as broker:
            await target.wait(1)
            await settled(broker.backend)
        assert target.ids() == ["new"]


async def _clock(broker: Broker) -> str:
    connection = await asyncpg.connect(broker.dsn)
    try:
        now = await connection.fetchval("select clock_timestamp()")
        return str(now.isoformat())
    finally:
        await connection.close()


async def test_a_dead_target_harms_only_its_own_trigger(database: str, target: Target, other_target: Target) -> None:
    """Both targets are on one machine, but neither can use up the connections of the other."""
    released = asyncio.Event()

    async def hang(request: Request) -> web.Response:
        await released.wait()
        return web.Response(status=204)

    target.answer = hang
    config = (
        f"triggers: {{billing: {{target: {{url: '{target.url}'}}}}, other: {{target: {{url: '{other_target.url}'}}}}}}"
    )
    async with serving(database, config=config) as broker:
        began = monotonic()
        await send(broker, *range(300))
        await other_target.wait(300)
        assert monotonic() - began < 20
        released.set()
        await target.wait(300)
    assert sorted(map(int, other_target.ids())) == list(range(300))


async def test_events_from_plain_sql_are_delivered(database: str, target: Target) -> None:
    async with serving(database, config=config(target, "deliveryOptions: {retry: 0}")) as broker:
        connection = await asyncpg.connect(database)
        await connection.execute("insert into pgbackend.events (id, source, type) values ('1', '/sql', 'plain')")
        await connection.close()
        await target.wait(1)
        await settled(broker.backend)
    event = target.requests[0].event()
    assert (event.id, event.source, event.type) == ("1", "/sql", "plain")
