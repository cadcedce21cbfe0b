"""Who may do what with a log: the privileges of those who do not own it, as SQL for its owner to run.

Three kinds of role. A producer appends, and reads nothing of what others appended. A consumer runs subscriptions. An
operator looks, moves subscriptions and sends dead letters on their way again, and reads no event but those. Each gets
what the statements of its calls touch, of most tables by column; tests/postgres/test_grants.py
tries what it can and cannot do.

What nobody gets, because the fence (pgbackend/log/fence.py) stands on it: any privilege on a segment, `position` to
write, UPDATE, DELETE or TRUNCATE of events, nextval() or setval() of the positions. Nor `recorded_at` to write: dates
are looked up by it. Migrating stays with the owner. The SQL stands here, not in sql/: it takes names, not parameters.
"""

from collections.abc import Sequence

from pgbackend.codec.attributes import COLUMNS
from pgbackend.errors import ConfigError
from pgbackend.postgres.sql import place_schema, quote_ident

_Grants = tuple[tuple[str, str], ...]
"""Privileges, and on what."""

_EVENT = ", ".join(COLUMNS)
_TERMS = "ordering, start_at, end_position, end_at, start_bound, start_position"
_ALTERED = f"{_TERMS}, shards, draining_until"
_OFFSET = "position, pending, holes, epoch, owner, completed_at, until"
_NEW_OFFSET = "subscription, shard, shards, position, pending, holes, epoch"

_EVERYBODY: _Grants = (
    ("USAGE", "SCHEMA {schema}"),
    ("SELECT", "TABLE {schema}.pgbackend_revision"),
    # Whether the log was set back: its sequence against the highest position that is stored anywhere.
    ("SELECT", "SEQUENCE {schema}.events_position_seq"),
    ("SELECT (position)", "TABLE {schema}.events"),
    ("SELECT (position)", "TABLE {schema}.offsets"),
    # Whoever comes first after a crash has the new life named, but not by a name of its choice.
    ("SELECT, INSERT (single)", "TABLE {schema}.incarnation"),
    ("SELECT", "TABLE {schema}.life"),
    # To prove the fence: a transaction that appends nothing is opened, and must be in the evidence.
    ("EXECUTE", "FUNCTION {schema}.appenders_in_flight(regclass, regclass)"),
    ("EXECUTE", "FUNCTION {schema}.open_appender()"),
    ("EXECUTE", "FUNCTION {schema}.find_distributed(regclass)"),
    ("EXECUTE", "FUNCTION {schema}.make_segment()"),
)

_PRODUCER: _Grants = ((f"INSERT ({_EVENT})", "TABLE {schema}.events"),)

_CONSUMER: _Grants = (
    ("SELECT", "TABLE {schema}.events"),
    ("EXECUTE", "FUNCTION {schema}.appender_began(integer)"),
    ("EXECUTE", "FUNCTION {schema}.end_life(text)"),
    ("USAGE", "SEQUENCE {schema}.epochs"),
    (f"SELECT, DELETE, INSERT (name, shards, {_TERMS}), UPDATE ({_ALTERED})", "TABLE {schema}.subscriptions"),
    (f"SELECT, DELETE, INSERT ({_NEW_OFFSET}), UPDATE ({_OFFSET}, crashes)", "TABLE {schema}.offsets"),
    ("SELECT", "TABLE {schema}.living_workers"),
    ("SELECT, DELETE, INSERT (id, name, backend_pid, backend_start, lease_timeout)", "TABLE {schema}.workers"),
    ("UPDATE (backend_pid, backend_start, heartbeat_at, subscriptions, asked_at)", "TABLE {schema}.workers"),
    ("SELECT, DELETE, INSERT (subscription, position, key_hash)", "TABLE {schema}.redeliveries"),
    ("INSERT (attempt, due_at, last_error, failure, begun)", "TABLE {schema}.redeliveries"),
    ("UPDATE (attempt, due_at, last_error, failure, begun)", "TABLE {schema}.redeliveries"),
    ("SELECT, INSERT (subscription, positions)", "TABLE {schema}.skipped"),
    ("SELECT, DELETE", "TABLE {schema}.dead_letters"),
    ("UPDATE (attempts, error, details, attempt, due_at, begun)", "TABLE {schema}.dead_letters"),
    # Letters are copied from the log, not made up.
    ("EXECUTE", "FUNCTION {schema}.bury(jsonb)"),
)

_OPERATOR: _Grants = (
    # How long a subscription is behind, where a date is, and whose of several shards an event was.
    ("SELECT (position, recorded_at, key_hash)", "TABLE {schema}.events"),
    ("EXECUTE", "FUNCTION {schema}.appender_began(integer)"),
    ("EXECUTE", "FUNCTION {schema}.end_life(text)"),
    ("USAGE", "SEQUENCE {schema}.epochs"),
    (f"SELECT, DELETE, UPDATE ({_ALTERED})", "TABLE {schema}.subscriptions"),
    (f"SELECT, DELETE, INSERT ({_NEW_OFFSET}), UPDATE ({_OFFSET})", "TABLE {schema}.offsets"),
    ("SELECT", "TABLE {schema}.living_workers"),
    ("SELECT", "TABLE {schema}.workers"),
    ("SELECT, DELETE", "TABLE {schema}.redeliveries"),
    ("SELECT", "TABLE {schema}.skipped"),
    ("SELECT, UPDATE (attempt, due_at, begun)", "TABLE {schema}.dead_letters"),
)

_HEADING = """\
-- Run this as the owner of the log's tables, or as a superuser. To run it again changes nothing."""
# No names in comments: a name may have more than one line.
_SEE_OTHERS = """\
-- Since when a producer's transaction is open, consumers and operators see if the owner of the tables does: because it
-- is a superuser, or because one has granted it pg_read_all_stats."""


def grants(
    schema: str, *, producers: Sequence[str] = (), consumers: Sequence[str] = (), operators: Sequence[str] = ()
) -> str:
    """The SQL that gives these roles what they need on the log in `schema`. A role may be of several kinds.

    Raises ConfigError for what cannot be the name of a role or schema.
    """
    everybody = list(dict.fromkeys([*producers, *consumers, *operators]))
    blocks = [
        _HEADING,
        "BEGIN;",
        _block("everybody", _EVERYBODY, everybody, schema),
        _block("producers", _PRODUCER, producers, schema),
        _block("consumers", _CONSUMER, consumers, schema),
        _block("operators", _OPERATOR, operators, schema),
        _SEE_OTHERS if consumers or operators else "",
        "COMMIT;",
    ]
    return "\n\n".join(filter(None, blocks))


def _block(title: str, privileges: _Grants, roles: Sequence[str], schema: str) -> str:
    if not roles:
        return ""
    grantees = ", ".join(map(_quote_role, dict.fromkeys(roles)))
    statements = [
        f"GRANT {privilege} ON {place_schema(target, schema=schema)} TO {grantees};" for privilege, target in privileges
    ]
    return "\n".join([f"-- {title}", *statements])


def _quote_role(name: str) -> str:
    if name in ("public", "none"):
        # Even in quotes PostgreSQL takes the one for all roles there are.
        raise ConfigError(f"{name!r} is no role. Name the roles that produce, consume or operate.")
    return quote_ident(name)
