"""Dead letters are copied by the log, and no role but the owner holds what making segments waits for.

Revision ID: 0010
Revises: 0009
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0010"
down_revision = "0009"

_NAMES = {
    "events": "{schema}.events",
    "bury": "{schema}.bury(jsonb)",
    "make_segment": "{schema}.make_segment()",
    "make_segment_of": "{schema}.make_segment_of(regclass)",
}


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, **_NAMES, own_functions=_OWN_FUNCTIONS, take_back=_TAKE_BACK)


def downgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        _FORMER_SEGMENTS,
        events=_NAMES["events"],
        make_segment="{schema}.make_segment(boolean)",
        make_segment_of="{schema}.make_segment_of(regclass,boolean)",
        own_functions=_OWN_FORMER_FUNCTIONS,
    )


# A superuser who migrates must not leave functions behind that have a superuser's rights.
_OWN_FUNCTIONS = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {events}::regclass);
BEGIN
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {bury}::regprocedure, owner);
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment_of}::regprocedure, owner);
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment}::regprocedure, owner);
END"""

# Grants only give. What consumers were given before lets them make letters up.
_TAKE_BACK = """
DECLARE
    letters regclass := (
        SELECT pg_class.oid
        FROM pg_catalog.pg_class
        WHERE relname = 'dead_letters'
            AND relnamespace = (SELECT relnamespace FROM pg_catalog.pg_class WHERE oid = {events}::regclass)
    );
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END
        FROM (
            SELECT relacl AS acl FROM pg_catalog.pg_class WHERE oid = letters
            UNION ALL
            SELECT attacl FROM pg_catalog.pg_attribute WHERE attrelid = letters
        ) AS granted
        CROSS JOIN LATERAL pg_catalog.aclexplode(acl) AS entry
        WHERE entry.privilege_type = 'INSERT'
            AND entry.grantee <> (SELECT relowner FROM pg_catalog.pg_class WHERE oid = letters)
    LOOP
        EXECUTE pg_catalog.format('REVOKE INSERT ON TABLE %s FROM %s', letters, grantee);
    END LOOP;
END"""

UPGRADE: tuple[str, ...] = (
    # Copies events to `dead_letters`, for shards that the caller owns. The content comes from the log alone: with the
    # right to INSERT, a role could have another subscription's target get what was never produced.
    """
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
            -- One look-up for each: a join may read the whole log.
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
                begun = false
            RETURNING 1
        )
        SELECT count(*) FROM buried;
    END""",
    "DROP FUNCTION {schema}.make_segment(boolean)",
    "DROP FUNCTION {schema}.make_segment_of(regclass, boolean)",
    # As before (see 0003), with another lock: an advisory one is for any role to hold, for as long as it likes. This
    # one only the owner may take, no INSERT waits for it, and ATTACH takes it anyway. Who calls holds it until its
    # transaction ends, so it is not taken before there is something to make.
    """
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
                -- Appends that failed for want of a segment have used up positions: whole segments are left out.
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
    $function$""",
    """
    CREATE FUNCTION {schema}.make_segment(OUT lower_bound bigint, OUT upper_bound bigint)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT made.lower_bound, made.upper_bound
        FROM {schema}.make_segment_of({events}::regclass) AS made;
    END""",
    "REVOKE ALL ON FUNCTION {schema}.bury(jsonb) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment_of(regclass) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment() FROM PUBLIC",
    "DO {own_functions}",
    "DO {take_back}",
)

_OWN_FORMER_FUNCTIONS = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {events}::regclass);
BEGIN
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment_of}::regprocedure, owner);
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment}::regprocedure, owner);
END"""

# The functions of 0003 as they were.
_FORMER_SEGMENTS: tuple[str, ...] = (
    "DROP FUNCTION {schema}.bury(jsonb)",
    "DROP FUNCTION {schema}.make_segment()",
    "DROP FUNCTION {schema}.make_segment_of(regclass)",
    """
    CREATE FUNCTION {schema}.make_segment_of(
        log regclass, urgent boolean, OUT lower_bound bigint, OUT upper_bound bigint
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '1s'
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        key bigint := hashtextextended('pgbackend segments ' || schema, 0);
        head bigint;
        width bigint;
        segment text;
        grantee text;
    BEGIN
        IF urgent THEN
            PERFORM pg_advisory_xact_lock(key);
        ELSIF NOT pg_try_advisory_xact_lock(key) THEN
            RETURN;
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
            -- Appends that failed for want of a segment have used up positions: whole segments of them are left out.
            lower_bound := upper_bound + greatest(head - upper_bound, 0) / width * width;
        END IF;
        upper_bound := lower_bound + width;
        IF lower_bound - head >= least(100000000, 100 * width) THEN
            lower_bound := NULL;
            upper_bound := NULL;
            RETURN;
        END IF;
        segment := format('%I.%I', schema, 'events_' || lower_bound);
        EXECUTE format(
            'CREATE TABLE %s (LIKE %s INCLUDING ALL EXCLUDING IDENTITY, '
            'CONSTRAINT segment_bounds CHECK (position >= %s AND position < %s))',
            segment, log, lower_bound, upper_bound
        );
        -- As below, of the other segments: what default privileges gave.
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
    $function$""",
    """
    CREATE FUNCTION {schema}.make_segment(urgent boolean, OUT lower_bound bigint, OUT upper_bound bigint)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT made.lower_bound, made.upper_bound
        FROM {schema}.make_segment_of({events}::regclass, urgent) AS made;
    END""",
    "REVOKE ALL ON FUNCTION {schema}.make_segment_of(regclass, boolean) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment(boolean) FROM PUBLIC",
    "DO {own_functions}",
)
