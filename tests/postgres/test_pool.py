import asyncio
import logging
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from urllib.parse import urlsplit

import asyncpg
import pytest
import uvloop

from pgbackend.backend import Backend
from pgbackend.errors import ConnectionLostError, DatabaseError
from pgbackend.facts import Recorder
from pgbackend.postgres.pool import Database, GrowingDelay
from pgbackend.torture.proxy import Proxy, vanished
from tests.support.polling import eventually


def test_a_failure_that_goes_on_is_a_warning_when_it_begins_and_each_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    backoff = GrowingDelay()
    told: list[int] = []
    for _ in range(65):
        if backoff.failed() == logging.WARNING:
            told.append(backoff.failures)
        now += 1.0
    assert told == [1, 31, 61]
    backoff.reset()
    assert (backoff.failed(), backoff.failures) == (logging.WARNING, 1)


async def test_an_outage_of_postgresql_is_a_few_warnings(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """And not some for each second that it lasts."""
    caplog.set_level(logging.INFO, "pgbackend")
    async with Proxy(database) as proxy, Backend(proxy.dsn, poll_interval=0.1) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", lambda _: None)
            await recorder.wait("lease claimed")
            proxy.cut()
            for name in ("presence lost", "claim failed"):
                await recorder.wait(name, timeout=25, count=5)
            proxy.restore()
        warnings = [record.getMessage().partition(" failures=")[0] for record in caplog.records]
        assert {name: warnings.count(name) for name in ("presence lost", "claim failed")} == {
            "presence lost": 1, "claim failed": 1,
        }  # fmt: skip


def _with_hosts(dsn: str, *hosts: str) -> str:
    """The DSN of a proxy, its host replaced by these; "" stands for its own."""
    parts = urlsplit(dsn)
    credentials, at, own = parts.netloc.rpartition("@")
    return parts._replace(netloc=credentials + at + ",".join(host or own for host in hosts)).geturl()


def _refusing() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_a_host_that_has_vanished_hides_none_that_comes_after_it(database: str) -> None:
    async with Proxy(database) as proxy:
        with vanished() as port:
            target = Database(_with_hosts(proxy.dsn, f"127.0.0.1:{port}", _refusing(), ""))
            began = time.monotonic()
            connection = await target.connect(timeout=120)
            assert time.monotonic() - began < 60, "it was waited for"
            # Known from now on: the one that was the primary is asked first.
            again = await target.connect(timeout=120)
            assert proxy.accepted == 2
            await again.close()
            await connection.close()


async def test_when_no_host_is_a_primary_each_says_why() -> None:
    with vanished() as port:
        silent, refusing = f"127.0.0.1:{port}", _refusing()
        target = Database(f"postgresql://me:secret@{silent},{refusing}/app")
        with pytest.raises(ConnectionLostError) as lost:
            await target.connect(timeout=1.0)
    text = str(lost.value)
    assert text.startswith(f"None of {silent},{refusing}/app is a primary now. ")
    assert f"PostgreSQL at {silent} did not answer in time." in text
    assert f"PostgreSQL at {refusing} cannot be reached: " in text


@pytest.mark.direct
async def test_a_primary_that_takes_no_writes_is_passed_over_where_there_are_several(database: str) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(database))
        one = Database(proxy.dsn + "&default_transaction_read_only=on")
        await (await one.connect()).close()
        several = Database(_with_hosts(proxy.dsn, "", _refusing()) + "&default_transaction_read_only=on")
        with pytest.raises(ConnectionLostError, match="takes no writes: unset default_transaction_read_only"):
            await several.connect()


async def test_a_service_that_does_not_tell_its_timeline_is_used_all_the_same(database: str) -> None:
    target = Database(database)
    refused = "SELECT row_number() OVER () FROM generate_series(1, 2) FOR UPDATE"
    target._sql = replace(target._sql, find_timeline=refused)
    connection = await target.connect()
    with pytest.raises(asyncpg.FeatureNotSupportedError):
        await connection.fetch(refused)
    await connection.close()


@pytest.mark.direct
async def test_what_is_wrong_with_every_host_is_no_outage(database: str) -> None:
    async with Proxy(database) as proxy:
        parts = urlsplit(_with_hosts(proxy.dsn, "", ""))
        with pytest.raises(DatabaseError, match="does not exist") as refused:
            await Database(parts._replace(path="/nowhere").geturl()).connect()
        assert not isinstance(refused.value, ConnectionLostError)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_kernel_notices_a_machine_that_vanished(
    database: str, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """In both loops: at rest by questions, in work by what is not acknowledged. (That it does was seen, with a network
    that swallowed everything: after 10 s.)"""

    async def connect() -> list[int]:
        async with Proxy(database) as proxy:
            connection = await Database(proxy.dsn).connect()
            wire = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
            found = [
                wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            ]
            await connection.close()
        return found

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(connect()) == [1, 5, 2, 10_000]


async def test_whoever_finds_the_primary_wakes_all_who_wait_for_it(database: str) -> None:
    async with Proxy(database) as proxy:
        target = Database(proxy.dsn)
        proxy.cut()
        with pytest.raises(ConnectionLostError):
            await target.connect()
        here = asyncio.create_task(target.wait_for_primary(600))
        there = asyncio.create_task(asyncio.to_thread(asyncio.run, target.wait_for_primary(600)))
        await asyncio.sleep(0)
        proxy.restore()

        async def woken() -> bool:
            # As the loops do: each that finds none makes it missing again.
            await (await target.connect()).close()
            target._primaries.missing = True
            return here.done() and there.done()

        await eventually("both are woken", woken)
        await asyncio.gather(here, there)


async def test_connections_bear_the_name_that_the_dsn_gives_them(database: str) -> None:
    observer = await asyncpg.connect(database)
    for dsn, name in (
        (database, "pgbackend"),
        (f"{database}{'&' if '?' in database else '?'}application_name=shop", "shop"),
    ):
        with Recorder() as recorder:
            async with Backend(dsn) as backend:
                await backend.subscribe("s", lambda _: None)
                await recorder.wait("lease claimed")
                names = await observer.fetch(
                    "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
        assert [row[0] for row in names] == [name]
    await observer.close()
