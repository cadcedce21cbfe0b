"""Positions that a subscription owed and that are gone from the log are on record.

Revision ID: 0007
Revises: 0006
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0007"
down_revision = "0006"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, offsets="{schema}.offsets", skipped="{schema}.skipped", own_table=_OWN_TABLE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# When a superuser migrates, the table must still be that of the log's owner.
_OWN_TABLE = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {offsets}::regclass);
BEGIN
    EXECUTE pg_catalog.format('ALTER TABLE %s OWNER TO %s', {skipped}::regclass, owner);
END"""

UPGRADE: tuple[str, ...] = (
    # The part of what is pending in which nobody has seen an event. What else is pending was one.
    "ALTER TABLE {schema}.offsets ADD COLUMN holes int8multirange NOT NULL DEFAULT '{}'",
    # Nothing is known of what is pending here already.
    "UPDATE {schema}.offsets SET holes = pending WHERE pending <> '{}'",
    """
    CREATE TABLE {schema}.skipped (
        subscription text NOT NULL,
        positions int8range NOT NULL,
        skipped_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT skipped_pkey PRIMARY KEY (subscription, positions),
        CONSTRAINT skipped_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT skipped_positions_not_empty CHECK (NOT isempty(positions))
    )""",
    "DO {own_table}",
)

DOWNGRADE: tuple[str, ...] = ("DROP TABLE {schema}.skipped", "ALTER TABLE {schema}.offsets DROP COLUMN holes")
