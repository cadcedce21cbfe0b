import asyncio
import socket
import time
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend.errors import ConnectionLostError, DatabaseError
from pgbackend.postgres.connections import Connection, Dialer
from pgbackend.postgres.pool import Database
from pgbackend.postgres.primaries import Primaries
from pgbackend.torture.proxy import Proxy, vanished
from tests.support.polling import eventually


def _with_hosts(dsn: str, *hosts: str) -> str:
    """The DSN of a proxy, its host replaced by these; "" stands for its own."""
    parts = urlsplit(dsn)
    credentials, at, own = parts.netloc.rpartition("@")
    return parts._replace(netloc=credentials + at + ",".join(host or own for host in hosts)).geturl()


def _refusing() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_a_silent_host_does_not_hide_those_after_it(database: str) -> None:
    async with Proxy(database) as proxy:
        with vanished() as port:
            target = Database(_with_hosts(proxy.dsn, f"127.0.0.1:{port}", _refusing(), ""))
            began = time.monotonic()
            connection = await target.connect(timeout=120)
            assert time.monotonic() - began < 60, "it waited for the silent host"
            # The last primary is asked first from now on.
            again = await target.connect(timeout=120)
            assert proxy.accepted == 2
            await again.close()
            await connection.close()


async def test_without_a_primary_each_host_says_why() -> None:
    with vanished() as port:
        silent, refusing = f"127.0.0.1:{port}", _refusing()
        target = Database(f"postgresql://me:secret@{silent},{refusing}/app")
        with pytest.raises(ConnectionLostError) as lost:
            await target.connect(timeout=1.0)
    text = str(lost.value)
    assert text.startswith(f"None of {silent},{refusing}/app is a primary now. ")
    assert f"PostgreSQL at {silent} did not answer in time." in text
    assert f"PostgreSQL at {refusing} cannot be reached: " in text


async def test_a_lost_connection_of_the_pool_keeps_the_drivers_error_as_its_cause(database: str) -> None:
    async with Proxy(database) as proxy:
        log = Database(proxy.dsn)
        await log.open()
        proxy.cut()
        with pytest.raises(ConnectionLostError):  # of the connection that the pool had
            await log.execute("SELECT 1")
        with pytest.raises(ConnectionLostError) as lost:
            await log.execute("SELECT 1")
        assert isinstance(lost.value.__cause__, OSError | asyncpg.PostgresError)
        await log.close()


@pytest.mark.direct
async def test_a_read_only_primary_is_passed_over_only_among_several_hosts(database: str) -> None:
    async with Proxy(database) as proxy:
        one = Database(proxy.dsn + "&default_transaction_read_only=on")
        await (await one.connect()).close()
        several = Database(_with_hosts(proxy.dsn, "", _refusing()) + "&default_transaction_read_only=on")
        with pytest.raises(ConnectionLostError, match="takes no writes: unset default_transaction_read_only"):
            await several.connect()


@pytest.mark.direct
async def test_a_server_that_hides_its_timeline_is_used_all_the_same(empty_database: str) -> None:
    parts = urlsplit(empty_database)
    role = "guest_" + parts.path[-12:]
    owner = await asyncpg.connect(empty_database)
    await owner.execute("REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC")
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    try:
        host = parts.netloc.rpartition("@")[2]
        connection = await Database(parts._replace(netloc=f"{role}:secret@{host}").geturl()).connect()
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT * FROM pg_control_system()")
        await connection.close()
    finally:
        await owner.execute(f"DROP ROLE {role}")
        await owner.close()


@pytest.mark.direct
async def test_a_refusal_by_every_host_is_no_outage(database: str) -> None:
    async with Proxy(database) as proxy:
        parts = urlsplit(_with_hosts(proxy.dsn, "", ""))
        with pytest.raises(DatabaseError, match="does not exist") as refused:
            await Database(parts._replace(path="/nowhere").geturl()).connect()
        assert not isinstance(refused.value, ConnectionLostError)


async def test_finding_the_primary_ends_all_waits_for_it(database: str) -> None:
    """Those in other threads as well."""
    async with Proxy(database) as proxy:
        target = Database(proxy.dsn)
        here = asyncio.create_task(target.wait_for_primary(600))
        there = asyncio.create_task(asyncio.to_thread(asyncio.run, target.wait_for_primary(600)))

        async def both_ended() -> bool:
            proxy.cut()
            with pytest.raises(ConnectionLostError):
                await target.connect()
            proxy.restore()
            await (await target.connect()).close()
            return here.done() and there.done()

        await eventually("both waits end", both_ended)
        await asyncio.gather(here, there)


async def test_a_connection_made_while_its_caller_is_cancelled_twice_is_closed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Connection] = []
    loop = asyncio.get_running_loop()
    prepare = Dialer.prepare

    async def prepare_and_cancel(dialer: Dialer, connection: Connection) -> None:
        await prepare(dialer, connection)
        made.append(connection)
        # The first cancellation finds the caller waiting for this task, the second one waiting for its end.
        caller.cancel()
        loop.call_soon(caller.cancel)

    monkeypatch.setattr(Dialer, "prepare", prepare_and_cancel)
    caller = asyncio.create_task(Database(database).connect())
    with pytest.raises(asyncio.CancelledError):
        await caller
    await eventually("the connection is closed", made[0].is_closed)


async def test_a_connection_whose_caller_is_cancelled_while_other_hosts_are_left_is_closed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Connection] = []
    loop = asyncio.get_running_loop()
    prepare = Dialer.prepare

    async def keep(dialer: Dialer, connection: Connection) -> None:
        await prepare(dialer, connection)
        made.append(connection)

    monkeypatch.setattr(Dialer, "prepare", keep)

    def cancel(_: Primaries) -> None:
        loop.call_soon(caller.cancel)

    # The caller does this last before it waits for the end of the other attempts.
    monkeypatch.setattr(Primaries, "_wake_waiters", cancel)
    caller: asyncio.Task[Connection]
    async with Proxy(database) as proxy:
        with vanished() as port:
            caller = asyncio.create_task(Database(_with_hosts(proxy.dsn, f"127.0.0.1:{port}", "")).connect())
            with pytest.raises(asyncio.CancelledError):
                await caller
        await eventually("the connection is closed", made[0].is_closed)
