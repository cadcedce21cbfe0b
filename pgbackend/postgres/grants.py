"""The privileges that roles need on a log they do not own, as SQL for its owner to run.

There are three kinds of role. A producer appends, and reads no events. A consumer runs subscriptions. An operator reads
the status, moves subscriptions and redelivers dead letters, and reads no events except those. Each gets what its calls
need, on most tables by column; tests/postgres/test_grants.py tries what each kind can and cannot do.

The promise: no role gets what would break the fence (pgbackend/log/fence.py), which is any privilege on a segment,
writing `position`, UPDATE, DELETE or TRUNCATE of events, and nextval() or setval() of the positions. Nor may a role
write `recorded_at`, by which dates are looked up. Only the owner migrates. The SQL is built here and not in sql/,
because it takes names, not parameters.
"""

from collections.abc import Sequence

from pgbackend.codec.attributes import COLUMNS
from pgbackend.errors import ConfigError
from pgbackend.postgres.sql import fill_in, quote_ident

_Grants = tuple[tuple[str, str], ...]
"""Pairs of privileges and their object."""

_EVENT = ", ".join(COLUMNS)
_TERMS = "ordering, start_at, end_position, end_at, start_bound, start_position"
_ALTERED = f"{_TERMS}, shards, draining_until"
_OFFSET = "position, pending, holes, epoch, owner, completed_at, until"
_NEW_OFFSET = "subscription, shard, shards, until, position, pending, holes, epoch"

_EVERYONE: _Grants = (
    ("USAGE", "SCHEMA {schema}"),
    ("SELECT", "TABLE {schema}.pgbackend_revision"),
    # To detect a sequence that is behind the highest position stored anywhere.
    ("SELECT", "SEQUENCE {schema}.events_position_seq"),
    ("SELECT (position)", "TABLE {schema}.events"),
    ("SELECT (position)", "TABLE {schema}.offsets"),
    # The first process after a crash inserts the new incarnation, but may not choose its id.
    ("SELECT, INSERT (single)", "TABLE {schema}.incarnation"),
    ("SELECT", "TABLE {schema}.life"),
    # To test the evidence of the fence, which must name a transaction that opened the log for an append.
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
    ("INSERT (attempt, due_at, last_error, failure, started_by, lives)", "TABLE {schema}.redeliveries"),
    ("UPDATE (attempt, due_at, last_error, failure, started_by, lives)", "TABLE {schema}.redeliveries"),
    ("SELECT, INSERT (subscription, positions)", "TABLE {schema}.skipped"),
    ("SELECT, DELETE", "TABLE {schema}.dead_letters"),
    ("UPDATE (attempts, error, details, attempt, due_at, started_by, lives)", "TABLE {schema}.dead_letters"),
    # No INSERT on dead_letters: letters are copied from the log, so that no role can make them up.
    ("EXECUTE", "FUNCTION {schema}.bury(jsonb)"),
)

_OPERATOR: _Grants = (
    # To find how far behind a subscription is, the position of a date, and the shard of an event.
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
    ("SELECT, UPDATE (attempt, due_at, started_by, lives)", "TABLE {schema}.dead_letters"),
)

_HEADING = """\
-- Run this as the owner of the log's tables, or as a superuser. Running it again changes nothing."""
# No role's name in a comment: a name may have more than one line.
_SEE_OTHERS = """\
-- Consumers and operators see the age of a producer's transaction if the owner of the tables sees it: because the owner
-- is a superuser, or was granted pg_read_all_stats."""


def grants(
    schema: str, *, producers: Sequence[str] = (), consumers: Sequence[str] = (), operators: Sequence[str] = ()
) -> str:
    """The SQL that gives these roles what they need on the log in `schema`. A role may be of several kinds.

    Raises ConfigError for a name that no role or schema can have.
    """
    everyone = list(dict.fromkeys([*producers, *consumers, *operators]))
    blocks = [
        _HEADING,
        "BEGIN;",
        _block("everyone", _EVERYONE, everyone, schema),
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
        f"GRANT {privilege} ON {fill_in(target, schema=schema)} TO {grantees};" for privilege, target in privileges
    ]
    return "\n".join([f"-- {title}", *statements])


def _quote_role(name: str) -> str:
    if name in ("public", "none"):
        # Even in quotes, PostgreSQL reads "public" as all roles.
        raise ConfigError(f"{name!r} is not a role. Name the roles that produce, consume or operate.")
    return quote_ident(name)
