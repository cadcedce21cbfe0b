"""Workers share the shards fairly, their number can be changed, and events that kill workers are found.

Revision ID: 0004
Revises: 0003
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0004"
down_revision = "0003"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, workers="{schema}.workers", living_workers="{schema}.living_workers", own_view=_OWN_VIEW)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# When a superuser migrates, the owner of the tables must still be able to use and replace it.
_OWN_VIEW = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {workers}::regclass);
BEGIN
    EXECUTE pg_catalog.format('ALTER VIEW %s OWNER TO %s', {living_workers}::regclass, owner);
END"""

UPGRADE: tuple[str, ...] = (
    # What a worker runs, and when it last had room for more.
    "ALTER TABLE {schema}.workers ADD COLUMN subscriptions text[] NOT NULL DEFAULT '{}'",
    "ALTER TABLE {schema}.workers ADD COLUMN asked_at timestamptz",
    # Until then nobody runs it: who is about to change its shards waits for those at work to come to an end.
    "ALTER TABLE {schema}.subscriptions ADD COLUMN resting_until timestamptz",
    # How many owners in a row died with the shard before all that was open when they took it was settled.
    "ALTER TABLE {schema}.offsets ADD COLUMN crashes integer NOT NULL DEFAULT 0",
    # Whether the last attempt is only known to have begun: seen by another process, it killed the one that made it.
    "ALTER TABLE {schema}.redeliveries ADD COLUMN begun boolean NOT NULL DEFAULT false",
    "ALTER TABLE {schema}.dead_letters ADD COLUMN begun boolean NOT NULL DEFAULT false",
    # Dead is who has not been heard of for its own `lease_timeout`, or whose registered backend is gone; a start time
    # that this role may not see proves nothing, nor one that the worker itself could not see (after SET ROLE, its own
    # backend is another role's).
    """
    CREATE VIEW {schema}.living_workers AS
    SELECT worker.id, worker.name, worker.subscriptions, worker.asked_at
    FROM {schema}.workers AS worker
    WHERE worker.heartbeat_at >= clock_timestamp() - worker.lease_timeout
        AND (
            worker.backend_pid IS NULL
            OR EXISTS (
                SELECT
                FROM pg_catalog.pg_stat_activity AS activity
                WHERE activity.pid = worker.backend_pid
                    AND coalesce(activity.backend_start = worker.backend_start, true)
            )
        )""",
    "DO {own_view}",
)

DOWNGRADE: tuple[str, ...] = (
    "DROP VIEW {schema}.living_workers",
    "ALTER TABLE {schema}.dead_letters DROP COLUMN begun",
    "ALTER TABLE {schema}.redeliveries DROP COLUMN begun",
    "ALTER TABLE {schema}.offsets DROP COLUMN crashes",
    "ALTER TABLE {schema}.subscriptions DROP COLUMN resting_until",
    "ALTER TABLE {schema}.workers DROP COLUMN asked_at, DROP COLUMN subscriptions",
)
