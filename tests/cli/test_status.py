"""`pgbackend status`."""

import json

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from tests.cli.conftest import Run
from tests.support.polling import eventually


async def _ignore(event: Event) -> None: ...


async def test_status_shows_where_the_log_and_its_subscriptions_stand(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore, order="key")
        await backend.unsubscribe("billing")
        await backend.produce(CloudEvent({"type": "t", "source": "/s"}))

    result = await run("status", "--dsn", database)
    assert result.exit_code == 0, result.output
    assert "\nhead 1, " in result.stdout
    heading, row = result.stdout.partition("SUBSCRIPTION")[2].splitlines()[:2]
    assert heading.split()[:4] == ["ORDER", "SHARDS", "LAG", "BEHIND"]
    assert row.split()[:4] == ["billing", "key", "1", "1"]
    assert row.split()[5] == "s", "seconds"


async def test_status_names_open_appenders(run: Run, database: str) -> None:
    connection = await asyncpg.connect(database, server_settings={"application_name": "slow producer"})
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("insert into pgbackend.events (id, source, type) values ('1', '/s', 't')")
    result = await run("status", "--dsn", database)
    assert "slow producer" in result.stdout
    assert str(connection.get_server_pid()) in result.stdout
    await transaction.rollback()
    await connection.close()


async def test_status_as_json_is_one_object_with_everything(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore)
    found = json.loads((await run("status", "--json", "--dsn", database)).stdout)
    assert found["head"] == 0
    (subscription,) = found["subscriptions"]
    assert subscription["name"] == "billing"
    assert subscription["shards"][0]["position"] == 0


async def test_status_of_a_log_in_use_names_the_owner(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore)

        async def owner() -> str | None:
            return (await backend.status()).subscriptions[0].shards[0].owner_name

        name = await eventually("an owner", owner)
        result = await run("status", "--dsn", database)
    assert name
    assert name in result.stdout
    assert "elsewhere" in result.stdout
