"""The log: its tables, the view and functions that run with its owner's rights, and the first segments.

Revision ID: r0001
Revises:

Versions before the first release numbered their revisions 0001 to 0010. They cannot be upgraded, so no revision has
such a name again.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0001"
down_revision = None


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            EVENTS,
            INCARNATION,
            LIFE,
            EPOCHS,
            SUBSCRIPTIONS,
            OFFSETS,
            WORKERS,
            LIVING_WORKERS,
            REDELIVERIES,
            REDELIVERIES_DUE,
            DEAD_LETTERS,
            DEAD_LETTERS_EVENT,
            DEAD_LETTERS_DUE,
            SKIPPED,
            END_LIFE,
            APPENDERS_IN_FLIGHT,
            APPENDER_BEGAN,
            OPEN_APPENDER,
            FIND_DISTRIBUTED,
            BURY,
            MAKE_SEGMENT_OF,
            MAKE_SEGMENT,
            *REVOKE_FROM_PUBLIC,
            "DO {revoke_insert_on_letters}",
            # Enough for producers in plain SQL while no worker runs; workers keep adding more.
            *["SELECT {schema}.make_segment()"] * 10,
        ),
        events="{schema}.events",
        positions="{schema}.events_position_seq",
        letters="{schema}.dead_letters",
        revoke_insert_on_letters=REVOKE_INSERT_ON_LETTERS,
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# Insert-only, with one index. The fence relies on the identity: ALWAYS, CACHE 1, NO CYCLE.
# key_hash is equal for events that belong in order. Its seeds keep the three kinds of key apart.
# events_time_rfc3339 checks the shape only. A regular expression for all of RFC 3339 takes 4 µs a row, more than half
# of what COPY takes to store the row; this takes 1 µs, and all the other checks together 1 µs.
# events_attributes_size: PostgreSQL parses a CHECK again for each INSERT. A sum of ten lengths took 15 µs of 155.
EVENTS = """
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
        CONSTRAINT events_recorded_at_readable CHECK (
            recorded_at >= '0001-01-01 00:00:00+00' AND recorded_at < '10000-01-01 00:00:00+00'
        ),
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
        CONSTRAINT events_attributes_size CHECK (
            octet_length(concat(
                specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions
            )) <= 65536
        ),
        CONSTRAINT events_data_encoding_known CHECK (
            data_encoding IS NULL OR (data IS NOT NULL AND data_encoding IN ('json', 'text', 'base64'))
        )
    ) PARTITION BY RANGE (position)"""

# One row, unlogged: a crash or a failover empties the table, and the next process inserts a new row.
# The id has a default because roles may write only `single`: a role that chose the former id would hide the crash.
# set_back: this incarnation began because the sequence was found below positions that a worker had seen.
INCARNATION = """
    CREATE UNLOGGED TABLE {schema}.incarnation (
        single boolean NOT NULL DEFAULT true,
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        since timestamptz NOT NULL DEFAULT now(),
        set_back boolean NOT NULL DEFAULT false,
        CONSTRAINT incarnation_pkey PRIMARY KEY (single),
        CONSTRAINT incarnation_single CHECK (single)
    )"""

# The identity of an incarnation. A dump carries the unlogged row, so its id alone would survive a restore. Restoring
# changes the table's oid when it creates the table, and xmin when it only fills it. The path of the sequence's file
# changes with CREATE DATABASE … TEMPLATE, TRUNCATE … RESTART IDENTITY, and each ALTER SEQUENCE.
LIFE = """
    CREATE VIEW {schema}.life AS
    SELECT pg_catalog.concat_ws(
        '/', incarnation.id, incarnation.tableoid, incarnation.xmin,
        pg_catalog.pg_relation_filepath({positions}::pg_catalog.regclass)
    ) AS id
    FROM {schema}.incarnation"""

# One sequence for the whole log: no epoch is given out twice, not even after delete and re-create.
EPOCHS = "CREATE SEQUENCE {schema}.epochs AS bigint"

# start_bound: the position or date at which the subscription was to start, as text. Null for "earliest" and
# "latest", which are no places to go back to.
# start_position: set while the start lies behind the end of the log, where no offset can be.
# draining_until: no worker claims a shard before then, because the shards are about to change.
# subscriptions_bounds_readable excludes the first and last date that exist: asyncpg reads those as infinite.
SUBSCRIPTIONS = """
    CREATE TABLE {schema}.subscriptions (
        name text NOT NULL,
        ordering text NOT NULL,
        shards integer NOT NULL,
        start_at timestamptz,
        end_position bigint,
        end_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        start_bound text,
        start_position bigint,
        draining_until timestamptz,
        CONSTRAINT subscriptions_pkey PRIMARY KEY (name),
        CONSTRAINT subscriptions_name_not_empty CHECK (name <> ''),
        CONSTRAINT subscriptions_ordering_known CHECK (ordering IN ('none', 'key', 'strict')),
        CONSTRAINT subscriptions_shards_positive CHECK (shards > 0),
        CONSTRAINT subscriptions_bounds_readable CHECK (
            start_at > '0001-01-01 00:00:00+00' AND start_at < '9999-12-31 23:59:59.999999+00'
            AND end_at > '0001-01-01 00:00:00+00' AND end_at < '9999-12-31 23:59:59.999999+00'
        )
    )"""

# crashes: how many owners in a row died before they settled everything that was open when they claimed the shard.
# holes: the part of `pending` in which no event has been seen.
# Few rows, updated many times a second. Half of each page stays free, so that updates stay in their page and never
# touch the index; vacuum runs often.
OFFSETS = """
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
        crashes integer NOT NULL DEFAULT 0,
        holes int8multirange NOT NULL DEFAULT '{}',
        CONSTRAINT offsets_pkey PRIMARY KEY (subscription, shards, shard),
        CONSTRAINT offsets_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT offsets_shard_in_range CHECK (shard >= 0 AND shard < shards),
        CONSTRAINT offsets_position_not_negative CHECK (position >= 0),
        CONSTRAINT offsets_until_not_negative CHECK (until >= 0)
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0
    )"""

# subscriptions: what the worker runs. asked_at: when it last had room for more shards.
# The longest lease is bounded: a longer one would keep a dead worker's shards forever.
WORKERS = """
    CREATE TABLE {schema}.workers (
        id uuid NOT NULL,
        name text NOT NULL,
        backend_pid integer,
        backend_start timestamptz,
        lease_timeout interval NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now(),
        heartbeat_at timestamptz NOT NULL DEFAULT now(),
        subscriptions text[] NOT NULL DEFAULT '{}',
        asked_at timestamptz,
        CONSTRAINT workers_pkey PRIMARY KEY (id),
        CONSTRAINT workers_lease_timeout_positive CHECK (lease_timeout > interval '0'),
        CONSTRAINT workers_lease_timeout_bounded CHECK (lease_timeout <= interval '1 day')
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0
    )"""

# A worker is dead when its last heartbeat is older than its own lease_timeout, or its registered backend is gone.
# A null start time is no evidence: this role may not see it, or the worker could not (after SET ROLE).
LIVING_WORKERS = """
    CREATE VIEW {schema}.living_workers AS
    SELECT worker.id, worker.name, worker.subscriptions, worker.asked_at
    FROM {schema}.workers AS worker
    WHERE worker.heartbeat_at >= clock_timestamp() - worker.lease_timeout
        AND (
            worker.backend_pid IS NULL
            OR EXISTS (
                SELECT
                FROM pg_catalog.pg_stat_activity AS activity
                WHERE activity.pid = worker.backend_pid
                    AND coalesce(activity.backend_start = worker.backend_start, true)
            )
        )"""

# attempt: attempts made, without the one that started_by may still be making.
# started_by: the worker that started an attempt with care and has not reported its end.
# lives: how many lives of the server in a row ended while the event was at work.
REDELIVERIES = """
    CREATE TABLE {schema}.redeliveries (
        subscription text NOT NULL,
        position bigint NOT NULL,
        key_hash bigint NOT NULL,
        attempt integer NOT NULL,
        due_at timestamptz NOT NULL,
        last_error text NOT NULL,
        failure json,
        started_by uuid,
        lives integer NOT NULL DEFAULT 0,
        CONSTRAINT redeliveries_pkey PRIMARY KEY (subscription, position),
        CONSTRAINT redeliveries_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT redeliveries_attempt_not_negative CHECK (attempt >= 0)
    )"""

REDELIVERIES_DUE = "CREATE INDEX redeliveries_due ON {schema}.redeliveries (subscription, due_at)"

# The event's columns keep their names, its id included, so the letter's own number is letter_id.
# attempt, started_by, lives: as in redeliveries.
DEAD_LETTERS = """
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
        started_by uuid,
        lives integer NOT NULL DEFAULT 0,
        CONSTRAINT dead_letters_pkey PRIMARY KEY (letter_id),
        CONSTRAINT dead_letters_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT dead_letters_attempt_not_negative CHECK (attempt >= 0 AND attempts >= 0)
    )"""

# Burying an event again, after a lost answer, updates its letter and adds no second one.
DEAD_LETTERS_EVENT = "CREATE UNIQUE INDEX dead_letters_event ON {schema}.dead_letters (subscription, position)"

DEAD_LETTERS_DUE = """
    CREATE INDEX dead_letters_due ON {schema}.dead_letters (subscription, due_at) WHERE due_at IS NOT NULL"""

# Positions that a subscription had not settled and that are gone from the log.
SKIPPED = """
    CREATE TABLE {schema}.skipped (
        subscription text NOT NULL,
        positions int8range NOT NULL,
        skipped_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT skipped_pkey PRIMARY KEY (subscription, positions),
        CONSTRAINT skipped_subscription_fkey FOREIGN KEY (subscription)
            REFERENCES {schema}.subscriptions (name) ON DELETE CASCADE,
        CONSTRAINT skipped_positions_not_empty CHECK (NOT isempty(positions))
    )"""

# Functions with BEGIN ATOMIC refer to their tables by oid: the schema may be renamed, and no caller can choose which
# table is meant. No function body has a backslash: its meaning depends on a setting of the caller's session.

# Ends the incarnation `seen` for all processes. The next one cannot trust offsets, unless all are at the beginning.
END_LIFE = """
    CREATE FUNCTION {schema}.end_life(seen text) RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        UPDATE {schema}.incarnation
        SET id = gen_random_uuid(),
            since = now(),
            set_back = EXISTS (SELECT FROM {schema}.offsets WHERE offsets.position > 0)
        WHERE incarnation.id::text = split_part(end_life.seen, '/', 1);
    END"""

# The evidence of pgbackend/log/fence.py: first the sequence, then the locks. plpgsql runs one statement after the
# other, whatever a planner makes of each. No filter by pid: a prepared transaction has none.
APPENDERS_IN_FLIGHT = """
    CREATE FUNCTION {schema}.appenders_in_flight(
        log regclass, positions regclass, OUT upto bigint, OUT appenders text[], OUT server_start timestamptz
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    BEGIN
        upto := pg_sequence_last_value(positions);
        IF upto IS NULL THEN
            -- PostgreSQL 18 answers null also when the role may not read the sequence.
            IF has_sequence_privilege(positions, 'SELECT') IS NOT TRUE THEN
                RAISE insufficient_privilege USING MESSAGE = format('permission denied for sequence %s', positions);
            END IF;
            upto := 0;
        END IF;
        appenders := ARRAY(
            SELECT held.virtualtransaction
            FROM pg_locks AS held
            WHERE held.locktype = 'relation'
                AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND held.relation = log
                AND held.mode = 'RowExclusiveLock'
                AND held.granted
        );
        server_start := pg_postmaster_start_time();
    END
    $function$"""

# When the transaction of another role's backend began, if it appends. pg_stat_activity shows that only to members of
# the other role and to roles that may read all statistics; here it is enough that the owner may.
APPENDER_BEGAN = """
    CREATE FUNCTION {schema}.appender_began(pid integer) RETURNS timestamptz
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT activity.xact_start
        FROM pg_catalog.pg_stat_activity AS activity
        WHERE activity.pid = appender_began.pid
            AND EXISTS (
                SELECT
                FROM pg_catalog.pg_locks AS held
                WHERE held.locktype = 'relation'
                    AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
                    AND held.relation = {events}::regclass
                    AND held.mode = 'RowExclusiveLock'
                    AND held.pid = activity.pid
            );
    END"""

# Makes the caller's transaction an appender that draws no position. Returns the name by which pg_locks shows it.
OPEN_APPENDER = """
    CREATE FUNCTION {schema}.open_appender() RETURNS text
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        INSERT INTO {schema}.events (id, source, type) SELECT 'probe', 'probe', 'probe' WHERE false;
        SELECT own.virtualtransaction
        FROM pg_catalog.pg_locks AS own
        WHERE own.locktype = 'virtualxid'
            AND own.pid = pg_backend_pid();
    END"""

# The tables of the log's schema that Citus distributes. EXECUTE, because most servers lack the table it reads.
FIND_DISTRIBUTED = """
    CREATE FUNCTION {schema}.find_distributed(log regclass) RETURNS text[]
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    DECLARE
        found text[] := '{}';
    BEGIN
        IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
            EXECUTE '
                SELECT array_agg(part.relname::text ORDER BY part.relname)
                FROM pg_class AS part
                JOIN pg_class AS log ON log.relnamespace = part.relnamespace
                WHERE log.oid = $1
                    AND part.oid IN (SELECT logicalrelid FROM pg_catalog.pg_dist_partition)'
            INTO found
            USING log;
        END IF;
        RETURN coalesce(found, '{}');
    END
    $function$"""

# Copies events to dead_letters, for shards that the caller owns. The content comes from the log alone: with the right
# to INSERT, a role could make up events and send them to another subscription's target.
BURY = """
    CREATE FUNCTION {schema}.bury(letters jsonb) RETURNS bigint
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH buried AS (
            INSERT INTO {schema}.dead_letters (
                subscription, position, recorded_at, key_hash, specversion, id, source, type, subject, time,
                datacontenttype, dataschema, partitionkey, extensions, data, data_encoding, attempts, error, details
            )
            SELECT held.subscription, event.position, event.recorded_at, event.key_hash, event.specversion, event.id,
                event.source, event.type, event.subject, event.time, event.datacontenttype, event.dataschema,
                event.partitionkey, event.extensions, event.data, event.data_encoding, dead.attempts, dead.error,
                dead.details::json
            FROM jsonb_to_recordset(letters) AS dead (
                subscription text, epoch bigint, owner uuid, position bigint, attempts int, error text, details jsonb
            )
            JOIN {schema}.offsets AS held
                ON held.subscription = dead.subscription
                AND held.epoch = dead.epoch
                AND held.owner = dead.owner
            -- One index lookup for each letter: a join may read the whole log.
            CROSS JOIN LATERAL (
                SELECT *
                FROM {schema}.events AS found
                WHERE found.position = dead.position
                OFFSET 0
            ) AS event
            ORDER BY event.position
            ON CONFLICT (subscription, position) DO UPDATE
            SET attempts = excluded.attempts,
                error = excluded.error,
                details = excluded.details,
                buried_at = now(),
                attempt = 0,
                due_at = NULL,
                started_by = NULL,
                lives = 0
            RETURNING 1
        )
        SELECT count(*) FROM buried;
    END"""

# Makes the segment behind the newest one, equally wide. Makes nothing when enough are ahead, as AHEAD_POSITIONS and
# AHEAD_SEGMENTS in pgbackend/log/segments.py have it, so that no caller can ask for more.
# One caller at a time makes segments. The lock is one that only the owner may take (any role could hold an advisory
# lock), that no INSERT waits for, and that ATTACH needs anyway. The transaction holds it until its end, so it is taken
# only when there is a segment to make. lock_timeout: the next call comes soon, so nothing here is worth a long wait.
# CREATE, then ATTACH: PARTITION OF takes AccessExclusive on the parent and queues every producer behind one open
# appender. Without the identity, because 17 and newer attach no table that has one. The CHECK spares ATTACH its scan.
# The newest segment is found by its name, which ends in its lower bound.
# Privileges that default privileges gave on a segment are revoked, except reading, which backups need: since 17 an
# INSERT into a segment draws a position without the parent's lock, and the fence would miss it.
MAKE_SEGMENT_OF = """
    CREATE FUNCTION {schema}.make_segment_of(log regclass, OUT lower_bound bigint, OUT upper_bound bigint)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '1s'
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        head bigint;
        width bigint;
        segment text;
        grantee text;
    BEGIN
        FOR is_locked IN 0..1 LOOP
            IF is_locked = 1 THEN
                EXECUTE format('LOCK TABLE ONLY %s IN SHARE UPDATE EXCLUSIVE MODE', log);
            END IF;
            EXECUTE 'SELECT last_value FROM ' || pg_get_serial_sequence(log::text, 'position') INTO head;
            SELECT (bounds[1])::bigint, (bounds[2])::bigint
            INTO lower_bound, upper_bound
            FROM (
                SELECT pg_get_expr(relpartbound, pg_class.oid) AS text
                FROM pg_inherits
                JOIN pg_class ON pg_class.oid = inhrelid
                WHERE inhparent = log
                ORDER BY length(relname) DESC, relname DESC
                LIMIT 1
            ) AS newest
            CROSS JOIN LATERAL regexp_match(newest.text, '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]') AS bounds;
            IF upper_bound IS NULL THEN
                width := 10000000;
                lower_bound := head / width * width;
            ELSE
                width := upper_bound - lower_bound;
                -- Appends that failed for want of a segment have used up positions: leave out whole segments.
                lower_bound := upper_bound + greatest(head - upper_bound, 0) / width * width;
            END IF;
            upper_bound := lower_bound + width;
            IF lower_bound - head >= least(100000000, 100 * width) THEN
                lower_bound := NULL;
                upper_bound := NULL;
                RETURN;
            END IF;
        END LOOP;
        segment := format('%I.%I', schema, 'events_' || lower_bound);
        EXECUTE format(
            'CREATE TABLE %s (LIKE %s INCLUDING ALL EXCLUDING IDENTITY, '
            'CONSTRAINT segment_bounds CHECK (position >= %s AND position < %s))',
            segment, log, lower_bound, upper_bound
        );
        FOR grantee IN
            SELECT DISTINCT CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END
            FROM pg_class
            CROSS JOIN LATERAL aclexplode(relacl) AS entry
            WHERE pg_class.oid = segment::regclass
                AND entry.grantee <> relowner
        LOOP
            EXECUTE format('REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON TABLE %s FROM %s', segment, grantee);
        END LOOP;
        EXECUTE format(
            'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%s) TO (%s)', log, segment, lower_bound, upper_bound
        );
    END
    $function$"""

# Functions that all other roles call, with the owner's rights.
MAKE_SEGMENT = """
    CREATE FUNCTION {schema}.make_segment(OUT lower_bound bigint, OUT upper_bound bigint)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT made.lower_bound, made.upper_bound
        FROM {schema}.make_segment_of({events}::regclass) AS made;
    END"""

REVOKE_FROM_PUBLIC = (
    "REVOKE ALL ON FUNCTION {schema}.end_life(text) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.appenders_in_flight(regclass, regclass) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.appender_began(integer) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.open_appender() FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.find_distributed(regclass) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.bury(jsonb) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment_of(regclass) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment() FROM PUBLIC",
)

# Default privileges may give INSERT on every new table. On this one it would allow roles to make up letters.
REVOKE_INSERT_ON_LETTERS = """
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END
        FROM pg_catalog.pg_class
        CROSS JOIN LATERAL pg_catalog.aclexplode(relacl) AS entry
        WHERE pg_class.oid = {letters}::regclass
            AND entry.privilege_type = 'INSERT'
            AND entry.grantee <> relowner
    LOOP
        EXECUTE pg_catalog.format('REVOKE INSERT ON TABLE %s FROM %s', {letters}::regclass, grantee);
    END LOOP;
END"""

DOWNGRADE = (
    "DROP VIEW {schema}.life, {schema}.living_workers",
    """
    DROP FUNCTION
        {schema}.end_life(text),
        {schema}.appenders_in_flight(regclass, regclass),
        {schema}.appender_began(integer),
        {schema}.open_appender(),
        {schema}.find_distributed(regclass),
        {schema}.bury(jsonb),
        {schema}.make_segment(),
        {schema}.make_segment_of(regclass)""",
    "DROP TABLE {schema}.skipped, {schema}.dead_letters, {schema}.redeliveries, {schema}.offsets, {schema}.workers",
    "DROP TABLE {schema}.subscriptions",
    "DROP SEQUENCE {schema}.epochs",
    "DROP TABLE {schema}.incarnation",
    "DROP TABLE {schema}.events",
)
