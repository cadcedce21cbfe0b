"""`pgbackend tail`."""

import asyncio
import json
import os
import pty
import select
import signal
import sys
from datetime import UTC, datetime

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend
from pgbackend.codec.log_lines import read_line
from tests.cli.conftest import Command, Run
from tests.support.events import make_event
from tests.support.polling import eventually

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/plain', 'sql')"


async def produce(dsn: str, *ids: str) -> None:
    backend = Backend(dsn)
    await backend.init()
    await backend.produce_many([make_event(id_) for id_ in ids])
    await backend.stop()


def ids(output: str) -> list[str]:
    return [json.loads(line)["event"]["id"] for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_new_events_are_printed_at_once_until_a_signal_ends_it(database: str, number: signal.Signals) -> None:
    await produce(database, "before")
    async with Command("tail", "--json", "--dsn", database) as tail:
        # It says nothing when it is ready, so the first event that it prints is the first that was not before.
        backend = Backend(database)
        await backend.init()
        printing = asyncio.create_task(tail.line())
        sent: list[str] = []
        while not printing.done():
            sent.append(str(len(sent)))
            await backend.produce(make_event(sent[-1]))
            await asyncio.wait({printing}, timeout=0.1)
        seen = ids(await printing)
        assert "before" not in seen
        await backend.produce(make_event("last"))
        while seen[-1] != "last":
            seen += ids(await tail.line())
        assert seen == [*sent[int(seen[0]) :], "last"]
        await backend.stop()
        tail.send(number)
        assert await tail.ended() == (0, "")


async def test_until_head_prints_the_log_and_ends(run: Run, database: str) -> None:
    await produce(database, "a", "b", "c")
    result = await run("tail", "--from", "earliest", "--until-head", "--dsn", database)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["1", "2", "3"]
    assert [line.split()[3:] for line in result.stdout.splitlines()] == [["test", "test", id_] for id_ in "abc"]


async def test_until_head_of_an_empty_log_ends(run: Run, database: str) -> None:
    result = await run("tail", "--from", "earliest", "--until-head", "--dsn", database)
    assert (result.exit_code, result.output) == (0, "")


async def test_until_head_ends_behind_positions_that_were_rolled_back(run: Run, database: str) -> None:
    await produce(database, "a")
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(INSERT, "never")
    await transaction.rollback()
    await connection.close()
    result = await run("tail", "--from", "earliest", "--until-head", "--json", "--dsn", database)
    assert ids(result.stdout) == ["a"]


async def test_an_event_that_is_committed_late_is_not_skipped(run: Run, database: str) -> None:
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(INSERT, "late")
    await produce(database, "early")
    running = asyncio.create_task(run("tail", "--from", "earliest", "--count", "2", "--json", "--dsn", database))
    # It passes the open transaction after `hole_wait`, 1 s.
    await asyncio.wait({running}, timeout=2.5)
    assert not running.done()
    await transaction.commit()
    await connection.close()
    assert ids((await running).stdout) == ["early", "late"]


async def test_it_begins_behind_a_position_or_a_date(run: Run, database: str) -> None:
    await produce(database, "a", "b")
    between = datetime.now(UTC)
    await produce(database, "c")
    for place, expected in (("1", ["b", "c"]), (between.isoformat(), ["c"]), ("latest", [])):
        result = await run("tail", "--from", place, "--until-head", "--json", "--dsn", database)
        assert ids(result.stdout) == expected, place
    wrong = await run("tail", "--from", "yesterday", "--dsn", database)
    assert wrong.exit_code == 2
    assert "a date with its time zone" in wrong.output


async def test_filters_select_events(run: Run, database: str) -> None:
    backend = Backend(database)
    await backend.init()
    for id_, source, kind, priority in (("1", "/shop/a", "order.created", 5), ("2", "/shop/b", "order.paid", 1)):
        await backend.produce(CloudEvent({"id": id_, "source": source, "type": kind, "priority": priority}))
    await backend.stop()
    for options, expected in (
        (("--type", "order."), ["1", "2"]),
        (("--type", "order.p"), ["2"]),
        (("--source", "/shop/a", "--type", "order"), ["1"]),
        (("--filter", "priority > 2"), ["1"]),
        (("--filter", "priority > 2", "--type", "order.paid"), []),
    ):
        result = await run("tail", "--from", "earliest", "--until-head", "--json", *options, "--dsn", database)
        assert ids(result.stdout) == expected, options
    wrong = await run("tail", "--filter", "priority >", "--dsn", database)
    assert wrong.exit_code == 2
    assert "--filter" in wrong.stderr


async def test_count_ends_it_in_the_middle_of_a_page(run: Run, database: str) -> None:
    await produce(database, "a", "b", "c")
    result = await run("tail", "--from", "earliest", "--count", "2", "--json", "--dsn", database)
    assert ids(result.stdout) == ["a", "b"]


async def test_json_is_a_line_that_can_be_imported(run: Run, database: str) -> None:
    await produce(database, "a")
    result = await run("tail", "--from", "earliest", "--count", "1", "--json", "--dsn", database)
    assert read_line(result.stdout_bytes).id == "a"
    assert json.loads(result.stdout)["position"] == 1


async def test_an_event_cannot_control_the_terminal(run: Run, database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.produce(CloudEvent({"type": "t\u202e", "source": "/s", "id": "a"}, b"\x1b]0;owned\x07 \xc2\x9b\nx"))
    await backend.stop()
    result = await run("tail", "--from", "earliest", "--count", "1", "--data", "--dsn", database)
    assert result.exit_code == 0, result.output
    assert "owned" in result.stdout
    assert all(one.isprintable() or one == "\n" for one in result.stdout)


@pytest.mark.slow
async def test_json_on_a_terminal_has_no_control_characters(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.produce(CloudEvent({"type": "t\u202e", "source": "/s", "id": "a"}, "\x9b2J"))
    await backend.stop()
    outside, inside = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pgbackend", "tail", "--from", "earliest", "--count", "1", "--json", "--dsn", database,
        stdout=inside,
    )  # fmt: skip
    os.close(inside)
    assert await process.wait() == 0
    shown = os.read(outside, 10_000).decode()
    os.close(outside)
    assert json.loads(shown)["event"]["data"] == "\x9b2J"
    assert all(one.isprintable() or one in "\r\n" for one in shown)


@pytest.mark.slow
async def test_a_reader_that_goes_away_ends_it_without_a_complaint(database: str) -> None:
    await produce(database, "a")
    async with Command("tail", "--from", "earliest", "--json", "--dsn", database) as tail:
        await tail.line()
        tail.close_output()
        await produce(database, "b")
        code, complaint = await tail.ended()
    assert (code, complaint) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_while_its_reader_takes_nothing(database: str, number: signal.Signals) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.produce_many([make_event(str(one), data=b"x" * 1000) for one in range(2000)])
    await backend.stop()
    reader, writer = os.pipe()

    async def is_full() -> bool:
        return not select.select([], [writer], [], 0)[1]

    try:
        async with Command("tail", "--from", "earliest", "--json", "--dsn", database, output=writer) as tail:
            await eventually("the pipe is full", is_full)
            tail.send(number)
            assert await tail.ended() == (0, "")
    finally:
        os.close(reader)
        os.close(writer)
