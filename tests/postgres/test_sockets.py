"""A forked child does not share connections, and host names are resolved without the default executor."""

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from typing import Any

import pytest

from pgbackend import Backend
from pgbackend.postgres import sockets as own_sockets
from pgbackend.postgres.pool import Database
from tests.support.dispatchers import Catch
from tests.support.events import make_event

FORKING = """
import asyncio, os, sys, time
from pgbackend import Backend

def fork(event):
    if os.fork() == 0:
        time.sleep(120)
        os._exit(0)
    print(event.id, flush=True)
    time.sleep(120)

async def main():
    async with Backend(sys.argv[1], lease_timeout=120.0) as backend:
        await backend.subscribe("s", fork, start="earliest")
        await asyncio.sleep(120)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_handlers_child_does_not_keep_the_shards_of_its_dead_parent(database: str) -> None:
    catch = Catch()
    backend = Backend(database, poll_interval=0.1)
    await backend.init()
    await backend.subscribe("s", catch, start="earliest")
    await backend.produce(make_event("a"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", FORKING, database, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"a\n"
        process.kill()
        running = asyncio.create_task(backend.start())
        # The lease would last two minutes.
        await catch.has("a", timeout=30)
        await backend.stop()
        await running
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def test_host_names_are_resolved_although_handlers_fill_the_default_executor(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    full = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    looked_up: list[str] = []
    getaddrinfo = socket.getaddrinfo

    def watched(host: Any, *args: Any, **options: Any) -> Any:
        if host == "localhost":
            looked_up.append(threading.current_thread().name)
        return getaddrinfo(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        async with asyncio.timeout(20):
            transport, _ = await own_sockets.Loop().create_connection(
                asyncio.Protocol, "localhost", listener.getsockname()[1]
            )
        transport.abort()
    finally:
        listener.close()
        release.set()
        await asyncio.gather(*full)
    assert "pgbackend find localhost" in looked_up


async def test_a_cancelled_connect_leaves_no_error_behind() -> None:
    """At every await: asyncpg's protocol fails a future of its own when its transport is closed."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = Database(f"postgresql://me:pw@127.0.0.1:{listener.getsockname()[1]}/db")
        for steps in range(12):
            connecting = asyncio.create_task(target.connect())
            for _ in range(steps):
                await asyncio.sleep(0)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
    await asyncio.sleep(0)
    gc.collect()
    asyncio.get_running_loop().set_exception_handler(None)
    assert complaints == []
