"""`pgbackend redact`."""

import re

from pgbackend import Backend
from tests.cli.conftest import Run
from tests.support.backends import produce
from tests.support.databases import connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event


async def test_an_event_is_redacted_once_that_is_confirmed_and_what_is_out_of_reach_is_named(
    run: Run, database: str, backend: Backend
) -> None:
    await backend.subscribe("billing", Catch())
    await produce(backend, "1")

    refused = await run("redact", "1", "--dsn", database)
    assert refused.exit_code == 1
    assert "This destroys the data of the event at position 1" in refused.output
    async with connected(database) as connection:
        assert await connection.fetchval("SELECT data FROM pgbackend.events") is not None

    done = await run("redact", "1", "--yes", "--dsn", database)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("The event at position 1 is redacted, by ")
    assert "0 dead letters of it are deleted." in done.stdout
    assert "These subscriptions have not handled it and skip it: billing." in done.stdout
    for place in ("(FULL, ANALYZE) pgbackend.events_0;", "write-ahead log", "backups", "exports", "memory of workers"):
        assert place in done.stdout
    async with connected(database) as connection:
        assert await connection.fetchval("SELECT data FROM pgbackend.events") is None
        # The line works as it is printed.
        await connection.execute("VACUUM (FULL, ANALYZE) pgbackend.events_0")


async def test_the_printed_line_removes_the_event_from_the_planners_statistics(
    run: Run, database: str, backend: Backend
) -> None:
    await backend.produce_many([make_event(name, key=name) for name in ("Anna", "Bert", "Carl")])
    statistics = "SELECT histogram_bounds::text FROM pg_stats WHERE tablename = 'events_0' AND attname = 'partitionkey'"
    async with connected(database) as connection:
        await connection.execute("ANALYZE pgbackend.events_0")
        assert "Carl" in await connection.fetchval(statistics)

        done = await run("redact", "3", "--yes", "--dsn", database)

        (line,) = re.findall(r"VACUUM \(FULL, ANALYZE\) \S+;", done.stdout)
        await connection.execute(line)
        assert await connection.fetchval(statistics) == "{Anna,Bert}"


async def test_a_position_without_an_event_is_one_clear_line(run: Run, database: str) -> None:
    result = await run("redact", "7", "--yes", "--dsn", database)

    assert result.exit_code == 1
    assert result.output.startswith("Error: There is nothing at position 7 to redact")
