"""`pgbackend dead-letters`."""

import asyncio
import json
import signal

import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, ConfigError, Event, Reject, SubscriptionNotFoundError
from pgbackend.codec.wire import parse_structured
from tests.cli.conftest import Command, Run
from tests.support.events import make_event
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
    assert [(entry["what"], entry["attempt"], entry["error"]) for entry in first["history"]] == [
        ("failed", 1, "Reject: no such customer"), ("buried", None, None),
    ]  # fmt: skip
    assert '"price": 1.10' in lines[0]


async def test_show_prints_one_dead_letter_in_full(run: Run, buried: str) -> None:
    lines = (await run("dead-letters", "list", "--json", "--dsn", buried)).stdout.splitlines()
    id_ = str(json.loads(lines[1])["id"])
    result = await run("dead-letters", "show", id_, "--dsn", buried)
    assert result.exit_code == 0, result.output
    for text in ("no such customer", "customer", "/shop", "order.created", DATA, "  attempt 1 failed: Reject: no such"):
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


@pytest.mark.parametrize("command", ["redeliver", "purge"])
async def test_commands_that_change_need_one_choice(run: Run, command: str) -> None:
    dsn = ("--dsn", "postgresql://nobody@localhost:1/nowhere")
    for choice in ((), ("1", "--subscription", "x"), ("1", "--all"), ("--all", "--group", "x")):
        assert (await run("dead-letters", command, *choice, *dsn)).exit_code == 2


async def bury(dsn: str, failures: dict[str, str], subscription: str = "billing") -> None:
    """Dead letters of one subscription, by the ids of their events, with these errors."""

    async def reject(event: Event) -> None:
        raise Reject(failures[event.id])

    async with Backend(dsn) as backend:
        await backend.subscribe(subscription, reject)
        for id_ in failures:
            await backend.produce(make_event(id_))

        async def all_of_them() -> bool:
            return len([letter async for letter in backend.dead_letters(subscription)]) == len(failures)

        await eventually("dead letters", all_of_them)
        await backend.unsubscribe(subscription)


@pytest.fixture
async def grouped(database: str) -> str:
    """The DSN of a log with five dead letters of three failure groups."""
    customer = "no customer {}, request 2e1b9a3c-1111-4222-8333-00000000{}"
    failures = {str(number): customer.format(number, 1000 + number) for number in range(1, 4)}
    await bury(database, {**failures, "a": "the target answered 404", "b": "the target answered 503"})
    return database


async def groups_of(run: Run, dsn: str) -> list[dict[str, object]]:
    lines = (await run("dead-letters", "list", "--by-group", "--json", "--dsn", dsn)).stdout.splitlines()
    return [json.loads(line) for line in lines]


async def test_groups_count_what_failed_alike(run: Run, grouped: str) -> None:
    groups = await groups_of(run, grouped)
    assert [group["letters"] for group in groups] == [3, 1, 1]
    assert len({group["name"] for group in groups}) == 3
    listed = (await run("dead-letters", "list", "--by-group", "--dsn", grouped)).stdout.splitlines()
    assert listed[0].split() == [
        "GROUP",
        "SUBSCRIPTION",
        "LETTERS",
        "AGAIN",
        "SOON",
        "FIRST",
        "LAST",
        "ERROR",
        "OF",
        "ONE",
    ]
    assert listed[1].split()[:4] == [groups[0]["name"], "billing", "3", "0"]
    assert "no customer" in listed[1]
    one = await run("dead-letters", "list", "--group", str(groups[0]["name"]), "--json", "--dsn", grouped)
    assert [json.loads(line)["event"]["id"] for line in one.stdout.splitlines()] == ["1", "2", "3"]


async def test_subscriptions_do_not_share_groups(run: Run, database: str) -> None:
    await bury(database, {"a": "no"}, "billing")
    await bury(database, {"b": "no"}, "shipping")
    groups = await groups_of(run, database)
    assert {(group["subscription"], group["letters"]) for group in groups} == {("billing", 1), ("shipping", 1)}
    assert len({group["name"] for group in groups}) == 2


async def test_a_group_is_redelivered(run: Run, grouped: str) -> None:
    (largest, *_) = await groups_of(run, grouped)
    result = await run("dead-letters", "redeliver", "--group", str(largest["name"]), "--dsn", grouped)
    assert (result.exit_code, result.output) == (0, "3 dead letters will be dispatched again.\n")
    assert [group["due"] for group in await groups_of(run, grouped)] == [3, 0, 0]
    handled: asyncio.Queue[str] = asyncio.Queue()
    async with Backend(grouped) as backend, asyncio.timeout(20):
        await backend.subscribe("billing", lambda event: handled.put_nowait(event.id))
        assert {await handled.get() for _ in range(3)} == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        (("--filter", "id = '1' OR id = 'a'"), 2),
        (("--filter", "id = 'a'", "--subscription", "billing"), 1),
        (("--type", "no such"), 0),
        (("--all",), 5),
    ],
)
async def test_letters_are_chosen_by_filters(run: Run, grouped: str, choice: tuple[str, ...], count: int) -> None:
    result = await run("dead-letters", "redeliver", *choice, "--dsn", grouped)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{count} dead letter")
    assert sum(int(str(group["due"])) for group in await groups_of(run, grouped)) == count


async def test_a_rate_limits_how_fast_letters_are_redelivered(run: Run, grouped: str) -> None:
    assert (await run("dead-letters", "redeliver", "--all", "--rate", "10", "--dsn", grouped)).exit_code == 0
    backend = Backend(grouped)
    await backend.init()
    due = sorted([letter.due_at.timestamp() async for letter in backend.dead_letters() if letter.due_at is not None])
    await backend.stop()
    assert len(due) == 5
    assert due[-1] - due[0] >= 0.39, "four pauses of 0.1 s, by two clocks"


@pytest.mark.slow
async def test_a_redelivery_that_is_stopped_says_how_far_it_came(run: Run, grouped: str) -> None:
    async with Command("dead-letters", "redeliver", "--all", "--rate", "0.001", "--dsn", grouped) as redelivering:

        async def one_is_due() -> bool:
            return sum(int(str(group["due"])) for group in await groups_of(run, grouped)) == 1

        await eventually("one is sent", one_is_due)
        redelivering.send(signal.SIGINT)
        assert await redelivering.line() == "1 dead letter will be dispatched again.\n"
        assert await redelivering.ended() == (1, "Error: Stopped. The others stay as they are.\n")


async def test_purge_deletes_when_that_is_confirmed(run: Run, grouped: str) -> None:
    (largest, *_) = await groups_of(run, grouped)
    command = ("dead-letters", "purge", "--group", str(largest["name"]), "--dsn", grouped)
    refused = await run(*command, input=b"n\n")
    assert refused.exit_code == 1
    assert "This deletes 3 dead letters for good." in refused.output
    assert len(await groups_of(run, grouped)) == 3
    assert "3 dead letters are deleted." in (await run(*command, input=b"y\n")).output
    assert len(await groups_of(run, grouped)) == 2
    rest = await run("dead-letters", "purge", "--all", "--yes", "--dsn", grouped)
    assert (rest.exit_code, rest.output) == (0, "2 dead letters are deleted.\n")
    assert await groups_of(run, grouped) == []


async def test_purge_leaves_letters_that_are_on_their_way(run: Run, grouped: str) -> None:
    listed = await run("dead-letters", "list", "--json", "--dsn", grouped)
    first = str(json.loads(listed.stdout.splitlines()[0])["id"])
    await run("dead-letters", "redeliver", first, "--dsn", grouped)
    result = await run("dead-letters", "purge", first, "--yes", "--dsn", grouped)
    assert result.exit_code == 1
    assert "1 of these ids do not exist, or are dispatched again at the moment." in result.stderr
    await run("dead-letters", "purge", "--all", "--yes", "--dsn", grouped)
    assert [group["letters"] for group in await groups_of(run, grouped)] == [1]


async def test_an_unknown_subscription_cannot_be_purged(backend: Backend) -> None:
    with pytest.raises(SubscriptionNotFoundError):
        await backend.purge_dead_letters(subscription="nobody")
    with pytest.raises(ConfigError):
        await backend.purge_dead_letters()
