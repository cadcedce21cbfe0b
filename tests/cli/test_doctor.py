"""`pgbackend doctor`."""

import json

import asyncpg
import pytest

from pgbackend.doctor import examination
from tests.cli.conftest import Run
from tests.support.databases import execute, query_value
from tests.support.ports import unasked_port

pytestmark = [pytest.mark.owner, pytest.mark.direct]

TRIGGER = (
    "CREATE FUNCTION public.stop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
    "CREATE TRIGGER slow AFTER INSERT ON pgbackend.events FOR EACH ROW EXECUTE FUNCTION public.stop()"
)


@pytest.fixture
async def has_fsync(database: str) -> bool:
    """Whether the server is as it should be; that of the tests is not."""
    return bool(await query_value(database, "SELECT current_setting('fsync')::boolean"))


async def test_findings_are_grouped_by_severity_with_the_line_that_cures_each(run: Run, database: str) -> None:
    await execute(database, TRIGGER + "; CREATE INDEX by_type ON pgbackend.events (type)")
    await execute(database, "ALTER SEQUENCE pgbackend.events_position_seq CACHE 50")
    result = await run("doctor", "--dsn", database)
    assert result.exit_code == 4, result.output
    errors, warnings, notes = (result.stdout.index(heading) for heading in (" ERROR", "\n1 WARNING\n", "\n1 NOTE\n"))
    assert errors < warnings < notes
    assert '\n      DROP TRIGGER "slow" ON "pgbackend"."events";\n  destroys the trigger\n' in result.stdout
    assert "looked at servers, engine, clock" in result.stdout
    assert result.stdout.endswith("docs/doctor.md explains each finding under its name.\n")


async def test_commands_to_paste_need_the_option_that_led_to_the_log(run: Run, database: str) -> None:
    await execute(
        database,
        "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't');"
        "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('left', 'none', 1);"
        "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) "
        "VALUES ('left', 0, 1, 0, nextval('pgbackend.epochs'))",
    )
    hint = "Commands of pgbackend that use the log need the same --dsn as this one.\n"
    by_option = await run("doctor", "--dsn", database)
    assert "pgbackend subscriptions delete left" in by_option.stdout
    assert by_option.stdout.endswith(hint)
    by_variable = await run("doctor", env={"PGBACKEND_DSN": database})
    assert "pgbackend subscriptions delete left" in by_variable.stdout
    assert hint not in by_variable.stdout


async def test_the_exit_code_is_that_of_the_most_severe_finding(run: Run, database: str, has_fsync: bool) -> None:
    result = await run("doctor", "--min-severity", "error" if has_fsync else "warning", "--dsn", database)
    assert result.exit_code == (0 if has_fsync else 4)
    assert ("nothing found" in result.stdout) == has_fsync
    assert "setting fsync" in result.stdout or has_fsync


async def test_less_severe_findings_can_be_left_out(run: Run, database: str, has_fsync: bool) -> None:
    await execute(database, TRIGGER)
    result = await run("doctor", "--min-severity", "error", "--json", "--dsn", database)
    assert "trigger" not in {one["check"] for one in json.loads(result.stdout)["findings"]}
    if has_fsync:
        assert result.exit_code == 0


async def test_a_healthy_log_says_what_was_looked_at_and_exits_with_0(
    run: Run, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server of the tests has no fsync.
    others = tuple(look for look in examination._OF_SERVER if look.title != "settings")
    monkeypatch.setattr(examination, "_OF_SERVER", others)
    result = await run("doctor", "--dsn", database)
    assert result.exit_code == 0, result.output
    assert "looked at servers" in result.stdout
    assert result.stdout.endswith("\n\nnothing found\n")


async def test_json_is_one_object_with_all_fields(run: Run, database: str) -> None:
    await execute(database, TRIGGER)
    result = await run("doctor", "--json", "--dsn", database)
    report = json.loads(result.stdout)
    assert report["log"].startswith("pgbackend on ")
    assert "fence" in report["looked_at"]
    (finding,) = [one for one in report["findings"] if one["check"] == "trigger"]
    assert finding == {
        "check": "trigger",
        "severity": "warning",
        "subject": "trigger slow on events",
        "what": finding["what"],
        "cure": 'DROP TRIGGER "slow" ON "pgbackend"."events";',
        "destroys": "the trigger",
    }


async def test_text_of_strangers_never_controls_the_terminal(run: Run, database: str) -> None:
    """The name of a subscription, the error of a handler, the query of a session."""
    hostile = "\x1b[2J\x07\u202eevil"
    await execute(database, "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
    await execute(
        database, "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ($1, 'strict', 1)", hostile
    )
    await execute(
        database,
        "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) VALUES ($1, 0, 1, 0, 1)",
        hostile,
    )
    await execute(
        database,
        "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error) "
        "VALUES ($1, 1, 1, 1, now(), $1)",
        hostile,
    )
    connection = await asyncpg.connect(database, server_settings={"application_name": hostile})
    await connection.execute(
        f"BEGIN; INSERT INTO pgbackend.events (id, source, type) VALUES ('2', '/s', 't') --{hostile}"
    )
    try:
        result = await run("doctor", "--dsn", database)
    finally:
        await connection.close()
    assert "strict-wait" in result.stdout
    assert all(one.isprintable() or one == "\n" for one in result.stdout)
    assert "pgbackend subscriptions delete $'\\u001b[2J\\u0007\\u202eevil'\n" in result.stdout


async def test_a_log_that_cannot_be_examined_is_one_clear_line(run: Run) -> None:
    result = await run("doctor", "--dsn", f"postgresql://nobody@localhost:{unasked_port()}/nowhere")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "cannot be reached" in result.stderr


async def test_an_unknown_severity_is_wrong_usage(run: Run, database: str) -> None:
    assert (await run("doctor", "--min-severity", "fatal", "--dsn", database)).exit_code == 2
