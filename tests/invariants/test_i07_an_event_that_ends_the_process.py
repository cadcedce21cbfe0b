"""I7, where a handler or filter ends the process.

`sys.exit()` ends it with that code and a reason. After some restarts the event is a dead letter, and all others are
handled.
"""

import asyncio
import sys

import pytest

from pgbackend import Backend
from tests.support.events import make_event

PROGRAM = """
import asyncio, os, sys
from pgbackend import Backend, Retry

async def main(dsn, where):
    handled = set()

    async def handle(event):
        if where == "dispatcher" and event.id == "bad":
            sys.exit(3)
        if where == "subtask" and event.id == "bad":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(exit())
        handled.add(event.id)

    async def exit():
        sys.exit(3)

    def plain(event):
        if event.id == "bad":
            sys.exit(3)
        handled.add(event.id)

    def takes(event):
        if where == "filter" and event.id == "bad":
            sys.exit(3)
        if where == "filter kills" and event.id == "bad":
            os._exit(3)
        return True

    async with Backend(dsn, commit_interval=0.01, poll_interval=0.1, lease_timeout=3) as backend:
        await backend.subscribe(
            "s", plain if where == "thread" else handle, filter=takes, start="earliest",
            retry=Retry(attempts=2, delay=0.01, max_delay=0.01),
        )
        while True:
            await asyncio.sleep(0.05)
            (status,) = (await backend.status()).subscriptions
            if not (status.lag or status.redeliveries):
                return

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("where", ["dispatcher", "subtask", "thread", "filter", "filter kills"])
async def test_the_process_ends_with_its_code_and_the_event_becomes_a_dead_letter(database: str, where: str) -> None:
    producer = Backend(database)
    await producer.init()
    await producer.produce_many([make_event(id_) for id_ in ("a", "bad", "b")])
    codes: list[int | None] = []
    said = b""
    while codes[-1:] != [0] and len(codes) < 10:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, database, where, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(60):
            _, stderr = await process.communicate()
        codes.append(process.returncode)
        said += stderr
    letters = [letter async for letter in producer.dead_letters()]
    await producer.stop()

    assert codes[0] == 3
    assert set(codes) == {3, 0}
    # A subtask ends the process before its dispatcher has ended, and `os._exit()` says nothing.
    assert b"process ends" in said or where in ("subtask", "filter kills")
    assert [letter.event.id for letter in letters] == ["bad"]
