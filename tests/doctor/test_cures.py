"""Conditions that a few statements make: the doctor finds each, and its line cures it.

All of them are made in one log, which is examined once. Then every line is run as it is printed.
"""

import subprocess

import pytest

from pgbackend import Backend
from pgbackend.doctor import Finding
from tests.cli.conftest import Run
from tests.doctor.conftest import found
from tests.support.databases import Sql, connected, execute, query_value

STRANGER = "pgbackend_stranger"
CONDITIONS: dict[str, tuple[str, str]] = {
    # name: (statements, "check: subject" of the finding)
    "commits that are not on disk": (
        "ALTER DATABASE {database} SET synchronous_commit = off",
        "durability: setting synchronous_commit",
    ),
    "a strict isolation level": (
        "ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'",
        "isolation: setting default_transaction_isolation",
    ),
    "few connections": ("ALTER DATABASE {database} CONNECTION LIMIT 5", "connections: database {database}"),
    "a table without autovacuum": (
        "ALTER TABLE pgbackend.offsets SET (autovacuum_enabled = false)",
        "autovacuum: table offsets",
    ),
    "a table without autovacuum, in other words": (
        "ALTER TABLE pgbackend.workers SET (autovacuum_enabled = off)",
        "autovacuum: table workers",
    ),
    "a table of another owner": (f"ALTER TABLE pgbackend.skipped OWNER TO {STRANGER}", "owner: table skipped"),
    "a function of another owner": (
        f"ALTER FUNCTION pgbackend.forget_letters() OWNER TO {STRANGER}",
        "owner: function pgbackend.forget_letters()",
    ),
    "row-level security": (
        "ALTER TABLE pgbackend.kept_events ENABLE ROW LEVEL SECURITY",
        "row-security: table kept_events",
    ),
    "a default partition": (
        "CREATE TABLE pgbackend.rest PARTITION OF pgbackend.events DEFAULT",
        "default-partition: partition rest",
    ),
    "a stranger's partition": (
        'CREATE TABLE public."Odd one" PARTITION OF pgbackend.events FOR VALUES FROM (5000000000) TO (5000000010)',
        "foreign-segment: partition Odd one",
    ),
    "everybody may change events": ("GRANT UPDATE ON pgbackend.events TO PUBLIC", "unsafe-privilege: PUBLIC on events"),
    "a stranger may choose positions": (
        f"GRANT INSERT (position), INSERT (recorded_at) ON pgbackend.events TO {STRANGER}",
        f"unsafe-privilege: {STRANGER} on events",
    ),
    "a stranger may append past the fence": (
        f"GRANT INSERT ON pgbackend.events_0 TO {STRANGER}",
        f"unsafe-privilege: {STRANGER} on events_0",
    ),
    "a stranger may draw positions": (
        f"GRANT USAGE ON SEQUENCE pgbackend.events_position_seq TO {STRANGER}",
        f"unsafe-privilege: {STRANGER} on events_position_seq",
    ),
    "a trigger": (
        (
            "CREATE FUNCTION public.stop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            "CREATE TRIGGER slow AFTER INSERT ON pgbackend.events FOR EACH ROW EXECUTE FUNCTION public.stop()"
        ),
        "trigger: trigger slow on events",
    ),
    "a rule": (
        "CREATE RULE loud AS ON DELETE TO pgbackend.workers DO ALSO NOTIFY loud",
        "trigger: rule loud on workers",
    ),
    "a foreign key on events": (
        "CREATE TABLE public.orders (event bigint CONSTRAINT of_event REFERENCES pgbackend.events)",
        "foreign-key: foreign key of_event of orders",
    ),
    "a missing column": (
        "ALTER TABLE pgbackend.subscriptions DROP COLUMN target",
        "schema-drift: column target of subscriptions",
    ),
    "a column of another type": (
        "ALTER TABLE pgbackend.redeliveries ALTER COLUMN lives TYPE bigint",
        "schema-drift: column lives of redeliveries",
    ),
    "a missing check": (
        "ALTER TABLE pgbackend.offsets DROP CONSTRAINT offsets_until_not_negative",
        "schema-drift: check offsets_until_not_negative of offsets",
    ),
    "a missing index": (
        "DROP INDEX pgbackend.dead_letters_due",
        "schema-drift: index dead_letters_due of dead_letters",
    ),
    "a broken index": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pgbackend.redeliveries_due'::regclass",
        "schema-drift: index redeliveries_due of redeliveries",
    ),
    "a stranger's column": (
        "ALTER TABLE pgbackend.workers ADD COLUMN remark text",
        "schema-drift: column remark of workers",
    ),
    "a stranger's column that needs a value": (
        "ALTER TABLE pgbackend.skipped ADD COLUMN reason text NOT NULL",
        "schema-drift: column reason of skipped",
    ),
    "a stranger's check": (
        "ALTER TABLE pgbackend.subscriptions ADD CONSTRAINT few CHECK (shards < 100)",
        "schema-drift: check few of subscriptions",
    ),
    "a stranger's index": ("CREATE INDEX by_type ON pgbackend.events (type)", "extra-index: index by_type of events"),
    "a sequence with a cache": ("ALTER SEQUENCE pgbackend.events_position_seq CACHE 50", "fence: schema pgbackend"),
    "an identity that producers may choose": (
        "ALTER TABLE pgbackend.events ALTER COLUMN position SET GENERATED BY DEFAULT",
        "fence: schema pgbackend",
    ),
    "offsets ahead of the log": (
        (
            "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('done', 'none', 1);"
            "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch, completed_at) "
            "VALUES ('done', 0, 1, 5000, nextval('pgbackend.epochs'), now())"
        ),
        "log-set-back: schema pgbackend",
    ),
    "a worker from the future": (
        (
            "INSERT INTO pgbackend.workers (id, name, lease_timeout, heartbeat_at) "
            "VALUES (gen_random_uuid(), 'early', '1 s', now() + interval '1 hour')"
        ),
        "clock-jump: worker early",
    ),
    "a worker that died long ago": (
        (
            "INSERT INTO pgbackend.workers (id, name, lease_timeout, heartbeat_at) "
            "VALUES (gen_random_uuid(), 'late', '1 s', now() - interval '2 days')"
        ),
        "dead-worker: worker late",
    ),
    "a slot that nobody reads": (
        "SELECT pg_create_physical_replication_slot('pgbackend_nobody', true)",
        "replication-slot: physical replication slot pgbackend_nobody",
    ),
    "keys that nobody forgets": (
        (
            "INSERT INTO pgbackend.deduplication (window_us) VALUES (86400000000);"
            "INSERT INTO pgbackend.recent_events (slot, bucket, key) "
            "SELECT (bucket + 2) % 3, bucket - 1, 'key'::bytea "
            "FROM (SELECT floor(extract(epoch FROM now()) / 172800)::bigint AS bucket) AS day"
        ),
        "deduplication-stalled: table recent_events_",
    ),
    "a subscription that nobody runs": (
        (
            "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't');"
            "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES (E'left \\x1b[2J it''s', 'none', 1);"
            "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) "
            "VALUES (E'left \\x1b[2J it''s', 0, 1, 0, nextval('pgbackend.epochs'))"
        ),
        "abandoned-subscription: subscription left \x1b[2J it's",
    ),
    "a subscription that is named like an option": (
        (
            "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('--help', 'none', 1);"
            "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) "
            "VALUES ('--help', 0, 1, 0, nextval('pgbackend.epochs'))"
        ),
        "abandoned-subscription: subscription --help",
    ),
}


@pytest.fixture
async def stranger(server: str) -> None:
    await execute(server, f"DROP ROLE IF EXISTS {STRANGER}; CREATE ROLE {STRANGER}")


async def test_each_condition_is_found_and_its_line_cures_it(database: str, stranger: None, run: Run) -> None:
    assert await found(database) == []
    name = await query_value(database, "SELECT current_database()")
    async with connected(database) as connection:
        await connection.execute("SET allow_system_table_mods = on")
        for statements, _ in CONDITIONS.values():
            await connection.execute(statements.replace("{database}", f'"{name}"'))

    ill = await found(database)
    seen = {f"{one.check}: {one.subject}" for one in ill}
    expected = {subject.replace("{database}", name) for _, subject in CONDITIONS.values()}
    missed = {one for one in expected if not any(each.startswith(one) for each in seen)}
    assert not missed, f"not found of {sorted(seen)}"
    assert not {one for one in seen if not any(one.startswith(each) for each in expected)}, "nothing else is wrong"

    try:
        async with connected(database) as connection:
            for finding in ill:
                await cure(finding, connection, database, run)
        assert await found(database) == []
        await (backend := Backend(database)).init()
        await backend.probe()
        await backend.stop()
    finally:
        async with connected(database) as connection:
            await connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active;"
                f"DROP OWNED BY {STRANGER} CASCADE"
            )


async def cure(finding: Finding, connection: Sql, dsn: str, run: Run) -> None:
    """Run the lines of the cure as they are."""
    assert finding.cure, finding
    if finding.cure.startswith("pgbackend "):
        result = await run(*words(finding.cure), env={"PGBACKEND_DSN": dsn}, input=b"y\n")
        assert result.exit_code == 0, result.output
    else:
        for line in finding.cure.splitlines():
            await connection.execute(line)


def words(line: str) -> list[str]:
    """The words of a command, as bash reads them."""
    script = f"pgbackend() {{ printf '%s\\0' \"$@\"; }}; {line}"
    return subprocess.run(["bash", "-c", script], check=True, capture_output=True).stdout.decode().split("\0")[:-1]
