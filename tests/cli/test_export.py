"""`pgbackend export` and `pgbackend import`: a log goes into a file and back, to the byte."""

import json
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.wire import parse_structured
from tests.cli.conftest import Command, Run
from tests.support.codec import binary, sdk, structured
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.polling import eventually

REAL = Path(__file__).parents[1] / "codec" / "real_events.jsonl"
NEW_LOG = "pgbackend_again"


@pytest.fixture
async def full(database: str) -> str:
    """The DSN of a log with events of every kind, and with gaps between their positions."""
    backend = Backend(database)
    await backend.init()
    for line in REAL.read_bytes().splitlines():
        await backend.produce(parse_structured(line))
    pretty = json.dumps({"n": [1, 2.50]}, indent=2).encode()
    await backend.produce_many([
        binary(pretty, "application/json", priority="5"),
        binary(b"\x00\xff", "image/png"),
        binary("grüße\r\n".encode(), "text/plain"),
        parse_structured(b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data" :\n [1,\r\n 1.00 ] }'),
        parse_structured(structured(time="2026-01-02T03:04:05.123456789-00:00", partitionkey="k", flag=True, n=7)),
        sdk(b"\xfe", datacontenttype="text/plain"),
        sdk("text", subject="\u2028"),
        make_event("plain"),
    ])  # fmt: skip
    await backend.stop()
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('never', '/s', 't')")
    await transaction.rollback()
    await connection.execute(
        """INSERT INTO pgbackend.events (id, source, type, extensions, data, data_encoding, specversion, time)
        VALUES ('sql', '/s', 't', '{"a":   1}', '\\x7b0a7d', 'json', '0.3', '2026-01-01T00:00:00Z')"""
    )
    await connection.close()
    return database


async def rows(dsn: str, schema: str = "pgbackend") -> list[tuple[object, ...]]:
    """Everything that producers write of all events, in order."""
    connection = await asyncpg.connect(dsn)
    columns = ", ".join(f"{name}::jsonb::text" if name == "extensions" else name for name in COLUMNS)
    found = await connection.fetch(f"SELECT {columns} FROM {schema}.events ORDER BY position")
    await connection.close()
    return [tuple(row) for row in found]


@pytest.mark.owner
async def test_a_log_comes_back_to_the_byte(run: Run, full: str, tmp_path: Path) -> None:
    file = str(tmp_path / "log.jsonl")
    exported = await run("export", file, "--dsn", full)
    assert (exported.exit_code, exported.stdout, exported.stderr) == (0, "", "17 events are exported.\n")
    assert (await run("migrate", "--dsn", full, "--schema", NEW_LOG)).exit_code == 0
    imported = await run("import", file, "--dsn", full, "--schema", NEW_LOG)
    assert (imported.exit_code, imported.output) == (0, "17 events are imported.\n")
    assert await rows(full, NEW_LOG) == await rows(full)


async def test_import_draws_new_positions_and_dates(run: Run, full: str) -> None:
    before = datetime.now(UTC)
    lines = (await run("export", "-", "--dsn", full)).stdout_bytes
    assert (await run("import", "-", "--quiet", "--dsn", full, input=lines)).output == ""
    result = await run("export", "-", "--from", before.isoformat(), "--dsn", full)
    old, new = ([json.loads(line) for line in text.splitlines()] for text in (lines, result.stdout_bytes))
    assert [line["event"] for line in new] == [line["event"] for line in old]
    assert min(line["position"] for line in new) > max(line["position"] for line in old)
    assert all(datetime.fromisoformat(line["recorded_at"]) > before for line in new)


async def test_the_bounds_are_exclusive_and_may_be_dates(run: Run, database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.produce_many([make_event(id_) for id_ in "abc"])
    between = datetime.now(UTC).isoformat()
    await backend.produce_many([make_event(id_) for id_ in "de"])
    await backend.stop()
    for options, expected in (
        (("--from", "1", "--to", "4"), "bc"),
        (("--from", "2"), "cde"),
        (("--to", between), "abc"),
        (("--from", between, "--to", "5"), "d"),
        (("--from", "4000"), ""),
        (("--to", "4000"), "abcde"),
        (("--from", "4", "--to", "2"), ""),
        (("--filter", "id = 'b' OR id = 'd'", "--to", "latest"), "bd"),
    ):
        result = await run("export", "-", *options, "--dsn", database)
        assert result.exit_code == 0, result.output
        assert "".join(json.loads(line)["event"]["id"] for line in result.stdout.splitlines()) == expected, options
    assert (await run("export", "-", "--to", "earliest", "--dsn", database)).exit_code == 2


@pytest.mark.slow
async def test_export_waits_for_an_open_transaction_and_keeps_the_order(database: str) -> None:
    connection = await asyncpg.connect(database, server_settings={"application_name": "slow producer"})
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('first', '/s', 't')")
    backend = Backend(database)
    await backend.init()
    await backend.produce(make_event("second"))
    await backend.stop()
    async with Command("export", "-", "--dsn", database) as exporting:
        assert exporting.process.stderr
        complaint = (await exporting.process.stderr.readline()).decode()
        assert "waits for an open transaction" in complaint
        assert "slow producer" in complaint
        await transaction.commit()
        await connection.close()
        assert [json.loads(await exporting.line())["event"]["id"] for _ in range(2)] == ["first", "second"]
        assert await exporting.ended() == (0, "2 events are exported.\n")


async def test_a_line_that_is_cut_off_is_named_and_import_goes_on_from_there(run: Run, full: str) -> None:
    lines = (await run("export", "-", "--dsn", full)).stdout_bytes.splitlines(keepends=True) * 60
    before = await rows(full)
    result = await run("import", "-", "--dsn", full, input=b"".join(lines[:-1]) + lines[-1][:50])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Line {len(lines)}: No line of an exported log")
    said = re.search(r"Go on with the lines from (\d+) on", result.stderr)
    assert said
    begin = int(said[1]) - 1
    assert len(await rows(full)) == len(before) + begin
    rest = await run("import", "-", "--dsn", full, input=b"".join(lines[begin:]))
    assert rest.exit_code == 0, rest.output
    assert await rows(full) == before * 61


@pytest.mark.owner
async def test_import_into_a_log_that_deduplicates_may_be_repeated(run: Run, full: str, tmp_path: Path) -> None:
    lines = (await run("export", "-", "--filter", "id != '1'", "--dsn", full)).stdout_bytes
    assert (await run("migrate", "--dsn", full, "--schema", NEW_LOG)).exit_code == 0
    backend = Backend(full, schema=NEW_LOG, deduplicate=timedelta(days=1))
    await backend.init()
    await backend.stop()
    half = b"".join(lines.splitlines(keepends=True)[:5])
    assert (
        await run("import", "-", "--dsn", full, "--schema", NEW_LOG, input=half)
    ).output == "5 events are imported.\n"
    again = await run("import", "-", "--dsn", full, "--schema", NEW_LOG, input=lines)
    count = len(lines.splitlines())
    assert again.output == f"{count} events are imported. The log had 5 of them already.\n"
    assert len(await rows(full, NEW_LOG)) == count


@pytest.mark.slow
@pytest.mark.owner
async def test_an_import_that_is_killed_may_be_run_again(run: Run, database: str, sql: Sql, tmp_path: Path) -> None:
    backend = Backend(database, deduplicate=timedelta(days=1))
    await backend.init()
    await backend.stop()
    total = 20_000
    lines = (
        b'{"position":1,"recorded_at":null,"event":' + structured(id=str(number)) + b"}" for number in range(total)
    )
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    async with Command("import", str(tmp_path / "log.jsonl"), "--dsn", database) as importing:

        async def has_begun() -> bool:
            return bool(await sql.fetchval("SELECT EXISTS (SELECT FROM pgbackend.events)"))

        await eventually("some are stored", has_begun)
        importing.send(signal.SIGKILL)
        await importing.ended()
    assert (await run("import", str(tmp_path / "log.jsonl"), "--dsn", database)).exit_code == 0
    ids = [row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.events ORDER BY position")]
    assert ids == [str(number) for number in range(total)]


async def test_a_log_that_cannot_be_reached_leaves_the_file_alone(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("earlier")
    assert (await run("export", str(file), "--dsn", "postgresql://nobody@localhost:1/nowhere")).exit_code == 1
    assert file.read_text() == "earlier"


async def test_a_full_disk_is_one_line(run: Run, full: str) -> None:
    result = await run("export", "/dev/full", "--dsn", full)

    assert result.exit_code == 1
    assert result.stderr == "Error: The output cannot be written: No space left on device.\n"


async def test_an_empty_log_makes_an_empty_file(run: Run, database: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    assert (await run("export", str(file), "--dsn", database)).stderr == "0 events are exported.\n"
    assert file.read_bytes() == b""
    assert (await run("import", str(file), "--dsn", database)).output == "0 events are imported.\n"


async def test_plain_events_are_not_what_import_reads(run: Run, database: str) -> None:
    result = await run("import", "-", "--dsn", database, input=structured())
    assert result.exit_code == 1
    assert "Nothing is stored." in result.stderr
