"""A pause is stored with its subscription, so that every process obeys it and no restart ends it.

Revision ID: r0005
Revises: r0004

- `paused_at`, `paused_by`, `pause_reason`: since when, who has to end it, and why. All null while it is not paused.
- `resumed_at`: the last resume. A dispatcher's pause is stored only if nobody has resumed the subscription since that
  process last looked, so a late one does not undo a resume.
- `target`: what the subscription's events go to, in the words of whoever subscribed. Another one ends a dispatcher's
  pause, and a process with an old one cannot pause the subscription.

Workers of the former revision ignore all of them: they dispatch on, and their own pauses stay in their process.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0005"
down_revision = "r0004"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, (PAUSE,))


def downgrade(*, op: Operations) -> None:
    ddl.run(op, (NO_PAUSE,))


PAUSE = """
    ALTER TABLE {schema}.subscriptions
        ADD COLUMN paused_at timestamptz,
        ADD COLUMN paused_by text,
        ADD COLUMN pause_reason text,
        ADD COLUMN resumed_at timestamptz,
        ADD COLUMN target text,
        ADD CONSTRAINT subscriptions_paused_by_known CHECK (paused_by IN ('operator', 'dispatcher')),
        ADD CONSTRAINT subscriptions_pause_whole CHECK (num_nulls(paused_at, paused_by, pause_reason) IN (0, 3))"""

NO_PAUSE = """
    ALTER TABLE {schema}.subscriptions
        DROP COLUMN paused_at,
        DROP COLUMN paused_by,
        DROP COLUMN pause_reason,
        DROP COLUMN resumed_at,
        DROP COLUMN target"""
