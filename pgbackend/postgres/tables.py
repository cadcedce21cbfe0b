"""SQLAlchemy's description of the log's tables, for Alembic's autogenerate and for queries with SQLAlchemy.

The promise: it agrees with the migrations, which a test compares catalog row by catalog row. The statements of this
package do not use it. Segments are not in it, because they come and go; nor are the log's functions, and so not the
check `events_valid` either, which calls one.
"""

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    Table,
    TextClause,
    text,
)
from sqlalchemy.dialects.postgresql import (
    ARRAY,
    BIGINT,
    BOOLEAN,
    BYTEA,
    INT8MULTIRANGE,
    INT8RANGE,
    INTEGER,
    INTERVAL,
    JSON,
    JSONB,
    SMALLINT,
    TEXT,
    TIMESTAMP,
    UUID,
)
from sqlalchemy.sql import quoted_name

WRITERS = {
    # requirements: an INSERT of no rows, which opens an appender.
    "events": ("log.requirements", "log.writer", "outbox.appends"),
    "incarnation": ("log.incarnation",),
    "subscriptions": (
        "delivery.retries",
        "subscriptions.alterations",
        "subscriptions.definitions",
        "subscriptions.draining",
        "subscriptions.pauses",
        "subscriptions.shards",
    ),
    "offsets": (
        "delivery.offsets",
        "subscriptions.definitions",
        "subscriptions.leases",
        "subscriptions.shards",
        "subscriptions.skipping",
    ),
    "workers": ("subscriptions.leases", "subscriptions.presence"),
    "redeliveries": (
        "delivery.offsets",
        "delivery.redelivery",
        "delivery.retries",
        "subscriptions.shards",
        "subscriptions.skipping",
    ),
    "redactions": ("log.redaction",),
    "dead_letters": ("delivery.offsets", "delivery.redelivery", "log.retention", "subscriptions.skipping"),
    "skipped": ("delivery.offsets",),
    "deduplication": ("log.deduplication",),
    "kept_events": ("log.retention",),
    "recent_events": ("log.writer", "outbox.appends"),
    "retention": ("log.retention",),
    "segments": ("log.retention",),
}
"""The modules that insert, update or delete rows of each table; a test compares it with their statements.

Functions of the log count for the modules that call them. Deleting a subscription deletes its rows in all tables.
"""

_TIMESTAMPTZ = TIMESTAMP(timezone=True)

# For tables with few rows that are updated many times a second.
_HOT = {
    "fillfactor": 50,
    "autovacuum_vacuum_threshold": 500,
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_cost_delay": 0,
}

# Excludes the first and the last date that exist: asyncpg reads those as infinite.
_BOUNDS = """
    start_at > '0001-01-01 00:00:00+00' AND start_at < '9999-12-31 23:59:59.999999+00'
    AND end_at > '0001-01-01 00:00:00+00' AND end_at < '9999-12-31 23:59:59.999999+00'
"""

_RETENTION = """
    keep_us > 0 AND max_age_us > 0 AND max_bytes > 0 AND dead_letters_us > 0
    AND greatest(keep_us, max_age_us, dead_letters_us) <= 36500 * 86400000000
"""


def metadata(schema: str = "pgbackend") -> MetaData:
    """The tables of the log in `schema`, by their names in `.tables` ("schema.events", …)."""
    tables = MetaData(schema=quoted_name(schema, quote=True))
    Sequence("epochs", metadata=tables, data_type=BIGINT())
    Table(
        "events",
        tables,
        Column("position", BIGINT, Identity(always=True, cache=1, cycle=False), nullable=False),
        Column("recorded_at", _TIMESTAMPTZ, nullable=False, server_default=text("clock_timestamp()")),
        *_event_columns({"specversion": text("'1.0'"), "extensions": text("'{}'")}),
        PrimaryKeyConstraint("position", name="events_pkey"),
        postgresql_partition_by="RANGE (position)",
    )
    Table(
        "incarnation",
        tables,
        Column("single", BOOLEAN, nullable=False, server_default=text("true")),
        Column("id", UUID, nullable=False, server_default=text("gen_random_uuid()")),
        Column("since", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("set_back", BOOLEAN, nullable=False, server_default=text("false")),
        PrimaryKeyConstraint("single", name="incarnation_pkey"),
        CheckConstraint("single", name="incarnation_single"),
        prefixes=["UNLOGGED"],
    )
    subscriptions = Table(
        "subscriptions",
        tables,
        Column("name", TEXT, nullable=False),
        Column("ordering", TEXT, nullable=False),
        Column("shards", INTEGER, nullable=False),
        Column("start_at", _TIMESTAMPTZ),
        Column("end_position", BIGINT),
        Column("end_at", _TIMESTAMPTZ),
        Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("start_bound", TEXT),
        Column("start_position", BIGINT),
        Column("draining_until", _TIMESTAMPTZ),
        Column("paused_at", _TIMESTAMPTZ),
        Column("paused_by", TEXT),
        Column("pause_reason", TEXT),
        Column("resumed_at", _TIMESTAMPTZ),
        Column("target", TEXT),
        Column("retried_at", _TIMESTAMPTZ),
        PrimaryKeyConstraint("name", name="subscriptions_pkey"),
        CheckConstraint("name <> ''", name="subscriptions_name_not_empty"),
        CheckConstraint("ordering IN ('none', 'key', 'strict')", name="subscriptions_ordering_known"),
        CheckConstraint("shards > 0", name="subscriptions_shards_positive"),
        CheckConstraint(_BOUNDS, name="subscriptions_bounds_readable"),
        CheckConstraint("paused_by IN ('operator', 'dispatcher')", name="subscriptions_paused_by_known"),
        CheckConstraint("num_nulls(paused_at, paused_by, pause_reason) IN (0, 3)", name="subscriptions_pause_whole"),
    )
    Table(
        "offsets",
        tables,
        Column("subscription", TEXT, nullable=False),
        Column("shard", INTEGER, nullable=False),
        Column("shards", INTEGER, nullable=False),
        Column("until", BIGINT),
        Column("position", BIGINT, nullable=False),
        Column("pending", INT8MULTIRANGE, nullable=False, server_default=text("'{}'")),
        Column("epoch", BIGINT, nullable=False),
        Column("owner", UUID),
        Column("completed_at", _TIMESTAMPTZ),
        Column("crashes", INTEGER, nullable=False, server_default=text("0")),
        Column("holes", INT8MULTIRANGE, nullable=False, server_default=text("'{}'")),
        PrimaryKeyConstraint("subscription", "shards", "shard", name="offsets_pkey"),
        _of_subscription(subscriptions, "offsets"),
        CheckConstraint("shard >= 0 AND shard < shards", name="offsets_shard_in_range"),
        CheckConstraint("position >= 0", name="offsets_position_not_negative"),
        CheckConstraint("until >= 0", name="offsets_until_not_negative"),
        postgresql_with=_HOT,
    )
    Table(
        "workers",
        tables,
        Column("id", UUID, nullable=False),
        Column("name", TEXT, nullable=False),
        Column("backend_pid", INTEGER),
        Column("backend_start", _TIMESTAMPTZ),
        Column("lease_timeout", INTERVAL, nullable=False),
        Column("started_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("heartbeat_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("subscriptions", ARRAY(TEXT), nullable=False, server_default=text("'{}'")),
        Column("asked_at", _TIMESTAMPTZ),
        PrimaryKeyConstraint("id", name="workers_pkey"),
        CheckConstraint("lease_timeout > interval '0'", name="workers_lease_timeout_positive"),
        CheckConstraint("lease_timeout <= interval '1 day'", name="workers_lease_timeout_bounded"),
        postgresql_with=_HOT,
    )
    Table(
        "redeliveries",
        tables,
        Column("subscription", TEXT, nullable=False),
        Column("position", BIGINT, nullable=False),
        Column("key_hash", BIGINT, nullable=False),
        Column("attempt", INTEGER, nullable=False),
        Column("due_at", _TIMESTAMPTZ, nullable=False),
        Column("last_error", TEXT, nullable=False),
        Column("failure", JSON),
        Column("started_by", UUID),
        Column("lives", INTEGER, nullable=False, server_default=text("0")),
        Column("history", JSONB, nullable=False, server_default=text("'[]'")),
        PrimaryKeyConstraint("subscription", "position", name="redeliveries_pkey"),
        _of_subscription(subscriptions, "redeliveries"),
        CheckConstraint("attempt >= 0", name="redeliveries_attempt_not_negative"),
        Index("redeliveries_due", "subscription", "due_at"),
    )
    Table(
        "dead_letters",
        tables,
        Column("letter_id", BIGINT, Identity(always=True), nullable=False),
        Column("subscription", TEXT, nullable=False),
        Column("position", BIGINT, nullable=False),
        Column("recorded_at", _TIMESTAMPTZ, nullable=False),
        Column("key_hash", BIGINT, nullable=False),
        *_event_columns({}),
        Column("attempts", INTEGER, nullable=False),
        Column("error", TEXT, nullable=False),
        Column("details", JSON, nullable=False, server_default=text("'{}'")),
        Column("buried_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("attempt", INTEGER, nullable=False, server_default=text("0")),
        Column("due_at", _TIMESTAMPTZ),
        Column("started_by", UUID),
        Column("lives", INTEGER, nullable=False, server_default=text("0")),
        Column("history", JSONB, nullable=False, server_default=text("'[]'")),
        PrimaryKeyConstraint("letter_id", name="dead_letters_pkey"),
        _of_subscription(subscriptions, "dead_letters"),
        CheckConstraint("attempt >= 0 AND attempts >= 0", name="dead_letters_attempt_not_negative"),
        Index("dead_letters_event", "subscription", "position", unique=True),
        Index("dead_letters_due", "subscription", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    )
    Table(
        "skipped",
        tables,
        Column("subscription", TEXT, nullable=False),
        Column("positions", INT8RANGE, nullable=False),
        Column("skipped_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        PrimaryKeyConstraint("subscription", "positions", name="skipped_pkey"),
        _of_subscription(subscriptions, "skipped"),
        CheckConstraint("NOT isempty(positions)", name="skipped_positions_not_empty"),
    )
    Table(
        "deduplication",
        tables,
        Column("single", BOOLEAN, nullable=False, server_default=text("true")),
        Column("window_us", BIGINT, nullable=False),
        PrimaryKeyConstraint("single", name="deduplication_pkey"),
        CheckConstraint("single", name="deduplication_single"),
        CheckConstraint("window_us >= 0", name="deduplication_window_not_negative"),
    )
    Table(
        "recent_events",
        tables,
        Column("slot", SMALLINT, nullable=False),
        Column("bucket", BIGINT, nullable=False),
        Column("key", BYTEA, nullable=False),
        PrimaryKeyConstraint("bucket", "key", "slot", name="recent_events_pkey"),
        postgresql_partition_by="LIST (slot)",
    )
    Table(
        "retention",
        tables,
        Column("single", BOOLEAN, nullable=False, server_default=text("true")),
        Column("keep_us", BIGINT),
        Column("max_age_us", BIGINT),
        Column("max_bytes", BIGINT),
        Column("dead_letters_us", BIGINT),
        PrimaryKeyConstraint("single", name="retention_pkey"),
        CheckConstraint("single", name="retention_single"),
        CheckConstraint(_RETENTION, name="retention_bounded"),
    )
    Table(
        "segments",
        tables,
        Column("lower_bound", BIGINT, nullable=False, autoincrement=False),
        Column("upper_bound", BIGINT, nullable=False),
        Column("last_position", BIGINT, nullable=False),
        Column("cut_at", _TIMESTAMPTZ),
        Column("dropped_at", _TIMESTAMPTZ),
        PrimaryKeyConstraint("lower_bound", name="segments_pkey"),
        CheckConstraint(
            "lower_bound - 1 <= last_position AND last_position < upper_bound", name="segments_last_within"
        ),
    )
    Table(
        "kept_events",
        tables,
        Column("position", BIGINT, nullable=False, autoincrement=False),
        Column("recorded_at", _TIMESTAMPTZ, nullable=False),
        *_event_columns({}),
        PrimaryKeyConstraint("position", name="kept_events_pkey"),
    )
    Table(
        "redactions",
        tables,
        Column("position", BIGINT, nullable=False, autoincrement=False),
        Column("redacted_at", _TIMESTAMPTZ, nullable=False, server_default=text("now()")),
        Column("redacted_by", TEXT, nullable=False),
        PrimaryKeyConstraint("position", name="redactions_pkey"),
    )
    return tables


def _event_columns(defaults: dict[str, TextClause]) -> list[Column[object]]:
    """The CloudEvent itself, in the order of `attributes.COLUMNS`."""
    return [
        Column("specversion", TEXT, nullable=False, server_default=defaults.get("specversion")),
        Column("id", TEXT, nullable=False),
        Column("source", TEXT, nullable=False),
        Column("type", TEXT, nullable=False),
        Column("subject", TEXT),
        Column("time", TEXT),
        Column("datacontenttype", TEXT),
        Column("dataschema", TEXT),
        Column("partitionkey", TEXT),
        Column("extensions", JSON, nullable=False, server_default=defaults.get("extensions")),
        Column("data", BYTEA),
        Column("data_encoding", TEXT),
    ]


def _of_subscription(subscriptions: Table, table: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["subscription"],
        # The column object: SQLAlchemy would split a path in text at the dots of a schema's name.
        [subscriptions.c.name],
        name=f"{table}_subscription_fkey",
        ondelete="CASCADE",
    )
