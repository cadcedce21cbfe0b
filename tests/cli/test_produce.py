"""`pgbackend produce`."""

import asyncio
import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from pgbackend import Backend, Event
from pgbackend.cli import storing
from tests.cli.conftest import Command, Run
from tests.support.codec import structured
from tests.support.polling import eventually


async def stored(run: Run, dsn: str) -> list[dict[str, object]]:
    result = await run("tail", "--from", "earliest", "--until-head", "--json", "--dsn", dsn)
    assert result.exit_code == 0, result.output
    return [json.loads(line)["event"] for line in result.stdout.splitlines()]


async def test_one_event_is_described_by_options(run: Run, database: str) -> None:
    options = ("--id", "17", "--subject", "x", "--extension", "partitionkey=7", "--extension", "note=a=b")
    data = ("--data", '{"n":  1.10}')
    result = await run("produce", "--type", "order", "--source", "/shop", *options, *data, "--dsn", database)
    assert (result.exit_code, result.stdout) == (0, "Event 17 of /shop is stored.\n"), result.output
    (event,) = await stored(run, database)
    assert event == {
        "specversion": "1.0", "id": "17", "source": "/shop", "type": "order", "subject": "x", "partitionkey": "7",
        "note": "a=b", "datacontenttype": "application/json", "data": {"n": 1.1},
    }  # fmt: skip


async def test_data_is_kept_to_the_byte(run: Run, database: str, tmp_path: Path) -> None:
    octets = b"\x00\xff {"
    (tmp_path / "data").write_bytes(octets)
    options = ("--content-type", "application/x-mine", "--data-file", str(tmp_path / "data"))
    result = await run("produce", "--type", "t", "--source", "/s", *options, "--quiet", "--dsn", database)
    assert (result.exit_code, result.output) == (0, "")
    got: asyncio.Queue[Event] = asyncio.Queue()
    async with Backend(database) as backend, asyncio.timeout(20):
        await backend.subscribe("s", got.put_nowait, start="earliest")
        assert (await got.get()).data_bytes == octets


async def test_an_event_without_options_has_a_random_id_and_no_data(run: Run, database: str) -> None:
    for _ in range(2):
        await run("produce", "--type", "t", "--source", "/s", "--dsn", database)
    first, second = await stored(run, database)
    assert first["id"] != second["id"]
    assert first.keys() == {"specversion", "id", "source", "type"}


@pytest.mark.owner
async def test_an_event_that_the_log_has_already_is_said_to_be_there(run: Run, database: str) -> None:
    backend = Backend(database, deduplicate=timedelta(days=1))
    await backend.init()
    await backend.stop()
    command = ("produce", "--type", "t", "--source", "/s", "--id", "17", "--dsn", database)
    assert (await run(*command)).output == "Event 17 of /s is stored.\n"
    assert (await run(*command)).output == "Event 17 of /s was stored before.\n"
    assert len(await stored(run, database)) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--type", "t"), "--type and --source"),
        (("--type", "t", "--source", "/s", "--data", "{"), "--content-type"),
        (("--type", "t", "--source", "/s", "--data", "1", "--data-file", "-"), "not both"),
        (("--type", "t", "--source", "/s", "--extension", "x"), "NAME=VALUE"),
        (("--type", "t", "--source", "/s", "--extension", "x=1", "--extension", "x=2"), "once"),
        (("--type", "t", "--source", "/s", "--extension", "Bad=1"), "attribute name"),
        (("--type", "", "--source", "/s"), "'type' is empty"),
        (("--type", "t", "--source", "/s", "--id", ""), "'id' is empty"),
        (("--type", "t", "--source", "/s", "--data", os.fsdecode(b'"\xff"')), "--content-type"),
    ],
)
async def test_an_event_that_cannot_be_is_wrong_usage(
    run: Run, database: str, options: tuple[str, ...], complaint: str
) -> None:
    result = await run("produce", *options, "--dsn", database)
    assert result.exit_code == 2, result.output
    assert complaint in " ".join(result.stderr.split())


async def test_lines_of_standard_input_are_stored_in_their_order(run: Run, database: str) -> None:
    lines = [structured(id=str(number)) for number in range(2_500)]
    result = await run(
        "produce", "--dsn", database, input=b"\n".join(lines[:1_300]) + b"\n\n" + b"\n".join(lines[1_300:])
    )
    assert (result.exit_code, result.output) == (0, "2,500 events are stored.\n")
    assert [event["id"] for event in await stored(run, database)] == [str(number) for number in range(2_500)]


async def test_each_bad_line_is_named_and_its_batch_is_not_stored(run: Run, database: str) -> None:
    lines = [structured(id=str(number)) for number in range(1_005)]
    lines[1_001], lines[1_003] = b"{", structured(id="\x1b[2J", source="\x1b[2J")
    result = await run("produce", "--dsn", database, input=b"\n".join(lines))
    assert (result.exit_code, result.stdout) == (1, "")
    first, second, last = result.stderr.splitlines()
    assert first.startswith("Line 1002: ")
    assert second.startswith("Line 1004: ")
    assert last == (
        "Error: 2 lines cannot be stored. 1,000 events from the lines up to 1000 are stored, and nothing after them. "
        "Go on with the lines from 1001 on (tail -n +1001)."
    )
    assert all(one.isprintable() or one == "\n" for one in result.stderr)
    assert len(await stored(run, database)) == 1_000


@pytest.mark.parametrize("line", [structured(data="x" * (1 << 20)), structured(subject="x" * (1 << 17))])
async def test_an_event_that_is_too_large_is_named_by_its_line(run: Run, database: str, line: bytes) -> None:
    result = await run("produce", "--dsn", database, input=b"\n" + line)
    assert [line[:7] for line in result.stderr.splitlines()] == ["Line 2:", "Error: "]
    assert "Nothing is stored." in result.stderr
    assert await stored(run, database) == []


@pytest.mark.slow
async def test_a_line_is_stored_when_it_comes_and_a_signal_says_what_is_stored(run: Run, database: str) -> None:
    async with Command("produce", "--dsn", database) as producing:
        for number in (1, 2):
            await producing.write(structured(id=str(number)) + b"\n")

            async def is_stored(number: int = number) -> bool:
                return len(await stored(run, database)) == number

            await eventually("it is stored", is_stored)
        await producing.write(b'{"begun": ')
        producing.send(signal.SIGTERM)
        code, complaint = await producing.ended()
    assert code == 1
    assert complaint == (
        "Error: Stopped. 2 events from the lines up to 2 are stored, and nothing after them. "
        "Go on with the lines from 3 on (tail -n +3).\n"
    )


async def test_an_input_that_does_not_block_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as file:
        batches = storing._batches(file)
        first = asyncio.ensure_future(anext(batches))
        # Nothing is there yet, which was taken for the end.
        assert (await asyncio.wait({first}, timeout=0.1))[1] == {first}
        os.write(writer, b"a line\n")
        os.close(writer)
        assert [line.text for line in await first] == [b"a line"]
        assert [batch async for batch in batches] == []
