"""Dates are such as Python has: an event's, and those that a subscription starts and ends at.

Revision ID: 0008
Revises: 0007
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0008"
down_revision = "0007"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, validate=_VALIDATE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# Only an empty log is validated: a scan would hold up producers. Readers cope with what is there.
_VALIDATE = """
BEGIN
    IF NOT EXISTS (SELECT FROM {schema}.events) THEN
        ALTER TABLE {schema}.events VALIDATE CONSTRAINT events_recorded_at_readable;
    END IF;
END"""

UPGRADE: tuple[str, ...] = (
    """
    ALTER TABLE {schema}.events ADD CONSTRAINT events_recorded_at_readable CHECK (
        recorded_at >= '0001-01-01 00:00:00+00' AND recorded_at < '10000-01-01 00:00:00+00'
    ) NOT VALID""",
    "DO {validate}",
    # "Never" was stored as infinity.
    """
    UPDATE {schema}.subscriptions
    SET start_at = greatest(
            least(start_at, '9999-12-31 23:59:59.999998+00'), '0001-01-01 00:00:00.000001+00'
        )
    WHERE start_at IS NOT NULL""",
    """
    UPDATE {schema}.subscriptions
    SET end_at = greatest(
            least(end_at, '9999-12-31 23:59:59.999998+00'), '0001-01-01 00:00:00.000001+00'
        )
    WHERE end_at IS NOT NULL""",
    # Neither the first nor the last date that there is: the driver makes those infinite.
    """
    ALTER TABLE {schema}.subscriptions ADD CONSTRAINT subscriptions_bounds_readable CHECK (
        start_at > '0001-01-01 00:00:00+00' AND start_at < '9999-12-31 23:59:59.999999+00'
        AND end_at > '0001-01-01 00:00:00+00' AND end_at < '9999-12-31 23:59:59.999999+00'
    )""",
)

DOWNGRADE: tuple[str, ...] = (
    "ALTER TABLE {schema}.subscriptions DROP CONSTRAINT subscriptions_bounds_readable",
    "ALTER TABLE {schema}.events DROP CONSTRAINT events_recorded_at_readable",
)
