import asyncio
import socket
from collections.abc import Callable

import asyncpg
import pytest
import uvloop

from pgbackend.backend import Backend
from pgbackend.facts import Recorder
from pgbackend.postgres.pool import Database
from pgbackend.torture.proxy import Proxy


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_kernel_is_told_to_notice_a_machine_that_vanished(
    database: str, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The kernel was seen to do so with a network that swallowed everything: after 10 s."""

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


async def test_connections_have_the_application_name_of_the_dsn(database: str) -> None:
    observer = await asyncpg.connect(database)
    for dsn, name in (
        (database, "pgbackend"),
        (f"{database}{'&' if '?' in database else '?'}application_name=shop", "shop"),
    ):
        with Recorder() as recorder:
            async with Backend(dsn) as backend:
                await backend.subscribe("s", lambda _: None)
                await recorder.wait("lease claimed")
                found = await observer.fetch(
                    "SELECT DISTINCT application_name AS name FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
        assert [row["name"] for row in found] == [name]
    await observer.close()
