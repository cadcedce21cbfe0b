"""`pgbackend retention`."""

import json
from datetime import timedelta

import pytest

from pgbackend import Backend, Retention
from tests.cli.conftest import Run
from tests.support.backends import produce


async def test_retention_is_shown_and_changed_option_by_option(run: Run, database: str) -> None:
    shown = await run("retention", "--dsn", database)
    assert (shown.exit_code, shown.stdout.split()) == (
        0, ["keep", "7d", "max", "age", "forever", "max", "bytes", "unlimited", "dead", "letters", "30d"],
    )  # fmt: skip

    changed = await run("retention", "--max-age", "36h", "--max-bytes", "2GiB", "--dsn", database)
    assert changed.exit_code == 0
    changed = await run("retention", "--keep", "90s", "--dead-letters", "forever", "--dsn", database)

    assert changed.stdout.split() == [
        "keep", "90s", "max", "age", "36h", "max", "bytes", "2147483648", "dead", "letters", "forever",
    ]  # fmt: skip
    async with Backend(database) as backend:
        assert await backend.retention() == Retention(
            keep=timedelta(seconds=90), max_age=timedelta(hours=36), max_bytes=2 << 30
        )


@pytest.mark.parametrize(
    ("option", "wrong", "message"),
    [
        ("--keep", "7", "expected a number with s, min, h or d, such as 7d, or forever"),
        ("--max-bytes", "2GB", "expected bytes, or a number with KiB, MiB, GiB or TiB, or unlimited"),
    ],
)
async def test_a_value_that_cannot_be_read_is_wrong_usage(run: Run, option: str, wrong: str, message: str) -> None:
    result = await run("retention", option, wrong, "--dsn", "postgresql://nowhere/x")

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


async def test_a_value_out_of_its_bounds_changes_nothing(run: Run, database: str) -> None:
    result = await run("retention", "--keep", "0.5s", "--dsn", database)

    assert result.exit_code == 1
    assert "keep is" in result.stderr
    assert (await run("retention", "--dsn", database)).stdout.split()[1] == "7d"


async def test_status_shows_the_retention_and_what_holds_the_log(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("abandoned", print, start="earliest")
        await backend.unsubscribe("abandoned")
        await produce(backend, "a")
    result = await run("status", "--dsn", database)
    assert "keep 7d, dead letters 30d" in result.stdout
    found = json.loads((await run("status", "--json", "--dsn", database)).stdout)
    assert found["retention"]["keep"] == 7 * 86_400
    assert found["holders"] == []
