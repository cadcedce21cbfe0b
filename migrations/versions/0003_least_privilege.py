"""Least privilege: who does not own the log can have its segments made.

Revision ID: 0003
Revises: 0002
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0003"
down_revision = "0002"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        UPGRADE,
        events="{schema}.events",
        make_segment="{schema}.make_segment(boolean)",
        appender_began="{schema}.appender_began(integer)",
        make_segment_of="{schema}.make_segment_of(regclass,boolean)",
        own_functions=_OWN_FUNCTIONS,
        lock_segments=_LOCK_SEGMENTS,
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# Somebody's default privileges are no reason to write into a segment: since 17 an INSERT there draws its position
# without the parent's lock, and the fence knows nothing of it. Reading stays, for backups.
_LOCK_SEGMENTS = """
DECLARE
    segment record;
BEGIN
    FOR segment IN
        SELECT DISTINCT inhrelid::regclass AS name, entry.grantee
        FROM pg_catalog.pg_inherits
        JOIN pg_catalog.pg_class ON pg_class.oid = inhrelid
        CROSS JOIN LATERAL pg_catalog.aclexplode(relacl) AS entry
        WHERE inhparent = {events}::regclass
            AND entry.grantee <> relowner
    LOOP
        EXECUTE pg_catalog.format(
            'REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON TABLE %s FROM %s',
            segment.name,
            CASE segment.grantee WHEN 0 THEN 'PUBLIC' ELSE segment.grantee::regrole::text END
        );
    END LOOP;
END"""

# A superuser who migrates must not leave functions behind that have a superuser's rights.
_OWN_FUNCTIONS = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {events}::regclass);
BEGIN
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment_of}::regprocedure, owner);
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {make_segment}::regprocedure, owner);
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO %s', {appender_began}::regprocedure, owner);
END"""

UPGRADE: tuple[str, ...] = (
    # Who names a new life of the server must not choose the name: the old one again would hide that there is a new one.
    # So roles may write `single`, and that alone.
    "ALTER TABLE {schema}.incarnation ALTER COLUMN id SET DEFAULT gen_random_uuid()",
    # Makes the segment behind the newest, as wide as that; or nothing, when somebody else is at it, or enough are ahead
    # as AHEAD_POSITIONS and AHEAD_SEGMENTS in pgbackend/log/segments.py have it: who calls cannot ask for more.
    # Only one at a time makes segments, and the others have better things to do; `urgent` is who cannot go on without.
    # Nothing here is worth a long wait: the next call is soon.
    # CREATE, then ATTACH. Not PARTITION OF: it takes AccessExclusive on the parent, and so queues every producer behind
    # one open appender. Without the identity: 17 and newer attach no table that has one. The CHECK spares ATTACH its
    # scan. The newest segment is found by its name, which ends in its lower bound. No backslash in the text: what that
    # means is for the caller's session to say.
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
    # The door for all others, with the owner's rights. Such a body has its table and its function by their numbers: the
    # schema may be given another name, and who calls has no say in which table is meant.
    """
    CREATE FUNCTION {schema}.make_segment(urgent boolean, OUT lower_bound bigint, OUT upper_bound bigint)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT made.lower_bound, made.upper_bound
        FROM {schema}.make_segment_of({events}::regclass, urgent) AS made;
    END""",
    # When the transaction of another role's backend began, if it appends: pg_stat_activity shows that only to members
    # of the other role, and to who may read all statistics. Here it is enough that the owner may.
    """
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
    END""",
    "REVOKE ALL ON FUNCTION {schema}.make_segment_of(regclass, boolean) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.make_segment(boolean) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.appender_began(integer) FROM PUBLIC",
    "DO {own_functions}",
    "DO {lock_segments}",
)

DOWNGRADE: tuple[str, ...] = (
    "DROP FUNCTION {schema}.appender_began(integer)",
    "DROP FUNCTION {schema}.make_segment(boolean)",
    "DROP FUNCTION {schema}.make_segment_of(regclass, boolean)",
    "ALTER TABLE {schema}.incarnation ALTER COLUMN id DROP DEFAULT",
)
