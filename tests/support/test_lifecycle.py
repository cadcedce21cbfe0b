"""The stress test finds each way to break the contract of actors."""

import asyncio

import pytest

from tests.support import lifecycle
from tests.support.lifecycle import Actor, Lifecycle


class Good:
    """Works a little in a task of its own, then waits."""

    def __init__(self) -> None:
        self.worked = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.work())
            await asyncio.Event().wait()

    async def work(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.worked.set()


class LeavesTask(Good):
    async def run(self) -> None:
        self.kept = asyncio.create_task(asyncio.sleep(0.05))
        await self.work()
        await self.kept


class SwallowsCancellation(Good):
    async def run(self) -> None:
        try:
            await super().run()
        except asyncio.CancelledError:
            return


class BreaksAtSecondCancellation(Good):
    async def run(self) -> None:
        cleaned = asyncio.create_task(asyncio.sleep(0.05))
        try:
            await super().run()
        finally:
            await asyncio.shield(cleaned)


class IsUseless(Good):
    async def work(self) -> None:
        await asyncio.Event().wait()


async def stress(kind: type[Good], *, again: bool = False) -> int:
    async def use(actor: Good) -> None:
        await actor.worked.wait()

    def make() -> Actor:
        return kind()

    return await lifecycle.cancel_at_every_step(Lifecycle(make, use), again=again, stride=lambda step: 1)


@pytest.mark.parametrize("again", [False, True])
async def test_every_suspension_of_every_task_is_a_step(again: bool) -> None:
    assert await stress(Good, again=again) == 4


@pytest.mark.parametrize(
    ("broken", "again", "complaint"),
    [
        (LeavesTask, False, "it leaves tasks"),
        (SwallowsCancellation, False, "it ended with"),
        (BreaksAtSecondCancellation, True, "it leaves tasks"),
        (IsUseless, False, "neither of use nor ended"),
    ],
)
async def test_a_broken_actor_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: type[Good], again: bool, complaint: str
) -> None:
    monkeypatch.setattr(lifecycle, "PATIENCE", 0.5)
    with pytest.raises(AssertionError, match=complaint):
        await stress(broken, again=again)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if task.get_name() in ("run", "use"):
            task.cancel()
    await asyncio.sleep(0.1)
