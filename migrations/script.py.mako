"""${message}.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "${up_revision}"
down_revision = "${down_revision}"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


UPGRADE: tuple[str, ...] = ()

DOWNGRADE: tuple[str, ...] = ()
