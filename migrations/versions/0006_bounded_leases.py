"""A worker's lease has a longest time, so that no row of `workers` can keep its shards for ever.

Revision ID: 0006
Revises: 0005
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0006"
down_revision = "0005"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


UPGRADE: tuple[str, ...] = (
    # Such a row makes each look at `living_workers` fail: the start of its lease is before all dates.
    "DELETE FROM {schema}.workers WHERE lease_timeout > interval '1 day'",
    """
    ALTER TABLE {schema}.workers
        ADD CONSTRAINT workers_lease_timeout_bounded CHECK (lease_timeout <= interval '1 day')""",
)

DOWNGRADE: tuple[str, ...] = ("ALTER TABLE {schema}.workers DROP CONSTRAINT workers_lease_timeout_bounded",)
