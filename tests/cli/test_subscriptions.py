"""`pgbackend subscriptions`."""

import asyncpg
import pytest

from pgbackend import Backend, Event
from tests.cli.conftest import Run
from tests.support.events import make_event


async def _ignore(event: Event) -> None: ...


@pytest.fixture
async def subscribed(database: str) -> str:
    backend = Backend(database)
    await backend.init()
    await backend.subscribe("billing", _ignore, order="key", start="earliest")
    await backend.stop()
    return database


async def test_the_number_of_shards_can_be_changed_and_is_shown(run: Run, subscribed: str) -> None:
    result = await run("subscriptions", "reshard", "billing", "3", "--dsn", subscribed)
    assert (result.exit_code, result.stdout) == (0, "billing has 3 shards.\n")
    listed = (await run("subscriptions", "list", "--dsn", subscribed)).stdout.splitlines()
    assert listed[0].split() == ["SUBSCRIPTION", "ORDER", "SHARD", "POSITION", "PENDING", "OWNER"]
    assert [line.split() for line in listed[1:]] == [
        ["billing", "key", str(shard), "of", "3", "0", "0", "-"] for shard in range(3)
    ]
    assert "  3 " in (await run("status", "--dsn", subscribed)).stdout


async def test_reshard_names_the_position_that_old_shards_must_reach(run: Run, subscribed: str) -> None:
    assert (await run("subscriptions", "reshard", "billing", "2", "--dsn", subscribed)).exit_code == 0
    async with Backend(subscribed) as backend:
        await backend.produce_many([make_event(str(number)) for number in range(9)])
    connection = await asyncpg.connect(subscribed)
    await connection.execute("UPDATE pgbackend.offsets SET position = 7 WHERE shard = 1")
    await connection.close()
    result = await run("subscriptions", "reshard", "billing", "3", "--dsn", subscribed)
    assert result.stdout == "billing has 3 shards.\nThey begin when the 2 old ones have reached position 7.\n"


async def test_seek_says_what_a_place_ahead_of_the_log_skips(run: Run, subscribed: str) -> None:
    result = await run("subscriptions", "seek", "billing", "5000", "--dsn", subscribed)
    assert (
        result.stdout
        == "billing goes on after 5000.\nThe log is at 0. Events up to 5,000 will not be delivered to billing.\n"
    )


async def test_a_subscription_can_be_moved(run: Run, subscribed: str) -> None:
    assert (await run("subscriptions", "seek", "billing", "latest", "--dsn", subscribed)).exit_code == 0
    wrong = await run("subscriptions", "seek", "billing", "2026-01-01", "--dsn", subscribed)
    assert wrong.exit_code == 2
    assert "a date with its time zone" in wrong.output


async def test_a_subscription_is_deleted_only_when_that_is_confirmed(run: Run, subscribed: str) -> None:
    assert (await run("subscriptions", "delete", "billing", "--dsn", subscribed)).exit_code == 1
    result = await run("subscriptions", "delete", "billing", "--yes", "--dsn", subscribed)
    assert (result.exit_code, result.stdout) == (0, "billing is deleted.\n")
    assert (await run("subscriptions", "list", "--dsn", subscribed)).stdout == "no subscriptions\n"


async def test_an_unknown_subscription_is_one_clear_line(run: Run, database: str) -> None:
    result = await run("subscriptions", "reshard", "nobody", "2", "--dsn", database)
    assert result.exit_code == 1
    assert result.output.startswith("Error: There is no subscription 'nobody'.")
