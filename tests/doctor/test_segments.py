"""Segments, retention, clocks and vacuum: conditions that need a log of their own."""

import asyncpg
import pytest

from tests.doctor.conftest import found, only
from tests.support.databases import connected, execute

OLD_EVENT = (
    "INSERT INTO pgbackend.events (id, source, type, recorded_at, data) "
    "VALUES ('old', '/s', 't', now() - interval '1 day', convert_to(repeat('0123456789', 100000), 'UTF8'))"
)


async def test_a_short_runway_is_a_warning_and_the_line_makes_segments(database: str) -> None:
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 99000000)")
    finding = only(await found(database), "segment-runway")
    assert finding.severity == "warning"
    assert "Segments end after 999,999 more positions" in finding.what
    await execute(database, str(finding.cure))
    assert await found(database) == []


async def test_a_log_without_room_is_an_error_and_the_line_makes_segments(database: str) -> None:
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 100000000)")
    finding = only(await found(database), "segment-runway")
    assert finding.severity == "error"
    assert "No segment holds position 100000001" in finding.what
    await execute(database, str(finding.cure))
    assert await found(database) == []
    await execute(database, "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")


async def test_a_detach_that_was_interrupted_is_an_error_and_the_line_ends_it(database: str) -> None:
    async with connected(database) as reader, connected(database) as operator:
        await reader.execute("BEGIN; SELECT count(*) FROM pgbackend.events")
        await operator.execute("SET statement_timeout = '300ms'")
        with pytest.raises(asyncpg.QueryCanceledError):
            await operator.execute(
                "ALTER TABLE pgbackend.events DETACH PARTITION pgbackend.events_50000000 CONCURRENTLY"
            )
        await reader.execute("ROLLBACK")
    finding = only(await found(database), "detach-pending")
    assert (finding.severity, finding.subject) == ("error", "segment events_50000000")
    await execute(database, str(finding.cure))
    assert [one for one in await found(database) if one.check == "detach-pending"] == []


async def test_old_events_that_nobody_drops_are_found_with_who_holds_them(database: str) -> None:
    await execute(
        database,
        f"{OLD_EVENT}; SELECT setval('pgbackend.events_position_seq', 10000001);"
        "UPDATE pgbackend.retention SET keep_us = 1000000, max_bytes = 1000",
    )
    findings = await found(database)
    stalled = only(findings, "retention-stalled")
    assert "The oldest event is 1.0 d old, and may be 1.0 s. No worker runs" in stalled.what
    assert only(findings, "log-size").cure == "pgbackend retention"

    await execute(
        database,
        "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('left', 'none', 1);"
        "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) VALUES ('left', 0, 1, 0, 1);",
    )
    findings = await found(database)
    assert "retention-stalled" not in {one.check for one in findings}, "it waits for the subscription"
    held = only(findings, "held-log")
    assert (held.severity, held.subject) == ("warning", "subscription left")
    assert held.cure == "pgbackend subscriptions delete left"
    assert only(findings, "abandoned-subscription").severity == "warning"

    await execute(
        database,
        "INSERT INTO pgbackend.workers (id, name, lease_timeout) VALUES (gen_random_uuid(), 'w', '1 hour');"
        "UPDATE pgbackend.offsets SET owner = workers.id FROM pgbackend.workers",
    )
    findings = await found(database)
    assert only(findings, "held-log").severity == "note", "a worker runs it"
    assert "abandoned-subscription" not in {one.check for one in findings}


async def test_segments_that_were_emptied_and_stay_are_found(database: str) -> None:
    await execute(
        database,
        "INSERT INTO pgbackend.segments (lower_bound, upper_bound, last_position, dropped_at) "
        "VALUES (0, 10000000, 5, now() - interval '1 day')",
    )
    assert only(await found(database), "retention-stalled").what.startswith("1 segments were emptied")


async def test_an_event_from_the_future_is_found(database: str) -> None:
    await execute(
        database, "INSERT INTO pgbackend.events (id, source, type, recorded_at) VALUES ('1', '/s', 't', now() + '2 h')"
    )
    finding = only(await found(database), "clock-jump")
    assert (finding.subject, finding.severity) == ("event 1", "warning")
    assert "2.0 h ahead of the server's clock" in finding.what


async def test_tables_that_were_not_frozen_for_long_are_found_and_the_lines_freeze_them(database: str) -> None:
    for _ in range(4):
        async with connected(database) as connection:
            await connection.execute(
                "DO $$ BEGIN FOR n IN 1..300 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$"
            )
    ill = [one for one in await found(database, wraparound=1_000) if one.check == "wraparound"]
    assert {"table offsets", "table events_0"} <= {one.subject for one in ill}
    async with connected(database) as connection:
        for one in ill:
            await connection.execute(str(one.cure))
    assert await found(database, wraparound=1_000) == []
