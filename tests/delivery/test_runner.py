"""`start()` runs one worker after the other, and says what ended the last one."""

import asyncio
from typing import Any

import pytest

from pgbackend import Backend, ConfigError, PgBackendError, ProbeError, SchemaError
from pgbackend.facts import Recorder
from pgbackend.postgres.connections import Dialer
from pgbackend.postgres.pool import Database
from pgbackend.torture.proxy import Proxy
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually


async def test_a_second_start_is_an_error_and_the_first_goes_on(backend: Backend) -> None:
    catch = Catch()
    running = asyncio.create_task(backend.start())
    await asyncio.sleep(0)
    with pytest.raises(PgBackendError, match="already"):
        await backend.start()
    await backend.subscribe("s", catch)
    await backend.produce(make_event("a"))
    await catch.has("a")
    await backend.stop()
    await running


async def test_a_cancelled_start_drains_and_can_be_called_again(backend: Backend) -> None:
    gate = Gate()
    await backend.subscribe("s", gate)
    running = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await gate.holds(1)
    running.cancel()
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert gate.handled == ["a"]
    (status,) = (await backend.status()).subscriptions
    assert (status.lag, status.shards[0].owner) == (0, None)

    again = asyncio.create_task(backend.start())
    await backend.produce(make_event("b"))
    await eventually("it runs again", lambda: gate.handled == ["a", "b"])
    await backend.stop()
    await again


async def test_a_second_cancellation_does_not_wait_for_dispatchers(backend: Backend) -> None:
    gate = Gate()
    await backend.subscribe("s", gate)
    running = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await gate.holds(1)
    running.cancel()
    await asyncio.wait({running}, timeout=0.1)
    assert not running.done()
    running.cancel()
    await asyncio.wait({running}, timeout=30)
    assert running.cancelled()


async def test_a_dead_worker_fails_the_probe_and_shows_in_status(database: str) -> None:
    catch = Catch()
    backend = Backend(database, poll_interval=0.1)
    await backend.init()
    await backend.subscribe("s", catch)
    running = asyncio.create_task(backend.start())
    await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
    await asyncio.wait({running}, timeout=60)
    await execute(database, "ALTER TABLE pgbackend.taken_away RENAME TO offsets")
    assert isinstance(running.exception(), SchemaError)

    (status,) = (await backend.status()).subscriptions
    assert status.state.startswith("worker died: SchemaError")
    with pytest.raises(ProbeError, match="worker died: SchemaError") as caught:
        await backend.probe()
    assert set(caught.value.checks) > {"worker", "write"}

    again = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await catch.has("a")
    await backend.probe()
    await backend.stop()
    await again


async def test_a_worker_cancelled_from_outside_counts_as_dead(database: str) -> None:
    """For example by a handler that cancels all tasks."""
    with pytest.raises(PgBackendError, match="cancelled by something outside"):  # noqa: PT012 - the body is what waits
        async with asyncio.timeout(60), Backend(database) as backend:
            await backend.subscribe("s", print)
            (worker,) = [task for task in asyncio.all_tasks() if task.get_name() == "pgbackend worker"]
            worker.cancel()
            await asyncio.Event().wait()


class Panic(BaseException):
    """Like the panic that Rust extensions raise."""


@pytest.mark.direct
@pytest.mark.parametrize("when", ["at the start", "later"])
async def test_a_worker_whose_presence_dies_is_replaced(
    database: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catch = Catch()
    panics = 1 if when == "at the start" else 0
    connect = Database.connect

    async def panic(self: Database, *, direct: bool = False, **options: Any) -> Any:
        nonlocal panics
        if direct and panics:
            panics -= 1
            raise Panic
        return await connect(self, direct=direct, **options)

    monkeypatch.setattr(Database, "connect", panic)
    with Recorder() as recorder:
        async with Backend(database) as backend:
            await backend.subscribe("s", catch)
            if when == "later":
                await recorder.wait("worker started")
                panics = 1
                ended = "SELECT count(pg_terminate_backend(backend_pid)) FROM pgbackend.workers"
                assert await query_value(database, ended)
            await recorder.wait("presence died")
            await backend.produce(make_event("a"))
            await catch.has("a")


async def test_a_sequence_behind_its_events_ends_start_after_a_new_incarnation(backend: Backend, database: str) -> None:
    """For example when a backup was restored under a running process, which would skip the next events."""
    await backend.produce_many([make_event(str(number)) for number in range(3)])
    running = asyncio.create_task(backend.start())
    with Recorder() as recorder:
        await recorder.wait("worker started")
        await execute(database, "SELECT setval('pgbackend.events_position_seq', 1)")
        await execute(database, "DELETE FROM pgbackend.incarnation")
        with pytest.raises(SchemaError, match="behind its events"):
            await running


async def test_start_waits_until_the_server_is_back(database: str) -> None:
    catch = Catch()
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, poll_interval=0.2)
        await backend.init()
        await backend.subscribe("s", catch)
        proxy.cut()
        with Recorder() as recorder:
            running = asyncio.create_task(backend.start())
            await recorder.wait("worker cannot start")
            proxy.restore()
            async with Backend(database) as producer:
                await producer.produce(make_event("a"))
            await catch.has("a")
        await backend.stop()
        await running


async def test_a_certificate_that_is_missing_for_a_moment_ends_no_worker(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ConfigError("sslcert in the DSN is '/gone': there is no such file, or it may not be read.")

    catch = Catch()
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, poll_interval=0.1)
        await backend.init()
        await backend.subscribe("s", catch)
        with Recorder() as recorder:
            running = asyncio.create_task(backend.start())
            await backend.produce(make_event("before"))
            await catch.has("before")
            with monkeypatch.context() as patched:
                patched.setattr(Dialer, "dial", refuse)
                proxy.reset()
                for fact in ("presence lost", "claim failed", "redelivery failed", "retry watch failed"):
                    await recorder.wait(fact)
            await backend.produce(make_event("after"))
            await catch.has("after")
        assert not running.done()
        await backend.stop()
        await running
