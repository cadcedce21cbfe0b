"""A subscription can be altered: where it was told to start is kept.

Revision ID: 0002
Revises: 0001
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0002"
down_revision = "0001"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


UPGRADE: tuple[str, ...] = (
    # The position or the date, as text of one form; null for the log's beginning and its end, which are no places to go
    # back to. Nobody knows what those were told that are here already: "unknown" is not another place.
    "ALTER TABLE {schema}.subscriptions ADD COLUMN start_bound text",
    # Set while a subscription begins behind the end of the log, where no offset can stand.
    "ALTER TABLE {schema}.subscriptions ADD COLUMN start_position bigint",
    "UPDATE {schema}.subscriptions SET start_bound = 'unknown'",
)

DOWNGRADE: tuple[str, ...] = (
    "ALTER TABLE {schema}.subscriptions DROP COLUMN start_position",
    "ALTER TABLE {schema}.subscriptions DROP COLUMN start_bound",
)
