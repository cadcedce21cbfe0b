"""`init()` opens the log once, and `stop()` ends everything in time. test_stopping.py has the rest."""

import asyncio
import time
from contextlib import suppress

import pytest

from pgbackend import Backend, NotRunningError, PgBackendError, ProduceTimeoutError, ProduceUncertainError
from pgbackend.facts import Recorder
from pgbackend.torture.proxy import Proxy
from tests.support.databases import query_value
from tests.support.events import make_event
from tests.support.polling import eventually


async def test_every_verb_before_init_says_to_call_it(database: str) -> None:
    backend = Backend(database)
    calls = (
        backend.produce(make_event("a")),
        backend.produce_many([make_event("a")]),
        backend.produce_many([]),
        backend.subscribe("s", print),
        backend.unsubscribe("s"),
        backend.delete_subscription("s"),
        backend.seek("s", "latest"),
        backend.start(),
        backend.status(),
        backend.probe(),
        backend.reconfigure("s", print),
        backend.alter_subscription("s", order="none", end=None, start="latest"),
        backend.redeliver(1),
    )
    for call in calls:
        with pytest.raises(NotRunningError, match="init"):
            await call
    with pytest.raises(NotRunningError):
        backend.dead_letters()


async def test_a_stopped_backend_says_that_it_was_stopped(backend: Backend) -> None:
    await backend.stop()

    with pytest.raises(NotRunningError, match="stopped"):
        await backend.produce(make_event("a"))
    with pytest.raises(NotRunningError, match="stopped"):
        await backend.init()
    with pytest.raises(NotRunningError, match="stopped"):
        await backend.start()


async def test_init_again_does_nothing(backend: Backend) -> None:
    await backend.init()
    await asyncio.gather(backend.init(), backend.init())
    await backend.produce(make_event("a"))


async def test_concurrent_inits_open_the_log_once(database: str) -> None:
    backend = Backend(database)
    await asyncio.gather(*(backend.init() for _ in range(5)))
    await backend.produce(make_event("a"))
    await backend.stop()

    async def all_gone() -> bool:
        count = await query_value(
            database, "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgbackend%' "
            "AND datname = current_database()"
        )  # fmt: skip
        return bool(count == 0)

    await eventually("every connection is closed", all_gone)


async def test_stop_is_safe_before_init_twice_and_concurrently(database: str) -> None:
    await Backend(database).stop()
    backend = Backend(database)
    await backend.init()
    await asyncio.gather(backend.stop(), backend.stop())
    await backend.stop()


async def test_stop_during_init_leaves_nothing_open(database: str) -> None:
    backend = Backend(database)
    starting = asyncio.create_task(backend.init())
    await asyncio.sleep(0)
    await backend.stop()
    with pytest.raises(NotRunningError, match="while it was being initialized"):
        await starting
    with pytest.raises(NotRunningError, match="stopped"):
        backend.dead_letters()


async def test_stop_ends_while_the_server_is_unreachable(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=0.2, produce_timeout=0.5)
        await backend.init()
        await backend.subscribe("s", print)
        with Recorder() as recorder:
            running = asyncio.create_task(backend.start())
            await recorder.wait("lease claimed")
            proxy.cut()
            await recorder.wait("presence lost")
            began = time.monotonic()
            await backend.stop()
        await running

    assert time.monotonic() - began < 25


async def test_a_silent_network_delays_neither_callers_nor_stop_for_long(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=0.2, produce_timeout=0.5)
        await backend.init()

        async def is_connected() -> bool:
            with suppress(ProduceTimeoutError, ProduceUncertainError):
                await backend.produce(make_event("a"))
                return True
            return False

        await eventually("an event is stored, however slow the machine", is_connected)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(PgBackendError):
            await backend.produce(make_event("b"))
        await backend.stop()
        assert time.monotonic() - began < 25
        proxy.cut()
        proxy.restore()
