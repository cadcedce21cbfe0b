"""The privileges that roles need on a log they do not own, as SQL for its owner to run.

There are four kinds of role. A producer appends, and reads no events. A consumer runs subscriptions. A reader follows
and exports the log. An operator moves and pauses subscriptions, skips and redacts events, redelivers and purges dead
letters, and reads no events except those. All but producers read the status. Each gets what its calls need, on most
tables by column;
tests/postgres/test_grants.py tries what each kind can and cannot do.

The promise: no role gets what would break the fence (pgbackend/log/fence.py), which is any privilege on a segment,
writing `position`, UPDATE, DELETE or TRUNCATE of events, and nextval() or setval() of the positions. Nor may a role
write `recorded_at`, by which dates are looked up. Only the owner migrates. The SQL is built here and not in sql/,
because it takes names, not parameters.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pgbackend.codec.attributes import COLUMNS
from pgbackend.errors import ConfigError
from pgbackend.postgres.sql import fill_in, quote_ident

_PRIVILEGE = re.compile(r"(\w+)(?: \(([^)]*)\))?")
_Grants = tuple[tuple[str, str], ...]
"""Pairs of privileges and their object."""

_EVENT = ", ".join(COLUMNS)
_TERMS = "ordering, start_at, end_position, end_at, start_bound, start_position"
_ALTERED = f"{_TERMS}, shards, draining_until, paused_at, paused_by, pause_reason, resumed_at"
_RETENTION = "keep_us, max_age_us, max_bytes, dead_letters_us"
_OFFSET = "position, pending, holes, epoch, owner, completed_at, until"
_NEW_OFFSET = "subscription, shard, shards, until, position, pending, holes, epoch"

# For `status()`. Views read their tables with their owner's rights.
_STATUS: _Grants = (
    *[
        ("SELECT", f"TABLE {{schema}}.{view}")
        for view in ("log_status", "lag", "shard_lag", "holes", "appenders", "worker_status", "rates")
    ],
    ("EXECUTE", "FUNCTION {schema}.appender_began(integer)"),
    ("EXECUTE", "FUNCTION {schema}.find_holders()"),
    ("SELECT (name, paused_at)", "TABLE {schema}.subscriptions"),
)

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
    ("SELECT", "TABLE {schema}.deduplication"),
    ("EXECUTE", "FUNCTION {schema}.forget_keys()"),
    ("SELECT", "TABLE {schema}.retention"),
)


_PRODUCER: _Grants = (
    (f"INSERT ({_EVENT})", "TABLE {schema}.events"),
    # With the caller's rights: they append nothing for a role that may not insert.
    *[
        ("EXECUTE", f"FUNCTION {{schema}}.produce(text, text, {form}, text, text, text, text, text, text, jsonb)")
        for form in ("text", "jsonb", "bytea")
    ],
    ("EXECUTE", "FUNCTION {schema}.event_key(text, text)"),
    ("EXECUTE", "FUNCTION {schema}.first_copies(text[], text[])"),
    ("EXECUTE", "FUNCTION {schema}.claim_keys(bytea[], bigint)"),
    ("EXECUTE", "FUNCTION {schema}.claim_keys_soon(bytea[], bigint)"),
    ("EXECUTE", "FUNCTION {schema}.claim_new_keys(bytea, bigint)"),
    ("EXECUTE", "FUNCTION {schema}.blocked_keys(bytea[])"),
    ("EXECUTE", f"FUNCTION {{schema}}.encode_event(text, text, text, text, bytea, {', '.join(['text'] * 6)}, jsonb)"),
)

_REPAIR: _Grants = (
    ("UPDATE (retried_at)", "TABLE {schema}.subscriptions"),
    ("SELECT", "TABLE {schema}.redactions"),
    ("EXECUTE", "FUNCTION {schema}.waiting_events(text, bigint, integer)"),
    ("EXECUTE", "FUNCTION {schema}.bury_skipped(text, bigint)"),
)

_CONSUMER: _Grants = (
    ("SELECT", "TABLE {schema}.events"),
    ("SELECT", "TABLE {schema}.stored_events"),
    ("SELECT", "TABLE {schema}.all_events"),
    ("SELECT", "TABLE {schema}.segments"),
    ("SELECT (position)", "TABLE {schema}.kept_events"),
    # These decide alone whether something is to be done.
    ("EXECUTE", "FUNCTION {schema}.cut_segment()"),
    ("EXECUTE", "FUNCTION {schema}.empty_segment()"),
    ("EXECUTE", "FUNCTION {schema}.remove_segments(integer)"),
    ("EXECUTE", "FUNCTION {schema}.forget_letters()"),
    ("EXECUTE", "FUNCTION {schema}.forget_removed()"),
    ("EXECUTE", "FUNCTION {schema}.key_hashes(int8multirange)"),
    *_STATUS,
    ("EXECUTE", "FUNCTION {schema}.end_life(text)"),
    ("USAGE", "SEQUENCE {schema}.epochs"),
    (f"SELECT, DELETE, INSERT (name, shards, {_TERMS}), UPDATE ({_ALTERED}, target)", "TABLE {schema}.subscriptions"),
    (f"SELECT, DELETE, INSERT ({_NEW_OFFSET}), UPDATE ({_OFFSET}, crashes)", "TABLE {schema}.offsets"),
    ("SELECT", "TABLE {schema}.living_workers"),
    ("SELECT, DELETE, INSERT (id, name, backend_pid, backend_start, lease_timeout)", "TABLE {schema}.workers"),
    ("UPDATE (backend_pid, backend_start, heartbeat_at, subscriptions, asked_at)", "TABLE {schema}.workers"),
    ("SELECT, DELETE, INSERT (subscription, position, key_hash)", "TABLE {schema}.redeliveries"),
    ("INSERT (attempt, due_at, last_error, failure, started_by, lives, history)", "TABLE {schema}.redeliveries"),
    ("UPDATE (attempt, due_at, last_error, failure, started_by, lives, history)", "TABLE {schema}.redeliveries"),
    ("SELECT, INSERT (subscription, positions)", "TABLE {schema}.skipped"),
    ("SELECT, DELETE", "TABLE {schema}.dead_letters"),
    ("UPDATE (attempts, error, details, attempt, due_at, started_by, lives, history)", "TABLE {schema}.dead_letters"),
    # No INSERT on dead_letters: letters are copied from the log, so that no role can make them up.
    ("EXECUTE", "FUNCTION {schema}.bury(jsonb)"),
    *_REPAIR,
)

# No end_life(): whoever only reads must not be able to interrupt workers.
_READER: _Grants = (
    ("SELECT", "TABLE {schema}.events"),
    ("SELECT", "TABLE {schema}.stored_events"),
    ("SELECT", "TABLE {schema}.all_events"),
    ("SELECT", "TABLE {schema}.segments"),
    ("SELECT (position)", "TABLE {schema}.kept_events"),
    *_STATUS,
)

_OPERATOR: _Grants = (
    # To find how far behind a subscription is, the position of a date, and the shard of an event.
    ("SELECT (position, recorded_at)", "TABLE {schema}.events"),
    ("EXECUTE", "FUNCTION {schema}.key_hashes(int8multirange)"),
    *_STATUS,
    ("EXECUTE", "FUNCTION {schema}.end_life(text)"),
    ("USAGE", "SEQUENCE {schema}.epochs"),
    (f"SELECT, DELETE, UPDATE ({_ALTERED})", "TABLE {schema}.subscriptions"),
    (f"SELECT, DELETE, INSERT ({_NEW_OFFSET}), UPDATE ({_OFFSET})", "TABLE {schema}.offsets"),
    ("SELECT", "TABLE {schema}.living_workers"),
    ("SELECT", "TABLE {schema}.workers"),
    ("SELECT, DELETE, UPDATE (due_at)", "TABLE {schema}.redeliveries"),
    ("SELECT", "TABLE {schema}.skipped"),
    ("INSERT (window_us), UPDATE (window_us)", "TABLE {schema}.deduplication"),
    (f"INSERT ({_RETENTION}), UPDATE ({_RETENTION})", "TABLE {schema}.retention"),
    ("SELECT", "TABLE {schema}.segments"),
    ("SELECT (position)", "TABLE {schema}.kept_events"),
    ("SELECT, DELETE, UPDATE (attempt, due_at, started_by, lives, history)", "TABLE {schema}.dead_letters"),
    *_REPAIR,
    # Destroys, as purging does, and never more than one event: no role gets UPDATE of events.
    ("EXECUTE", "FUNCTION {schema}.redact(bigint)"),
)

_KINDS: dict[str, _Grants] = {"producer": _PRODUCER, "consumer": _CONSUMER, "reader": _READER, "operator": _OPERATOR}

_HEADING = """\
-- Run this as the owner of the log's tables, or as a superuser. Running it again changes nothing."""
# No role's name in a comment: a name may have more than one line.
_SEE_OTHERS = """\
-- Consumers, readers and operators see the age of a producer's transaction if the owner of the tables sees it: because
-- the owner is a superuser, or was granted pg_read_all_stats."""


@dataclass(frozen=True, slots=True)
class Right:
    """One privilege on one object of the log, or on one of its columns."""

    privilege: str
    column: str | None
    """None for the whole object."""
    kind: str
    """SCHEMA, TABLE, SEQUENCE or FUNCTION."""
    object: str
    """Its name in the log's schema, a function's with its arguments; empty for the schema itself."""

    @property
    def whole(self) -> "Right":
        """The same on the whole object."""
        return replace(self, column=None)


def rights() -> dict[str, frozenset[Right]]:
    """The rights that each kind of role needs, by its name: producer, consumer, reader, operator."""
    return {
        kind: frozenset(
            Right(privilege=found[1], column=column, kind=what, object=name.removeprefix("{schema}").removeprefix("."))
            for privileges, target in (*_EVERYONE, *own)
            for what, _, name in [target.partition(" ")]
            for found in _PRIVILEGE.finditer(privileges)
            for column in (found[2].split(", ") if found[2] else [None])
        )
        for kind, own in _KINDS.items()
    }


def grant_lines(wanted: Iterable[Right], *, schema: str, role: str) -> list[str]:
    """The GRANTs that give these rights to a role, one for each privilege on an object. Raises ConfigError."""
    columns: dict[Right, list[str]] = {}
    for right in wanted:
        columns.setdefault(right.whole, []).extend([right.column] if right.column else [])
    return [
        " ".join(
            [
                "GRANT",
                whole.privilege + (f" ({', '.join(sorted(names))})" if names else ""),
                f"ON {whole.kind}",
                ".".join(filter(None, [quote_ident(schema), whole.object])),
                f"TO {_quote_role(role)};",
            ]
        )
        for whole, names in columns.items()
    ]


def grants(
    schema: str,
    *,
    producers: Sequence[str] = (),
    consumers: Sequence[str] = (),
    readers: Sequence[str] = (),
    operators: Sequence[str] = (),
) -> str:
    """The SQL that gives these roles what they need on the log in `schema`. A role may be of several kinds.

    Raises ConfigError for a name that no role or schema can have.
    """
    everyone = list(dict.fromkeys([*producers, *consumers, *readers, *operators]))
    blocks = [
        _HEADING,
        "BEGIN;",
        _block("everyone", _EVERYONE, everyone, schema),
        _block("producers", _PRODUCER, producers, schema),
        _block("consumers", _CONSUMER, consumers, schema),
        _block("readers", _READER, readers, schema),
        _block("operators", _OPERATOR, operators, schema),
        _SEE_OTHERS if consumers or readers or operators else "",
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
        raise ConfigError(f"{name!r} is not a role. Name the roles that produce, consume, read or operate.")
    return quote_ident(name)
