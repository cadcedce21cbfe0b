"""Subscriptions that do not get on, and what they lost."""

import pytest

from tests.doctor.conftest import found, only
from tests.support.databases import execute

WORKER = "00000000-0000-0000-0000-000000000001"
RUN = (
    f"INSERT INTO pgbackend.workers (id, name, lease_timeout) VALUES ('{WORKER}', 'host:1', '1 hour');"
    "INSERT INTO pgbackend.events (id, source, type) SELECT n, '/s', 't' FROM generate_series(1, 9) AS n;"
    "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('billing', 'strict', 1);"
    "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch, owner) "
    f"VALUES ('billing', 0, 1, 9, 1, '{WORKER}');"
)
RETRY = (
    "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error) "
    "VALUES ('billing', 4, 1, 3, now() - interval '1 hour', 'no such customer')"
)
LETTER = (
    "INSERT INTO pgbackend.dead_letters (subscription, position, recorded_at, key_hash, specversion, id, source, type, "
    "extensions, attempts, error) VALUES ('billing', 1, now(), 1, '1.0', '1', '/s', 't', '{}', 5, 'no')"
)
CONDITIONS = {
    "dead-letters": (LETTER, "pgbackend dead-letters list --by-group --subscription billing"),
    "overdue-retries": (RETRY, None),
    "strict-wait": (RETRY, "pgbackend subscriptions skip --yes billing 4"),
    "paused-subscription": (
        (
            "UPDATE pgbackend.subscriptions SET paused_at = now() - interval '2 days', paused_by = 'dispatcher', "
            "pause_reason = 'HTTP 410'; UPDATE pgbackend.offsets SET position = 5"
        ),
        "pgbackend subscriptions resume billing",
    ),
    "crash-loop": ("UPDATE pgbackend.offsets SET crashes = 2", None),
    "pending-limit": ("UPDATE pgbackend.offsets SET pending = '{[1,2),[3,4)}'", None),
    "stuck-reshard": (
        (
            "UPDATE pgbackend.offsets SET until = 12, owner = NULL;"
            "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) "
            "VALUES ('billing', 0, 2, 9, 2)"
        ),
        None,
    ),
    "lost-events": (
        "INSERT INTO pgbackend.skipped (subscription, positions) VALUES ('billing', '[2,5)')",
        "pgbackend retention",
    ),
}


@pytest.mark.parametrize("check", CONDITIONS)
async def test_what_keeps_a_subscription_from_getting_on_is_named_with_its_cure(database: str, check: str) -> None:
    statements, cure = CONDITIONS[check]
    await execute(database, RUN)
    assert await found(database, dead_letters=1, open_ranges=2) == []

    await execute(database, statements)
    finding = only(await found(database, dead_letters=1, open_ranges=2), check)
    assert finding.subject == "subscription billing"
    assert finding.cure == cure
    assert finding.cure or "No line cures this" in finding.what


@pytest.mark.parametrize(("attempt", "severity"), [(2, "note"), (3, "warning")])
async def test_a_strict_subscription_may_fail_now_and_then(database: str, attempt: int, severity: str) -> None:
    await execute(database, f"{RUN}{RETRY}; UPDATE pgbackend.redeliveries SET attempt = {attempt}, due_at = now()")
    assert only(await found(database), "strict-wait").severity == severity


async def test_an_old_loss_is_no_finding_any_more(database: str) -> None:
    await execute(
        database,
        RUN + "INSERT INTO pgbackend.skipped (subscription, positions, skipped_at) "
        "VALUES ('billing', '[2,5)', now() - interval '8 days')",
    )
    assert await found(database) == []
