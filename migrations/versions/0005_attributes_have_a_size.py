"""The attributes of one event have at most 64 KiB together, also when plain SQL writes them.

Revision ID: 0005
Revises: 0004
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0005"
down_revision = "0004"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, validate=_VALIDATE)


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# Only an empty log is validated: a scan would hold up producers, and events that were taken in before may have more.
# Readers cope with any size.
_VALIDATE = """
BEGIN
    IF NOT EXISTS (SELECT FROM {schema}.events) THEN
        ALTER TABLE {schema}.events VALIDATE CONSTRAINT events_attributes_size;
    END IF;
END"""

UPGRADE: tuple[str, ...] = (
    # PostgreSQL reads the text of a CHECK again for each INSERT: a sum of ten lengths took 15 µs of 155.
    """
    ALTER TABLE {schema}.events ADD CONSTRAINT events_attributes_size CHECK (
        octet_length(concat(
            specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions
        )) <= 65536
    ) NOT VALID""",
    "DO {validate}",
)

DOWNGRADE: tuple[str, ...] = ("ALTER TABLE {schema}.events DROP CONSTRAINT events_attributes_size",)
