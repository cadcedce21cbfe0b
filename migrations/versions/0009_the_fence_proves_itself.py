"""The fence proves itself: evidence in a fixed order, an incarnation that a restore changes, a lock to be seen.

Revision ID: 0009
Revises: 0008
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "0009"
down_revision = "0008"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, UPGRADE, events="{schema}.events", positions="{schema}.events_position_seq", schema_name="{schema}",
            own=_OWN)  # fmt: skip


def downgrade(*, op: Operations) -> None:
    ddl.run(op, DOWNGRADE)


# A superuser who migrates must not leave functions behind that have a superuser's rights.
_OWN = """
DECLARE
    owner regrole := (SELECT relowner FROM pg_catalog.pg_class WHERE oid = {events}::regclass);
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY[
        'VIEW %s.life', 'FUNCTION %s.end_life(text)', 'FUNCTION %s.open_appender()',
        'FUNCTION %s.appenders_in_flight(regclass, regclass)', 'FUNCTION %s.find_distributed(regclass)'
    ]
    LOOP
        EXECUTE pg_catalog.format('ALTER ' || part || ' OWNER TO %s', {schema_name}, owner);
    END LOOP;
END"""

UPGRADE: tuple[str, ...] = (
    # Whether the life began because the sequence was found below positions that a worker had seen.
    "ALTER TABLE {schema}.incarnation ADD COLUMN set_back boolean NOT NULL DEFAULT false",
    # The identity of a life. A dump carries the unlogged row, so the id alone would survive a restore. The table's oid
    # changes when a restore makes the table anew, xmin when it only fills it. The sequence's file lies in the directory
    # of the database, which CREATE DATABASE … TEMPLATE changes, and is another one after TRUNCATE … RESTART IDENTITY
    # and after each ALTER SEQUENCE.
    """
    CREATE VIEW {schema}.life AS
    SELECT pg_catalog.concat_ws(
        '/', incarnation.id, incarnation.tableoid, incarnation.xmin,
        pg_catalog.pg_relation_filepath({positions}::pg_catalog.regclass)
    ) AS id
    FROM {schema}.incarnation""",
    # Ends the life `seen` for all processes. The next one cannot trust offsets, unless all were moved to the beginning.
    """
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
    END""",
    # The evidence of pgbackend/log/fence.py: first the sequence, then the locks. plpgsql runs one statement after the
    # other, whatever a planner makes of each. No filter by pid: a prepared transaction has none.
    """
    CREATE FUNCTION {schema}.appenders_in_flight(
        log regclass, positions regclass, OUT upto bigint, OUT appenders text[], OUT server_start timestamptz
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    AS $function$
    BEGIN
        upto := pg_sequence_last_value(positions);
        IF upto IS NULL THEN
            -- PostgreSQL 18 says null also to a role that may not know.
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
    $function$""",
    # Makes the caller's transaction an appender that draws no position, and says by which name locks should show it.
    """
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
    END""",
    # Tables of the log's schema that Citus distributes. A plain query cannot name a table that most servers lack.
    """
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
    $function$""",
    "REVOKE ALL ON FUNCTION {schema}.end_life(text) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.open_appender() FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.appenders_in_flight(regclass, regclass) FROM PUBLIC",
    "REVOKE ALL ON FUNCTION {schema}.find_distributed(regclass) FROM PUBLIC",
    "DO {own}",
)

DOWNGRADE: tuple[str, ...] = (
    "DROP FUNCTION {schema}.find_distributed(regclass)",
    "DROP FUNCTION {schema}.open_appender()",
    "DROP FUNCTION {schema}.appenders_in_flight(regclass, regclass)",
    "DROP FUNCTION {schema}.end_life(text)",
    "DROP VIEW {schema}.life",
    "ALTER TABLE {schema}.incarnation DROP COLUMN set_back",
)
