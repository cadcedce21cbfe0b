-- Asked of each new connection: what it leads to. See pgbackend/postgres/pool.py.

-- name: find_role
SELECT
    pg_is_in_recovery() AS in_recovery,
    concat_ws(
        ' ', version(),
        -- Their version() is that of the PostgreSQL that they come from. Not by to_regclass(): it fails where a schema of
        -- that name is somebody's who lets nobody in.
        (
            SELECT string_agg(
                CASE relname WHEN 'iam_pg_role_mappings' THEN '(Aurora DSQL)' ELSE '(Aurora Limitless)' END, ' '
            )
            FROM pg_catalog.pg_class
            JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
            WHERE (nspname, relname) IN (('sys', 'iam_pg_role_mappings'), ('rds_aurora', 'limitless_subclusters'))
        )
    ) AS version,
    current_setting('default_transaction_read_only')::boolean AS read_only,
    current_setting('server_encoding') AS encoding;

-- name: find_timeline
-- Which cluster this is, and on which timeline: a promotion begins a new one, a restart does not. The control file has
-- the timeline of the last checkpoint, which is late; the name of the WAL file that is being written begins with it.
SELECT
    system_identifier,
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint AS timeline
FROM pg_control_system();

-- name: prepare_session
-- What the statements of this package rely on, whatever the role, the database, the server or the DSN sets. Limits of
-- time: each statement has one of its own, and the connection of the leases is idle for long. client_min_messages: a
-- commit without its standby is told in a warning. Joined, because an older server does not know all of them.
-- Not here: synchronous_commit, search_path, TimeZone and default_transaction_read_only are the user's to set.
SELECT set_config(wanted.name, wanted.setting, false)
FROM (
    VALUES
        ('client_min_messages', 'warning'),
        ('default_transaction_isolation', 'read committed'),
        ('default_transaction_deferrable', 'off'),
        ('idle_in_transaction_session_timeout', '60s'),
        ('idle_session_timeout', '0'),
        ('lock_timeout', '0'),
        ('statement_timeout', '0'),
        ('transaction_timeout', '0'),
        ('standard_conforming_strings', 'on'),
        ('DateStyle', 'ISO, MDY'),
        ('IntervalStyle', 'postgres')
) AS wanted (name, setting)
JOIN pg_catalog.pg_settings AS known ON known.name = wanted.name;

-- name: hides_warnings
-- Through a pooler nothing can be set for long.
SELECT current_setting('client_min_messages') IN ('error', 'fatal', 'panic');
