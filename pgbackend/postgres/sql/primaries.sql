-- Asked of each new connection: whether it leads to the log's primary. See pgbackend/postgres/primaries.py.

-- name: examine_server
SELECT
    pg_is_in_recovery() AS in_recovery,
    concat_ws(
        ' ', version(),
        -- The version() of these engines is that of the PostgreSQL they derive from. Not by to_regclass(): it fails when
        -- a schema of that name exists that this role may not use.
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
-- the timeline of the last checkpoint, which is late; the name of the WAL file being written begins with the current one.
SELECT
    system_identifier AS cluster,
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint AS timeline
FROM pg_control_system()
