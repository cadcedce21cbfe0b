"""A subscription can be altered: where it was told to start is kept.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for statement in UPGRADE:
        _run(statement)


def downgrade() -> None:
    for statement in DOWNGRADE:
        _run(statement)


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


def _run(statement: str) -> None:
    context = op.get_context()
    schema = '"' + str(context.version_table_schema).replace('"', '""') + '"'
    statement = statement.replace("{schema}", schema)
    # Not op.execute: it would read a colon in the schema's name as a parameter.
    if context.as_sql:
        context.impl.static_output(f"{statement};")
    else:
        op.get_bind().exec_driver_sql(statement)
