"""Conditions of a whole server: settings, limits, standbys, failovers."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from tests.doctor.conftest import found, only
from tests.support.databases import connected
from tests.support.memory import memory
from tests.support.polling import eventually
from tests.support.standby import Pair, Server

pytestmark = pytest.mark.slow


@pytest.fixture
async def directory() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pgbackend-doctor-", dir=memory(), ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_settings_of_the_server_are_found(directory: Path, pg_programs: Path) -> None:
    settings = {"max_connections": "12", "max_locks_per_transaction": "10", "autovacuum": "off"}
    async with Server(directory / "a", programs=pg_programs, settings=settings) as server:
        await schema.migrate(Database(server.dsn).connect, "pgbackend")
        assert {one.subject for one in await found(server.dsn)} == {"setting autovacuum"}
        async with connected(server.dsn) as connection:
            for lower in range(1_000_000_000, 1_050_000_000, 1_000_000):
                await connection.execute(
                    f"CREATE TABLE pgbackend.events_{lower} PARTITION OF pgbackend.events "
                    f"FOR VALUES FROM ({lower}) TO ({lower + 1_000_000})"
                )
        await server.configure("full_page_writes", "off")
        await server.configure("track_counts", "off")
        async with connected(server.dsn), connected(server.dsn), connected(server.dsn):
            findings = {f"{one.check}: {one.subject}": one for one in await found(server.dsn)}
        assert findings.keys() == {
            "autovacuum: setting autovacuum",
            "autovacuum: setting track_counts",
            "connections: the server",
            "durability: setting full_page_writes",
            "locks: setting max_locks_per_transaction",
        }
        assert findings["connections: the server"].cure == "ALTER SYSTEM SET max_connections = 38;"
        async with connected(server.dsn) as connection:
            for finding in findings.values():
                # autovacuum has none: the command that started the server turned it off.
                for line in (finding.cure or "").splitlines():
                    await connection.execute(line)
        assert "autovacuum: setting track_counts" not in {
            f"{one.check}: {one.subject}" for one in await found(server.dsn)
        }, "settings that need no restart count at once"


async def test_standbys_are_told_from_the_primary_before_and_after_a_failover(
    directory: Path, pg_programs: Path
) -> None:
    async with Pair(directory, programs=pg_programs, settings={"hot_standby_feedback": "on"}) as pair:
        former, standby = pair.primary, pair.standby
        await schema.migrate(Database(pair.dsn).connect, "pgbackend")
        assert await found(pair.dsn) == []

        alone = only(await found(standby.dsn), "standby")
        assert (alone.severity, alone.cure) == ("error", "SELECT pg_promote();")

        async with standby.connected() as reader, reader.transaction(isolation="repeatable_read", readonly=True):
            await eventually("the standby has the log", lambda: _has_log(standby))
            await reader.fetchval("SELECT 1")

            async def holds() -> bool:
                return any(one.check == "standby-feedback" for one in await found(pair.dsn, horizon=0))

            await eventually("the standby reports its query", holds)

        await pair.primary.configure("synchronous_standby_names", "FIRST 2 (nobody, standby)")
        waits = only(await found(pair.dsn), "synchronous-standby")
        assert waits.severity == "error"
        assert waits.what.startswith("Each commit waits for 2 of")
        async with former.connected() as first, former.connected() as second:
            # A commit without WAL of its own waits for no standby.
            notify = "SELECT pg_logical_emit_message(true, 'test', ''), pg_notify('c', '')"
            notifying = [asyncio.create_task(one.execute(notify)) for one in (first, second)]

            async def wait() -> bool:
                return any(one.check == "notify-wait" for one in await found(pair.dsn))

            await eventually("one NOTIFY waits for the other", wait)
            # The waits end with the warning that no standby has confirmed them.
            await former.configure("synchronous_standby_names", "")
            await asyncio.gather(*notifying)
        await former.configure("synchronous_standby_names", "FIRST 2 (nobody, standby)")
        async with former.connected() as connection:
            for line in str(waits.cure).splitlines():
                await connection.execute(line)
        assert await found(pair.dsn) == []

        await pair.promote()
        left = only(await found(pair.dsn), "former-primary")
        assert (left.severity, left.subject) == ("error", f"127.0.0.1:{former.port}")


async def _has_log(server: Server) -> bool:
    return bool(await server.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'pgbackend'"))
