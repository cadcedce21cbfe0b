"""The log: events, subscriptions with their offsets, workers, redeliveries, dead letters.

Revision ID: 0001
Revises:
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0001"
down_revision = None

SEGMENT_WIDTH = 10_000_000
SEGMENTS = 10


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE)
    # Enough for producers in plain SQL while nobody runs; whoever runs keeps adding more.
    for lower in range(0, SEGMENTS * SEGMENT_WIDTH, SEGMENT_WIDTH):
        ddl.run(op, _segment(lower, lower + SEGMENT_WIDTH))


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


def _segment(lower: int, upper: int) -> tuple[str, str]:
    # PARTITION OF would lock the parent against producers, and 17 and newer attach nothing with an identity.
    return (
        f"""
        CREATE TABLE {{schema}}.events_{lower} (
            LIKE {{schema}}.events INCLUDING ALL EXCLUDING IDENTITY,
            CONSTRAINT segment_bounds CHECK (position >= {lower} AND position < {upper})
        )""",
        f"""
        ALTER TABLE {{schema}}.events
            ATTACH PARTITION {{schema}}.events_{lower} FOR VALUES FROM ({lower}) TO ({upper})""",
    )


UPGRADE = (
    # Insert-only, one index. The fence stands on the identity: ALWAYS, one value a call, no cycle.
    # key_hash: what belongs in order together has the same one. The seeds keep the three kinds of key apart.
    # time: the shape only. All of RFC 3339 in one regular expression takes 4 µs a row, more than half of what storing
    # the row by COPY takes; this takes 1 µs, and all the other checks together 1 µs.
    """
    CREATE TABLE {schema}.events (
        position bigint GENERATED ALWAYS AS IDENTITY (CACHE 1 NO CYCLE),
        recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        key_hash bigint NOT NULL GENERATED ALWAYS AS ((
            CASE
                WHEN partitionkey IS NOT NULL THEN hashtextextended(partitionkey, 1)
                WHEN subject IS NOT NULL THEN hashtextextended(subject, hashtextextended(source, 2))
                ELSE hashtextextended(id, hashtextextended(source, 3))
            END
        ) & 9223372036854775807) STORED,
        specversion text NOT NULL DEFAULT '1.0',
        id text NOT NULL,
        source text NOT NULL,
        type text NOT NULL,
        subject text,
        time text,
        datacontenttype text,
        dataschema text,
        partitionkey text,
        extensions json NOT NULL DEFAULT '{}',
        data bytea,
        data_encoding text,
        CONSTRAINT events_pkey PRIMARY KEY (position),
        CONSTRAINT events_specversion_not_empty CHECK (specversion <> ''),
        CONSTRAINT events_id_not_empty CHECK (id <> ''),
        CONSTRAINT events_source_not_empty CHECK (source <> ''),
        CONSTRAINT events_type_not_empty CHECK (type <> ''),
        CONSTRAINT events_subject_not_empty CHECK (subject <> ''),
        CONSTRAINT events_time_rfc3339 CHECK (
            time ~ '^[0-9TtZz:.+-]+$'
            AND (time LIKE '____-__-__T__:__:__%' OR time LIKE '____-__-__t__:__:__%')
            AND (time LIKE '%Z' OR time LIKE '%z' OR time LIKE '%+__:__' OR time LIKE '%-__:__')
        ),
        CONSTRAINT events_datacontenttype_not_empty CHECK (datacontenttype <> ''),
        CONSTRAINT events_dataschema_not_empty CHECK (dataschema <> ''),
        CONSTRAINT events_partitionkey_not_empty CHECK (partitionkey <> ''),
        CONSTRAINT events_extensions_object CHECK (json_typeof(extensions) = 'object'),
        CONSTRAINT events_extensions_names CHECK (
            extensions::text = '{}'
            OR NOT extensions::jsonb ?| ARRAY[
                'specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema',
                'partitionkey', 'data'
            ]
        ),
        CONSTRAINT events_data_encoding_known CHECK (
            data_encoding IS NULL OR (data IS NOT NULL AND data_encoding IN ('json', 'text', 'base64'))
        )
    ) PARTITION BY RANGE (position)""",
    # Unlogged on purpose: a crash or a failover empties it, and that is what it tells.
    """
    CREATE UNLOGGED TABLE {schema}.incarnation (
        single boolean NOT NULL DEFAULT true,
        id uuid NOT NULL,
        since timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT incarnation_pkey PRIMARY KEY (single),
        CONSTRAINT incarnation_single CHECK (single)
    )""",
    # One for the whole log, so that no fencing token is given twice, not after delete and re-create either.
    "CREATE SEQUENCE {schema}.epochs AS bigint",
    """
    CREATE TABLE {schema}.subscriptions (
        name text NOT NULL,
        ordering text NOT NULL,
        shards integer NOT NULL,
        start_at timestamptz,
        end_position bigint,
        end_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT subscriptions_pkey PRIMARY KEY (name),
        CONSTRAINT subscriptions_name_not_empty CHECK (name <> ''),
        CONSTRAINT subscriptions_ordering_known CHECK (ordering IN ('none', 'key', 'strict')),
        CONSTRAINT subscriptions_shards_positive CHECK (shards > 0)
    )""",
    # Few rows, written many times a second: half of each page stays free, so that updates stay within their page and
    # never touch the index, and vacuum comes by often.
    """
    CREATE TABLE {schema}.offsets (
        subscription text NOT NULL,
        shard integer NOT NULL,
        shards integer NOT NULL,
        until bigint,
        position bigint NOT NULL,
        pending int8multirange NOT NULL DEFAULT '{}',
        epoch bigint NOT NULL,
        owner uuid,
        completed_at timestamptz,
        CONSTRAINT offsets_pkey PRIMARY KEY (subscription, shards, shard),
        CONSTRAINT offsets_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT offsets_shard_in_range CHECK (shard >= 0 AND shard < shards),
        CONSTRAINT offsets_position_not_negative CHECK (position >= 0),
        CONSTRAINT offsets_until_not_negative CHECK (until >= 0)
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0
    )""",
    """
    CREATE TABLE {schema}.workers (
        id uuid NOT NULL,
        name text NOT NULL,
        backend_pid integer,
        backend_start timestamptz,
        lease_timeout interval NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now(),
        heartbeat_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT workers_pkey PRIMARY KEY (id),
        CONSTRAINT workers_lease_timeout_positive CHECK (lease_timeout > interval '0')
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0
    )""",
    """
    CREATE TABLE {schema}.redeliveries (
        subscription text NOT NULL,
        position bigint NOT NULL,
        key_hash bigint NOT NULL,
        attempt integer NOT NULL,
        due_at timestamptz NOT NULL,
        last_error text NOT NULL,
        failure json,
        CONSTRAINT redeliveries_pkey PRIMARY KEY (subscription, position),
        CONSTRAINT redeliveries_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT redeliveries_attempt_not_negative CHECK (attempt >= 0)
    )""",
    "CREATE INDEX redeliveries_due ON {schema}.redeliveries (subscription, due_at)",
    # The event's columns keep their names, its id included; so the letter's own number is letter_id.
    """
    CREATE TABLE {schema}.dead_letters (
        letter_id bigint GENERATED ALWAYS AS IDENTITY,
        subscription text NOT NULL,
        position bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
        key_hash bigint NOT NULL,
        specversion text NOT NULL,
        id text NOT NULL,
        source text NOT NULL,
        type text NOT NULL,
        subject text,
        time text,
        datacontenttype text,
        dataschema text,
        partitionkey text,
        extensions json NOT NULL,
        data bytea,
        data_encoding text,
        attempts integer NOT NULL,
        error text NOT NULL,
        details json NOT NULL DEFAULT '{}',
        buried_at timestamptz NOT NULL DEFAULT now(),
        attempt integer NOT NULL DEFAULT 0,
        due_at timestamptz,
        CONSTRAINT dead_letters_pkey PRIMARY KEY (letter_id),
        CONSTRAINT dead_letters_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT dead_letters_attempt_not_negative CHECK (attempt >= 0 AND attempts >= 0)
    )""",
    # One letter for an event and a subscription: burying again, after an answer that was lost, is no second letter.
    "CREATE UNIQUE INDEX dead_letters_event ON {schema}.dead_letters (subscription, position)",
    "CREATE INDEX dead_letters_due ON {schema}.dead_letters (subscription, due_at) WHERE due_at IS NOT NULL",
)

DOWNGRADE = (
    "DROP TABLE {schema}.dead_letters, {schema}.redeliveries, {schema}.offsets, {schema}.workers",
    "DROP TABLE {schema}.subscriptions",
    "DROP SEQUENCE {schema}.epochs",
    "DROP TABLE {schema}.incarnation",
    "DROP TABLE {schema}.events",
)
