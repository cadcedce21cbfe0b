"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    for statement in UPGRADE:
        _run(statement)


def downgrade() -> None:
    for statement in DOWNGRADE:
        _run(statement)


UPGRADE: tuple[str, ...] = ()

DOWNGRADE: tuple[str, ...] = ()


def _run(statement: str) -> None:
    context = op.get_context()
    schema = '"' + str(context.version_table_schema).replace('"', '""') + '"'
    statement = statement.replace("{schema}", schema)
    # Not op.execute: it would read a colon in the schema's name as a parameter.
    if context.as_sql:
        context.impl.static_output(f"{statement};")
    else:
        op.get_bind().exec_driver_sql(statement)
