"""Retention: segments are cut by time and size, and dropped once nobody needs them or a hard limit says so.

Revision ID: r0004
Revises: r0003

A segment goes in three steps, each a transaction of its own:

    open ──cut_segment──▶ closed ──empty_segment──▶ emptied ──remove_segments──▶ gone
      └──────it is full──────┘

No event that is still needed is lost, whatever runs at the same time:

- `cut_segment` moves the sequence forward, never back.
- `empty_segment` deletes only what is committed and checked under AccessExclusive on the segment. A transaction that
  has inserted into the segment holds a lock on it, so while one is open nothing is deleted.
- A transaction may have drawn a position of the segment and not inserted it yet. It does so after the TRUNCATE, because
  the segment is still attached, and its event is read like any other. Until it ends, it holds RowExclusive on the
  parent, so `remove_segments` does not get the lock on the parent, and after that it finds the segment not empty.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0004"
down_revision = "r0003"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            RETENTION,
            FIRST_RETENTION,
            SEGMENTS,
            KEPT_EVENTS,
            STORED_EVENTS,
            BURY.replace("{source}", "stored_events"),
            SEGMENTS_OF,
            STAYS_LOCKED,
            UNSETTLED,
            CUT_SEGMENT_OF,
            RECORD_CUTS_OF,
            CUT_SEGMENT,
            EMPTY_SEGMENT_OF,
            EMPTY_SEGMENT,
            REMOVE_SEGMENTS_OF,
            REMOVE_SEGMENTS,
            FORGET_LETTERS,
            FORGET_REMOVED,
            FIND_HOLDERS,
            *[f"REVOKE ALL ON FUNCTION {{schema}}.{signature} FROM PUBLIC" for signature in FUNCTIONS],
        ),
        events="{schema}.events",
        retention="{schema}.retention",
        segments="{schema}.segments",
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            BURY.replace("{source}", "events"),
            *[f"DROP FUNCTION {{schema}}.{signature}" for signature in FUNCTIONS],
            "DROP VIEW {schema}.stored_events",
            "DROP TABLE {schema}.kept_events, {schema}.segments, {schema}.retention",
        ),
    )


# One row. keep_us: how long settled events stay, in microseconds. max_age_us, max_bytes: limits that unsettled events
# do not outlast either. dead_letters_us: how long dead letters stay. Null: no limit.
RETENTION = """
    CREATE TABLE {schema}.retention (
        single boolean NOT NULL DEFAULT true,
        keep_us bigint,
        max_age_us bigint,
        max_bytes bigint,
        dead_letters_us bigint,
        CONSTRAINT retention_pkey PRIMARY KEY (single),
        CONSTRAINT retention_single CHECK (single),
        CONSTRAINT retention_bounded CHECK (
            keep_us > 0 AND max_age_us > 0 AND max_bytes > 0 AND dead_letters_us > 0
            AND greatest(keep_us, max_age_us, dead_letters_us) <= 36500 * 86400000000
        )
    )"""

# A new log keeps seven days, and dead letters for thirty. A log that was used keeps everything until somebody says so.
FIRST_RETENTION = """
    INSERT INTO {schema}.retention (keep_us, dead_letters_us)
    SELECT
        CASE WHEN log.is_new THEN 7 * 86400000000 END,
        CASE WHEN log.is_new THEN 30 * 86400000000 END
    FROM (
        SELECT
            NOT is_called
            AND NOT EXISTS (SELECT FROM {schema}.events)
            AND NOT EXISTS (SELECT FROM {schema}.subscriptions) AS is_new
        FROM {schema}.events_position_seq
    ) AS log"""

# Segments that were cut or emptied, until every subscription is past them. last_position: no event had a higher
# position; the positions up to the next segment were never used, or belong to transactions that were rolled back.
SEGMENTS = """
    CREATE TABLE {schema}.segments (
        lower_bound bigint NOT NULL,
        upper_bound bigint NOT NULL,
        last_position bigint NOT NULL,
        cut_at timestamptz,
        dropped_at timestamptz,
        CONSTRAINT segments_pkey PRIMARY KEY (lower_bound),
        CONSTRAINT segments_last_within CHECK (lower_bound - 1 <= last_position AND last_position < upper_bound)
    )"""

_COLUMNS = """position, recorded_at, specversion, id, source, type, subject, time, datacontenttype, dataschema,
        partitionkey, extensions, data, data_encoding"""

# Copies of events that waited to be tried again when a hard limit dropped their segment.
KEPT_EVENTS = """
    CREATE TABLE {schema}.kept_events (
        position bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
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
        CONSTRAINT kept_events_pkey PRIMARY KEY (position)
    )"""

# The log and those copies. No position is in both: the copy and the TRUNCATE are one transaction, and a statement has
# the locks of all segments before it takes its snapshot.
STORED_EVENTS = """
    CREATE VIEW {schema}.stored_events AS
    SELECT {columns}
    FROM {schema}.events
    UNION ALL
    SELECT {columns}
    FROM {schema}.kept_events""".replace("{columns}", _COLUMNS)

# As in r0002, from the log or from a copy.
BURY = """
    CREATE OR REPLACE FUNCTION {schema}.bury(letters jsonb) RETURNS bigint
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
                SELECT found.position, found.recorded_at,
                    {schema}.key_hash(found.partitionkey, found.subject, found.source, found.id) AS key_hash,
                    found.specversion, found.id, found.source, found.type, found.subject, found.time,
                    found.datacontenttype, found.dataschema, found.partitionkey, found.extensions, found.data,
                    found.data_encoding
                FROM {schema}.{source} AS found
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

# The attached segments in order, each by its name: the oid of one that is dropped meanwhile has none. A partition with
# other bounds (DEFAULT, MINVALUE) is none.
SEGMENTS_OF = """
    CREATE FUNCTION {schema}.segments_of(log regclass)
    RETURNS TABLE (segment text, lower_bound bigint, upper_bound bigint)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT format('%I.%I', part_schema.nspname, part.relname), (bounds[1])::bigint, (bounds[2])::bigint
        FROM pg_inherits
        JOIN pg_class AS part ON part.oid = inhrelid
        JOIN pg_namespace AS part_schema ON part_schema.oid = part.relnamespace
        CROSS JOIN LATERAL regexp_match(
            pg_get_expr(part.relpartbound, part.oid), '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]'
        ) AS bounds
        WHERE inhparent = segments_of.log
            AND NOT inhdetachpending
            AND bounds IS NOT NULL
        ORDER BY 2;
    END"""

# These positions, both included, that each subscription has not settled; no row for those that have settled all.
# A complete shard needs no events. An old shard of a subscription that changes its shards needs none above `until`.
UNSETTLED = """
    CREATE FUNCTION {schema}.unsettled(first_position bigint, last_position bigint)
    RETURNS TABLE (subscription text, positions int8multirange)
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT part.subscription, range_agg(part.positions)
        FROM (
            SELECT stored.subscription,
                int8range(greatest(stored.position + 1, unsettled.first_position), bound.upper) AS positions
            FROM {schema}.offsets AS stored
            CROSS JOIN LATERAL (
                SELECT least(unsettled.last_position, stored.until) + 1 AS upper
            ) AS bound
            WHERE stored.completed_at IS NULL
                AND greatest(stored.position + 1, unsettled.first_position) < bound.upper
            UNION ALL
            SELECT stored.subscription, owed.range * wanted.range
            FROM (
                SELECT int8range(
                    unsettled.first_position, greatest(unsettled.first_position, unsettled.last_position + 1)
                ) AS range
            ) AS wanted
            CROSS JOIN {schema}.offsets AS stored
            CROSS JOIN LATERAL unnest(stored.pending) AS owed (range)
            WHERE stored.completed_at IS NULL
                AND owed.range && wanted.range
        ) AS part
        GROUP BY part.subscription;
    END"""

# Whether another transaction holds a lock on the table for that many milliseconds. Waiting for a lock that conflicts
# would only make others wait then.
STAYS_LOCKED = """
    CREATE FUNCTION {schema}.stays_locked(held text, patience integer) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    DECLARE
        holders text[] := '{}';
    BEGIN
        FOR is_second IN 0..1 LOOP
            holders := ARRAY(
                SELECT found.virtualtransaction
                FROM pg_locks AS found
                WHERE found.locktype = 'relation'
                    AND found.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND found.relation = to_regclass(held)
                    AND found.granted
                    AND found.pid IS DISTINCT FROM pg_backend_pid()
                    AND (is_second = 0 OR found.virtualtransaction = ANY (holders))
            );
            IF holders <> '{}' AND is_second = 0 THEN
                PERFORM pg_sleep(patience / 1000.0);
            END IF;
        END LOOP;
        RETURN holders <> '{}';
    END
    $function$"""

# Moves the sequence to the end of the segment that it is in, so that the next event goes into the next segment.
# Null: no cut is due. It decides alone, so that no caller can use up positions. A cut is due when the segment's first
# event is older than a tenth of the age at which segments go, or the segment larger than a tenth of the largest log.
# Also when that event is as far ahead of the clock: a clock that was wrong for a minute must not keep later events.
# Where segments stay because somebody holds them, cuts become rarer, and the number of segments grows with the
# logarithm of time only.
# It makes a segment, so that 100 million positions have one after the cut as well.
# setval() would set the sequence back if other sessions drew more positions, between its look at the sequence and its
# write, than the segment has left: those are a million at least. With fewer left, or in narrow segments, the positions
# are drawn, which cannot go back.
CUT_SEGMENT_OF = """
    CREATE FUNCTION {schema}.cut_segment_of(
        log regclass, retention regclass, segments regclass,
        OUT lower_bound bigint, OUT upper_bound bigint, OUT last_position bigint
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        positions text := pg_get_serial_sequence(log::text, 'position');
        head bigint;
        part text;
        reach bigint;
        count bigint;
        oldest text;
        age interval;
        bytes bigint;
        since timestamptz;
        emptied_since timestamptz;
    BEGIN
        FOR is_locked IN 0..1 LOOP
            IF is_locked = 1 THEN
                EXECUTE format('LOCK TABLE ONLY %s IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', log);
            END IF;
            lower_bound := NULL;
            upper_bound := NULL;
            EXECUTE format(
                'SELECT least(keep_us, max_age_us) * interval ''1 microsecond'', max_bytes FROM %s', retention
            ) INTO age, bytes;
            IF age IS NULL AND bytes IS NULL THEN
                RETURN;
            END IF;
            EXECUTE format('SELECT last_value FROM %s', positions) INTO head;
            EXECUTE format('
                SELECT max(one.upper_bound), count(*) FILTER (WHERE one.upper_bound <= $2)
                FROM %I.segments_of($1) AS one', schema
            ) INTO reach, count USING log, head;
            EXECUTE format('
                SELECT one.segment, one.lower_bound, one.upper_bound
                FROM %I.segments_of($1) AS one
                WHERE one.lower_bound <= $2 AND one.upper_bound > $2', schema
            ) INTO part, lower_bound, upper_bound USING log, head;
            IF part IS NULL OR head >= upper_bound - 1 OR count >= 200
                OR reach - lower_bound < least(100000000, 100 * (upper_bound - lower_bound))
            THEN
                lower_bound := NULL;
                upper_bound := NULL;
                RETURN;
            END IF;
            EXECUTE format('SELECT recorded_at FROM %s ORDER BY position LIMIT 1', part) INTO since;
            IF age IS NOT NULL AND since IS NOT NULL THEN
                age := age / 10;
                EXECUTE format('
                    SELECT one.segment, stored.dropped_at
                    FROM %I.segments_of($1) AS one
                    LEFT JOIN %s AS stored USING (lower_bound)
                    ORDER BY one.lower_bound
                    LIMIT 1', schema, segments
                ) INTO oldest, emptied_since USING log;
                IF emptied_since IS NULL THEN
                    EXECUTE format('SELECT recorded_at FROM %s ORDER BY position LIMIT 1', oldest) INTO emptied_since;
                END IF;
                IF isfinite(emptied_since) THEN
                    age := greatest(age, (clock_timestamp() - emptied_since) / 20);
                END IF;
            END IF;
            IF since IS NULL OR (
                (since <= clock_timestamp() - age OR since > clock_timestamp() + age) IS NOT TRUE
                AND pg_total_relation_size(to_regclass(part)) >= bytes / 10 IS NOT TRUE
            ) THEN
                lower_bound := NULL;
                upper_bound := NULL;
                RETURN;
            END IF;
        END LOOP;
        EXECUTE format('SELECT last_value, setval($1, $2) FROM %s WHERE last_value <= $2 - 1000000', positions)
        INTO last_position
        USING positions::regclass, upper_bound - 1;
        IF last_position IS NULL THEN
            EXECUTE format('SELECT last_value FROM %s', positions) INTO last_position;
            last_position := least(last_position, upper_bound - 1);
            LOOP
                EXECUTE format('SELECT $1 - last_value FROM %s', positions) INTO head USING upper_bound - 1;
                EXIT WHEN head <= 0;
                PERFORM count(nextval(positions::regclass)) FROM generate_series(1, least(head, 10000));
            END LOOP;
        END IF;
        EXECUTE format('SELECT count(*) FROM %I.make_segment_of($1)', schema) INTO count USING log;
        EXECUTE format('
            INSERT INTO %s (lower_bound, upper_bound, last_position, cut_at) VALUES ($1, $2, $3, clock_timestamp())
            ON CONFLICT (lower_bound) DO NOTHING', segments
        ) USING lower_bound, upper_bound, last_position;
    END
    $function$"""

# Records closed segments whose last positions were never used and which have no record: setval() outlasts a cut that
# is killed before its COMMIT, and an operator may move the sequence. As in pgbackend/log/fence.py, all of their
# positions were drawn before the appenders are listed. So when there are none, no event comes.
RECORD_CUTS_OF = """
    CREATE FUNCTION {schema}.record_cuts_of(log regclass, segments regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        head bigint;
        is_quiet boolean;
        one record;
    BEGIN
        EXECUTE format('
            SELECT upto, appenders = ''{}'' FROM %I.appenders_in_flight($1, $2)', schema
        ) INTO head, is_quiet USING log, pg_get_serial_sequence(log::text, 'position')::regclass;
        IF NOT is_quiet THEN
            RETURN;
        END IF;
        FOR one IN EXECUTE format('
            SELECT found.*
            FROM %I.segments_of($1) AS found
            LEFT JOIN %s AS stored USING (lower_bound)
            WHERE found.upper_bound - 1 <= $2
                AND stored.lower_bound IS NULL', schema, segments
        ) USING log, head LOOP
            EXECUTE format('
                INSERT INTO %s (lower_bound, upper_bound, last_position, cut_at)
                SELECT $1, $2, newest.position, clock_timestamp()
                FROM (SELECT position FROM %s ORDER BY position DESC LIMIT 1) AS newest
                WHERE newest.position < $2 - 1
                ON CONFLICT (lower_bound) DO NOTHING', segments, one.segment
            ) USING one.lower_bound, one.upper_bound;
        END LOOP;
    END
    $function$"""

CUT_SEGMENT = """
    CREATE FUNCTION {schema}.cut_segment(OUT lower_bound bigint, OUT upper_bound bigint, OUT last_position bigint)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT {schema}.record_cuts_of({events}::regclass, {segments}::regclass);
        SELECT done.lower_bound, done.upper_bound, done.last_position
        FROM {schema}.cut_segment_of({events}::regclass, {retention}::regclass, {segments}::regclass) AS done;
    END"""

# Empties the first closed segment that nobody needs any more, or that is beyond a hard limit, and frees its disk space.
# Null: there is none, or another session holds a lock on each. `losses`: what subscriptions had not settled.
# A segment is looked at without a lock first. AccessExclusive on it makes readers wait, so it is waited for briefly;
# producers use other segments. Events that wait to be tried again keep their segment; under a hard limit, copies of
# them are kept instead. A segment that somebody else emptied counts as dropped. TRUNCATE gives a table another file:
# a segment that has its first one was never used, because the sequence was moved past it, and nobody lost anything.
EMPTY_SEGMENT_OF = """
    CREATE FUNCTION {schema}.empty_segment_of(
        log regclass, retention regclass, segments regclass,
        OUT lower_bound bigint, OUT upper_bound bigint, OUT last_position bigint, OUT reason text, OUT losses json
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '50ms'
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        policy record;
        one record;
        newest record;
        head bigint;
        size bigint;
        is_alone boolean := false;
        is_busy boolean;
        is_locked boolean;
        is_needed boolean;
    BEGIN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE invalid_transaction_state
                USING MESSAGE = 'empty_segment() must see what was committed before its locks: use READ COMMITTED';
        END IF;
        EXECUTE format('
            SELECT clock_timestamp() - keep_us * interval ''1 microsecond'' AS keep,
                clock_timestamp() - max_age_us * interval ''1 microsecond'' AS max_age, max_bytes
            FROM %s', retention
        ) INTO policy;
        EXECUTE format('SELECT last_value FROM %s', pg_get_serial_sequence(log::text, 'position')) INTO head;
        IF policy.max_bytes IS NOT NULL THEN
            EXECUTE format('
                SELECT sum(pg_total_relation_size(to_regclass(found.segment))) FROM %I.segments_of($1) AS found
                WHERE found.lower_bound <= $2', schema
            ) INTO size USING log, head;
        END IF;
        FOR one IN EXECUTE format('
            SELECT found.*
            FROM %I.segments_of($1) AS found
            WHERE found.upper_bound - 1 <= $2
            ORDER BY found.lower_bound', schema
        ) USING log, head LOOP
            is_locked := false;
            LOOP
                reason := NULL;
                BEGIN
                    EXECUTE format(
                        'SELECT position, recorded_at FROM %s ORDER BY position DESC LIMIT 1', one.segment
                    ) INTO newest;
                EXCEPTION WHEN lock_not_available OR undefined_table THEN
                    EXIT;
                END;
                IF newest.position IS NULL THEN
                    EXECUTE format('
                        SELECT ''empty''
                        WHERE NOT EXISTS (SELECT FROM %s WHERE lower_bound = $1 AND dropped_at IS NOT NULL)', segments
                    ) INTO reason USING one.lower_bound;
                ELSIF newest.recorded_at < policy.keep OR newest.recorded_at < policy.max_age OR size > policy.max_bytes
                THEN
                    EXECUTE format('
                        SELECT EXISTS (SELECT FROM %1$I.unsettled($1, $2))
                            OR EXISTS (
                                SELECT FROM %1$I.redeliveries AS waiting
                                WHERE waiting.position >= $1 AND waiting.position <= $2
                            )', schema
                    ) INTO is_needed USING one.lower_bound, newest.position;
                    reason := CASE
                        WHEN newest.recorded_at < policy.keep AND NOT is_needed THEN 'settled'
                        WHEN newest.recorded_at < policy.max_age THEN 'max_age'
                        WHEN size > policy.max_bytes THEN 'max_bytes'
                    END;
                END IF;
                EXIT WHEN reason IS NULL OR is_locked;
                EXECUTE format('SELECT %I.stays_locked($1, 5)', schema) INTO is_busy USING one.segment;
                IF is_busy THEN
                    reason := NULL;
                    EXIT;
                END IF;
                BEGIN
                    IF NOT is_alone THEN
                        EXECUTE format('LOCK TABLE ONLY %s IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', log);
                    END IF;
                    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', one.segment);
                EXCEPTION WHEN lock_not_available OR undefined_table THEN
                    reason := NULL;
                    EXIT;
                END;
                is_alone := true;
                is_locked := true;
            END LOOP;
            CONTINUE WHEN reason IS NULL;
            lower_bound := one.lower_bound;
            upper_bound := one.upper_bound;
            last_position := CASE
                WHEN newest.position IS NOT NULL THEN newest.position
                WHEN pg_relation_filenode(to_regclass(one.segment)) <> to_regclass(one.segment)::oid
                    THEN one.upper_bound - 1
                ELSE one.lower_bound - 1
            END;
            -- One look-up for each: a join may read the whole segment.
            EXECUTE format('
                INSERT INTO %1$I.kept_events
                SELECT {columns}
                FROM (
                    SELECT DISTINCT position AS wanted
                    FROM %1$I.redeliveries
                    WHERE position >= $1 AND position <= $2
                ) AS waiting
                CROSS JOIN LATERAL (SELECT * FROM %2$s WHERE position = waiting.wanted OFFSET 0) AS event
                ON CONFLICT (position) DO NOTHING', schema, one.segment
            ) USING lower_bound, last_position;
            EXECUTE format('
                SELECT json_agg(json_build_object(
                    ''subscription'', lost.subscription, ''positions'', lost.positions::text
                ) ORDER BY lost.subscription)
                FROM (
                    SELECT owed.subscription, owed.positions - kept.positions AS positions
                    FROM %1$I.unsettled($1, $2) AS owed
                    CROSS JOIN (
                        SELECT coalesce(range_agg(int8range(copy.position, copy.position, ''[]'')), ''{}'') AS positions
                        FROM %1$I.kept_events AS copy
                        WHERE copy.position BETWEEN $1 AND $2
                    ) AS kept
                ) AS lost
                WHERE NOT isempty(lost.positions)', schema
            ) INTO losses USING lower_bound, last_position;
            EXECUTE format('TRUNCATE TABLE %s', one.segment);
            EXECUTE format('
                INSERT INTO %s AS stored (lower_bound, upper_bound, last_position, dropped_at)
                VALUES ($1, $2, $3, clock_timestamp())
                ON CONFLICT (lower_bound) DO UPDATE
                SET last_position = CASE WHEN $4 THEN stored.last_position ELSE excluded.last_position END,
                    dropped_at = coalesce(stored.dropped_at, excluded.dropped_at)', segments
            ) USING lower_bound, upper_bound, last_position, newest.position IS NULL;
            RETURN;
        END LOOP;
        reason := NULL;
    END
    $function$""".replace("{columns}", _COLUMNS)

EMPTY_SEGMENT = """
    CREATE FUNCTION {schema}.empty_segment(
        OUT lower_bound bigint, OUT upper_bound bigint, OUT last_position bigint, OUT reason text, OUT losses json
    )
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT done.lower_bound, done.upper_bound, done.last_position, done.reason, done.losses
        FROM {schema}.empty_segment_of({events}::regclass, {retention}::regclass, {segments}::regclass) AS done;
    END"""

# Detaches and drops emptied segments, at most ten, and returns where each began. That takes AccessExclusive on the
# parent, for which every producer waits, so it waits for it `patience` milliseconds at most, and for no more than 50.
# It does not even try while another transaction that uses the log stays open.
# Not with CONCURRENTLY: that is refused in functions, and a detach that is interrupted stays pending and blocks others.
REMOVE_SEGMENTS_OF = """
    CREATE FUNCTION {schema}.remove_segments_of(log regclass, segments regclass, patience integer) RETURNS SETOF bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '5ms'
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        one record;
        is_busy boolean;
        is_locked boolean := false;
        is_empty boolean;
    BEGIN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE invalid_transaction_state
                USING MESSAGE = 'remove_segments() must see what was committed before its locks: use READ COMMITTED';
        END IF;
        patience := greatest(1, least(patience, 50));
        PERFORM set_config('lock_timeout', patience || 'ms', true);
        FOR one IN EXECUTE format('
            SELECT found.*
            FROM %I.segments_of($1) AS found
            JOIN %s AS stored USING (lower_bound)
            WHERE stored.dropped_at IS NOT NULL
            ORDER BY found.lower_bound
            LIMIT 10', schema, segments
        ) USING log LOOP
            IF NOT is_locked THEN
                EXECUTE format('SELECT %I.stays_locked($1, $2)', schema) INTO is_busy USING log::text, patience;
                IF is_busy THEN
                    RAISE lock_not_available USING MESSAGE = 'another transaction has the log open';
                END IF;
                EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', log);
                is_locked := true;
            END IF;
            BEGIN
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', one.segment);
                EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s)', one.segment) INTO is_empty;
                IF is_empty THEN
                    EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', log, one.segment);
                    EXECUTE format('DROP TABLE %s', one.segment);
                    RETURN NEXT one.lower_bound;
                END IF;
            EXCEPTION WHEN lock_not_available OR dependent_objects_still_exist OR undefined_table THEN
                NULL;
            END;
        END LOOP;
    END
    $function$"""

REMOVE_SEGMENTS = """
    CREATE FUNCTION {schema}.remove_segments(patience integer) RETURNS SETOF bigint
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT done.lower_bound
        FROM {schema}.remove_segments_of({events}::regclass, {segments}::regclass, remove_segments.patience)
            AS done (lower_bound);
    END"""

# Deletes up to 1,000 dead letters that are older than `dead_letters_us` and not on their way again. Returns how many.
FORGET_LETTERS = """
    CREATE FUNCTION {schema}.forget_letters() RETURNS bigint
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH forgotten AS (
            DELETE FROM {schema}.dead_letters
            WHERE dead_letters.letter_id IN (
                SELECT letter.letter_id
                FROM {schema}.dead_letters AS letter
                CROSS JOIN {schema}.retention AS policy
                WHERE letter.buried_at < now() - policy.dead_letters_us * interval '1 microsecond'
                    AND letter.due_at IS NULL
                LIMIT 1000
                FOR UPDATE OF letter SKIP LOCKED
            )
            RETURNING 1
        )
        SELECT count(*) FROM forgotten;
    END"""

# Deletes copies of events that wait no longer, and the records of segments that are gone and that every subscription
# is past.
FORGET_REMOVED = """
    CREATE FUNCTION {schema}.forget_removed() RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        DELETE FROM {schema}.kept_events
        WHERE NOT EXISTS (
            SELECT FROM {schema}.redeliveries AS waiting WHERE waiting.position = kept_events.position
        );
        DELETE FROM {schema}.segments
        WHERE segments.lower_bound NOT IN (
                SELECT attached.lower_bound FROM {schema}.segments_of({events}::regclass) AS attached
            )
            AND NOT EXISTS (
                SELECT
                FROM {schema}.offsets AS stored
                WHERE stored.position < segments.upper_bound - 1
                    OR stored.pending && int8range(segments.lower_bound, segments.upper_bound)
            );
    END"""

# The subscriptions because of which the oldest segment is still there, though its events are older than `keep`.
FIND_HOLDERS = """
    CREATE FUNCTION {schema}.find_holders() RETURNS TABLE (subscription text, is_run boolean)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH oldest AS MATERIALIZED (
            SELECT attached.lower_bound, newest.position
            FROM {schema}.segments_of({events}::regclass) AS attached
            CROSS JOIN {schema}.retention AS policy
            CROSS JOIN LATERAL (
                SELECT event.position, event.recorded_at
                FROM {schema}.events AS event
                WHERE event.position >= attached.lower_bound
                    AND event.position < attached.upper_bound
                ORDER BY event.position DESC
                LIMIT 1
            ) AS newest
            WHERE attached.upper_bound - 1 <= (SELECT last_value FROM {schema}.events_position_seq)
                AND newest.recorded_at < clock_timestamp() - policy.keep_us * interval '1 microsecond'
            ORDER BY attached.lower_bound
            LIMIT 1
        ),
        holders AS (
            SELECT owed.subscription
            FROM oldest
            CROSS JOIN LATERAL {schema}.unsettled(oldest.lower_bound, oldest.position) AS owed
            UNION
            SELECT waiting.subscription
            FROM oldest
            JOIN {schema}.redeliveries AS waiting
                ON waiting.position BETWEEN oldest.lower_bound AND oldest.position
        )
        SELECT
            holders.subscription,
            EXISTS (
                SELECT
                FROM {schema}.offsets AS stored
                JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
                WHERE stored.subscription = holders.subscription
            )
        FROM holders
        ORDER BY holders.subscription;
    END"""

FUNCTIONS = (
    "find_holders()",
    "forget_removed()",
    "forget_letters()",
    "remove_segments(integer)",
    "remove_segments_of(regclass, regclass, integer)",
    "empty_segment()",
    "empty_segment_of(regclass, regclass, regclass)",
    "cut_segment()",
    "record_cuts_of(regclass, regclass)",
    "cut_segment_of(regclass, regclass, regclass)",
    "unsettled(bigint, bigint)",
    "stays_locked(text, integer)",
    "segments_of(regclass)",
)
