"""The proxy fails on demand."""

import asyncio

import asyncpg
import pytest

from pgbackend.torture.proxy import Proxy


async def test_bytes_pass_unchanged(empty_database: str) -> None:
    async with Proxy(empty_database) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        text = "x" * 1_000_000
        assert await connection.fetchval("select $1::text", text) == text
        assert proxy.accepted == 1
        await connection.close()


async def test_cut_breaks_open_connections_and_refuses_new_ones(empty_database: str) -> None:
    async with Proxy(empty_database) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        waiting = asyncio.create_task(connection.fetchval("select pg_sleep(60)"))
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await waiting
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await asyncpg.connect(proxy.dsn)
        proxy.restore()
        again = await asyncpg.connect(proxy.dsn)
        assert await again.fetchval("select 1") == 1
        await again.close()


async def test_stall_holds_everything_until_restore(empty_database: str) -> None:
    async with Proxy(empty_database) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        proxy.stall()
        waiting = asyncio.create_task(connection.fetchval("select 1"))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        proxy.restore()
        assert await waiting == 1
        await connection.close()


async def test_a_stalled_proxy_can_be_left(empty_database: str) -> None:
    async with asyncio.timeout(30):
        async with Proxy(empty_database) as proxy:
            connection = await asyncpg.connect(proxy.dsn)
            proxy.stall()
            waiting = asyncio.create_task(connection.fetchval("select 1"))
            await asyncio.wait([waiting], timeout=0.1)
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await waiting


async def test_a_lost_reply_leaves_the_work_done(empty_database: str) -> None:
    async with Proxy(empty_database) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        proxy.lose_reply_to(b"create table")
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await connection.execute("create table t ()")
        await proxy.struck()
        direct = await asyncpg.connect(empty_database)
        assert await direct.fetchval("select to_regclass('t') is not null")
        await direct.close()


async def test_the_proxys_dsn_keeps_the_other_options_of_the_targets() -> None:
    for asked, kept in (("", "disable"), ("prefer", "disable"), ("require", "require"), ("verify-full", "verify-ca")):
        dsn = f"postgresql://me:secret@db:5433/app?application_name=shop{'&sslmode=' if asked else ''}{asked}"
        async with Proxy(dsn) as proxy:
            port = proxy.dsn.partition("127.0.0.1:")[2].partition("/")[0]
            assert proxy.dsn == (f"postgresql://me:secret@127.0.0.1:{port}/app?application_name=shop&sslmode={kept}")


async def test_restore_forgets_a_reply_that_was_to_be_lost(empty_database: str) -> None:
    async with Proxy(empty_database) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        proxy.lose_reply_to(b"create table")
        proxy.restore()
        await connection.execute("create table t ()")
        await connection.close()


async def test_redirect_leads_new_connections_to_another_server(empty_database: str) -> None:
    async with Proxy(empty_database) as front, Proxy(empty_database) as behind:
        before = await asyncpg.connect(front.dsn)
        front.redirect(behind.dsn)
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            await before.fetchval("select 1")
        after = await asyncpg.connect(front.dsn)
        assert await after.fetchval("select 1") == 1
        assert behind.accepted == 1
        await after.close()
