"""`pgbackend dead-letters`."""

import asyncio
import json

import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event, Reject
from pgbackend.codec.wire import parse_structured
from tests.cli.conftest import Run
from tests.support.polling import eventually

DATA = '{"order":  17,\n "price": 1.10}'


@pytest.fixture
async def buried(database: str) -> str:
    """The DSN of a log with two dead letters."""

    async def reject(event: Event) -> None:
        raise Reject("no such customer", details={"customer": "17"})

    async with Backend(database) as backend:
        await backend.subscribe("billing", reject)
        for id_ in ("a", "b"):
            envelope = f'"specversion": "1.0", "id": "{id_}", "source": "/shop", "type": "order.created"'
            await backend.produce(parse_structured(f'{{{envelope}, "data": {DATA}}}'.encode()))

        async def both() -> bool:
            return len([letter async for letter in backend.dead_letters()]) == 2

        await eventually("two dead letters", both)
    return database


async def test_list_shows_what_was_given_up_and_why(run: Run, buried: str) -> None:
    result = await run("dead-letters", "list", "--dsn", buried)
    assert result.exit_code == 0, result.output
    heading, first, second = result.stdout.splitlines()
    assert heading.split()[0] == "ID"
    assert "billing" in first
    assert "order.created" in first
    assert "no such customer" in first
    assert second.split()[3] == "b"


async def test_list_keeps_to_its_limit_and_says_so(run: Run, buried: str) -> None:
    result = await run("dead-letters", "list", "--limit", "1", "--dsn", buried)
    assert len(result.stdout.splitlines()) == 2
    assert "more" in result.stderr


async def test_list_of_another_subscription_is_empty(run: Run, buried: str) -> None:
    result = await run("dead-letters", "list", "--subscription", "shipping", "--dsn", buried)
    assert (result.exit_code, result.stdout) == (0, "no dead letters\n")


async def test_json_carries_the_event_as_it_came(run: Run, buried: str) -> None:
    lines = (await run("dead-letters", "list", "--json", "--dsn", buried)).stdout.splitlines()
    first, _ = [json.loads(line) for line in lines]
    assert first["event"]["id"] == "a"
    assert first["details"] == {"customer": "17"}
    assert '"price": 1.10' in lines[0]


async def test_show_prints_one_dead_letter_in_full(run: Run, buried: str) -> None:
    lines = (await run("dead-letters", "list", "--json", "--dsn", buried)).stdout.splitlines()
    id_ = str(json.loads(lines[1])["id"])
    result = await run("dead-letters", "show", id_, "--dsn", buried)
    assert result.exit_code == 0, result.output
    for text in ("no such customer", "customer", "/shop", "order.created", DATA):
        assert text in result.stdout
    assert (await run("dead-letters", "show", id_, "--data", "--dsn", buried)).stdout_bytes == DATA.encode()


async def test_an_event_cannot_control_the_operators_terminal(run: Run, database: str) -> None:
    async def reject(event: Event) -> None:
        raise Reject("no \x1b[2J such customer")

    async with Backend(database) as backend:
        await backend.subscribe("billing", reject)
        await backend.produce(CloudEvent({"type": "t", "source": "/s", "id": "a"}, b"\x1b]0;owned\x07 \xc2\x9b data\n"))

        async def is_buried() -> bool:
            return bool([letter async for letter in backend.dead_letters()])

        await eventually("it is buried", is_buried)
    shown = (await run("dead-letters", "show", "1", "--dsn", database)).stdout
    listed = (await run("dead-letters", "list", "--dsn", database)).stdout

    assert "\\x1b]0;owned\\x07" in shown
    assert all(one.isprintable() or one == "\n" for one in shown + listed)


async def test_show_of_an_unknown_id_fails_clearly(run: Run, database: str) -> None:
    result = await run("dead-letters", "show", "17", "--dsn", database)
    assert result.exit_code == 1
    assert result.stderr == "Error: There is no dead letter 17. Run `pgbackend dead-letters list`.\n"


async def test_redeliver_dispatches_dead_letters_again(run: Run, buried: str) -> None:
    handled: asyncio.Queue[str] = asyncio.Queue()
    result = await run("dead-letters", "redeliver", "--subscription", "billing", "--dsn", buried)
    assert result.stdout == "2 dead letters will be dispatched again.\n", result.output
    async with Backend(buried) as backend, asyncio.timeout(20):
        await backend.subscribe("billing", lambda event: handled.put_nowait(event.id))
        assert {await handled.get(), await handled.get()} == {"a", "b"}


async def test_redeliver_counts_unknown_ids(run: Run, buried: str) -> None:
    result = await run("dead-letters", "redeliver", "987654", "--dsn", buried)
    assert result.exit_code == 1
    assert "1 of these ids" in result.stderr


async def test_redeliver_needs_ids_or_a_subscription(run: Run) -> None:
    dsn = ("--dsn", "postgresql://nobody@localhost:1/nowhere")
    assert (await run("dead-letters", "redeliver", *dsn)).exit_code == 2
    assert (await run("dead-letters", "redeliver", "1", "--subscription", "x", *dsn)).exit_code == 2
