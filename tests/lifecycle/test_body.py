"""`async with`: a dead worker cancels the body, and errors of the body come first."""

import asyncio

import pytest

from pgbackend import Backend, SchemaError
from tests.support.databases import execute


async def test_the_error_of_the_body_is_raised(database: str) -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - the body is what raises
        async with Backend(database) as backend:
            await backend.subscribe("s", print)
            raise KeyError("mine")


async def test_a_dead_worker_cancels_the_body(database: str) -> None:
    went_on = False
    with pytest.raises(SchemaError, match="offsets"):  # noqa: PT012 - the body is what waits
        async with asyncio.timeout(60), Backend(database, poll_interval=0.1) as backend:
            await backend.subscribe("s", print)
            await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
            await asyncio.Event().wait()
            went_on = True

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not went_on


async def test_a_dead_worker_hides_neither_a_cancellation_nor_an_error_of_the_body(database: str) -> None:
    async def run(*, also_cancelled: bool) -> None:
        async with Backend(database, poll_interval=0.1) as backend:
            await backend.subscribe("s", print)
            try:
                # The worker may see it, die and cancel this body before the call returns.
                await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
                await asyncio.Event().wait()
            finally:
                await execute(database, "ALTER TABLE pgbackend.taken_away RENAME TO offsets")
                if not also_cancelled:
                    raise KeyError("mine")
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)

    with pytest.raises(KeyError, match="mine"):
        await asyncio.wait_for(run(also_cancelled=False), 60)
    cancelled = asyncio.create_task(run(also_cancelled=True))
    await asyncio.wait({cancelled}, timeout=60)
    assert cancelled.cancelled()
