"""Pauses as they are stored."""

from datetime import datetime
from uuid import UUID, uuid4

import pytest

from pgbackend import Backend, SubscriptionNotFoundError
from pgbackend.model import Paused
from pgbackend.subscriptions.leases import Leases
from pgbackend.subscriptions.pauses import Pauses
from tests.support.databases import execute, query_rows, query_value
from tests.support.dispatchers import Catch


class Row:
    """The row of the subscription "s", and what changes its pause."""

    def __init__(self, backend: Backend, dsn: str) -> None:
        self.log = backend._lifecycle.opened().log
        self.pauses = Pauses(self.log, schema="pgbackend")
        self.dsn = dsn

    async def paused(self) -> Paused | None:
        query = "SELECT paused_at, paused_by, pause_reason FROM pgbackend.subscriptions"
        ((at, by, reason),) = await query_rows(self.dsn, query)
        return None if at is None else Paused(at=at, by=by, reason=reason)

    async def resumed_at(self) -> datetime | None:
        found: datetime | None = await query_value(self.dsn, "SELECT resumed_at FROM pgbackend.subscriptions")
        return found

    async def owned_by(self, worker: UUID) -> None:
        await execute(self.dsn, "UPDATE pgbackend.offsets SET owner = $1", worker)

    async def raise_pause(
        self, worker: UUID, *, resumed_at: datetime | None = None, target: str | None = None, reason: str = "gone"
    ) -> bool:
        return await self.pauses.pause_for_dispatcher("s", reason, resumed_at=resumed_at, target=target, worker=worker)


@pytest.fixture
async def row(backend: Backend, database: str) -> Row:
    await backend.subscribe("s", Catch(), target="v1")
    return Row(backend, database)


async def test_an_operators_pause_names_who_made_it_or_the_given_reason(row: Row) -> None:
    await row.pauses.pause("s", None, process="host:1")
    first = await row.paused()
    assert first is not None
    assert first.by == "operator"
    assert first.reason.startswith("no reason given, by role ")
    assert first.reason.endswith(" from host:1")

    await row.pauses.pause("s", "deploy", process="host:1")
    await row.pauses.pause("s", None, process="host:2")
    assert await row.paused() == Paused(at=first.at, by="operator", reason="deploy"), "since then, for the last reason"

    await row.pauses.resume("s")
    await row.pauses.resume("s")
    assert await row.paused() is None


async def test_unknown_subscriptions_are_named(row: Row) -> None:
    for call in (row.pauses.pause("other", None, process="host:1"), row.pauses.resume("other")):
        with pytest.raises(SubscriptionNotFoundError, match="other"):
            await call


async def test_only_a_worker_that_owns_a_shard_can_pause(row: Row) -> None:
    former, owner = uuid4(), uuid4()
    await row.owned_by(owner)
    assert not await row.raise_pause(former)
    assert await row.paused() is None
    assert await row.raise_pause(owner)
    assert not await row.raise_pause(owner, reason="gone for good")
    paused = await row.paused()
    assert paused is not None
    assert (paused.by, paused.reason) == ("dispatcher", "gone"), "the first of two counts"


async def test_a_dispatcher_does_not_replace_an_operators_pause_and_an_operator_replaces_its(row: Row) -> None:
    owner = uuid4()
    await row.owned_by(owner)
    await row.raise_pause(owner)
    dispatchers = await row.paused()
    await row.pauses.pause("s", "later", process="host:1")
    operators = await row.paused()
    assert dispatchers is not None
    assert operators is not None
    assert (operators.by, operators.at > dispatchers.at) == ("operator", True)
    assert not await row.raise_pause(owner)
    assert await row.pauses.change_target("s", "v2") is None
    assert await row.paused() == operators


async def test_a_pause_that_was_raised_before_a_resume_comes_too_late(row: Row) -> None:
    """Even if the subscription was not paused when somebody resumed it."""
    owner = uuid4()
    await row.owned_by(owner)
    await row.pauses.resume("s")
    assert not await row.raise_pause(owner, resumed_at=None)
    assert await row.paused() is None
    assert await row.raise_pause(owner, resumed_at=await row.resumed_at())


async def test_another_target_ends_a_dispatchers_pause_and_refuses_the_old_ones(row: Row) -> None:
    owner = uuid4()
    await row.owned_by(owner)
    assert await row.raise_pause(owner, target="v1")
    assert await row.pauses.change_target("s", "v1") is None, "a restart with the same target"
    assert await row.paused() is not None
    assert await row.pauses.change_target("s", "v2") == "gone"
    assert await row.paused() is None
    assert not await row.raise_pause(owner, target="v1")
    assert await row.raise_pause(owner, target="v2")
    assert await row.pauses.change_target("s", None) == "gone", "a reconfiguration without a target"
    assert await row.raise_pause(owner, target="v2"), "the target is still the same"


async def test_a_claim_and_a_survey_say_how_the_subscription_is_paused(row: Row) -> None:
    await row.pauses.resume("s")
    await row.pauses.pause("s", "later", process="host:1")
    leases = Leases(row.log, schema="pgbackend", worker=uuid4())
    survey = await leases.survey()
    (lease,) = await leases.claim([("s", 1, 0)])
    assert lease.pause == survey.pauses["s"]
    assert (lease.pause.paused, lease.pause.resumed_at) == (await row.paused(), await row.resumed_at())
