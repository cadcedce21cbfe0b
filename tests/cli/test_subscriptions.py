"""`pgbackend subscriptions`."""

import json
import re
from datetime import datetime

import asyncpg
import pytest

from pgbackend import Backend, Event, Retry
from tests.cli.conftest import Run
from tests.support.backends import failed, produce, running
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually


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
    assert listed[0].split() == ["SUBSCRIPTION", "ORDER", "SHARD", "POSITION", "PENDING", "OWNER", "PAUSED", "BY"]
    assert [line.split() for line in listed[1:]] == [
        ["billing", "key", str(shard), "of", "3", "0", "0", "-", "-"] for shard in range(3)
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


async def test_a_dry_run_of_seek_counts_and_moves_nothing(run: Run, subscribed: str) -> None:
    backend = Backend(subscribed)
    await backend.init()
    await backend.produce_many([make_event(str(number)) for number in range(9)])
    await backend.stop()
    before = (await run("subscriptions", "list", "--dsn", subscribed)).stdout
    result = await run("subscriptions", "seek", "billing", "1", "--dry-run", "--dsn", subscribed)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "billing would go on after 1: 0 events would come again, and 1 event that it has not handled would be skipped. "
        "Nothing has changed.\n"
    )
    assert (await run("subscriptions", "list", "--dsn", subscribed)).stdout == before


async def test_an_operator_lists_failed_events_retries_them_and_skips_one(run: Run, subscribed: str) -> None:
    catch = Catch(fails=lambda event: event.id != "good")
    dsn = ("--dsn", subscribed)
    assert (await run("subscriptions", "waiting", "billing", *dsn)).stdout == "no events wait to be tried again\n"
    async with running(subscribed) as backend:
        await backend.subscribe("billing", catch, order="key", retry=Retry(attempts=9, delay=600.0))
        await produce(backend, "bad", "good", "worse")
        await failed(backend, 2)

        listed = (await run("subscriptions", "waiting", "billing", *dsn)).stdout.splitlines()
        assert listed[0].split() == ["POSITION", "TYPE", "EVENT", "ID", "ATTEMPTS", "DUE", "LAST", "ERROR"]
        assert [line.split()[:4] for line in listed[1:]] == [["1", "test", "bad", "1"], ["3", "test", "worse", "1"]]
        as_json = await run("subscriptions", "waiting", "billing", "--json", "--limit", "1", *dsn)
        (first,) = map(json.loads, as_json.stdout.splitlines())
        assert first["position"] == 1
        (entry,) = first["history"]
        assert datetime.fromisoformat(entry.pop("at")).tzinfo is not None
        assert entry == {"what": "failed", "attempt": 1, "error": "RuntimeError: the target is down"}

        retried = await run("subscriptions", "retry", "billing", *dsn)
        assert retried.stdout == "2 events are tried again now.\n"
        await eventually("both are tried again", lambda: len(catch.attempts) == 5)
        wrong = await run("subscriptions", "retry", "billing", "--position", "2", *dsn)
        assert wrong.exit_code == 1
        assert "The event at position 2 does not wait to be tried again in billing." in wrong.output

        assert (await run("subscriptions", "skip", "billing", "1", *dsn)).exit_code == 1
        skipped = await run("subscriptions", "skip", "billing", "1", "--yes", *dsn)
        assert skipped.stdout == "billing skips the event at position 1, which is a dead letter now.\n", skipped.output
        again = await run("subscriptions", "skip", "billing", "1", "--yes", *dsn)
        assert again.exit_code == 1
        assert "has settled the event at position 1" in again.output


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


async def test_subscriptions_are_paused_and_resumed_and_the_status_says_by_whom_and_why(
    run: Run, subscribed: str
) -> None:
    backend = Backend(subscribed)
    await backend.init()
    await backend.subscribe("audit", _ignore)
    await backend.stop()
    paused = await run("subscriptions", "pause", "billing", "audit", "--reason", "a deploy", "--dsn", subscribed)
    assert (paused.exit_code, paused.stdout) == (0, "billing is paused.\naudit is paused.\n")

    listed = (await run("subscriptions", "list", "--dsn", subscribed)).stdout.splitlines()
    assert [line.split()[-1] for line in listed[1:]] == ["operator", "operator"]
    shown = (await run("status", "--dsn", subscribed)).stdout
    assert re.search(r"^billing +an operator  \d{4}-\d\d-\d\d [\d:]+ UTC  a deploy$", shown, re.MULTILINE)
    described = json.loads((await run("status", "--json", "--dsn", subscribed)).stdout)["subscriptions"][0]
    assert described["state"] == "paused: a deploy"
    assert (described["paused"]["by"], described["paused"]["reason"]) == ("operator", "a deploy")
    assert datetime.fromisoformat(described["paused"]["at"]).tzinfo is not None

    resumed = await run("subscriptions", "resume", "billing", "audit", "--dsn", subscribed)
    assert (resumed.exit_code, resumed.stdout) == (0, "billing goes on.\naudit goes on.\n")
    assert "paused" not in (await run("status", "--dsn", subscribed)).stdout


async def test_an_unknown_subscription_is_neither_paused_nor_resumed(run: Run, subscribed: str) -> None:
    for command in ("pause", "resume"):
        result = await run("subscriptions", command, "billing", "other", "--dsn", subscribed)
        assert result.exit_code == 1
        assert "There is no subscription 'other'" in result.stderr
    assert (await run("subscriptions", "pause", "--dsn", subscribed)).exit_code == 2
