-- Asked of each new connection: what it leads to. See pgbackend/database.py.

-- name: find_role
SELECT
    pg_is_in_recovery() AS in_recovery,
    current_setting('default_transaction_read_only')::boolean AS read_only;

-- name: find_timeline
-- Which cluster this is, and on which timeline: a promotion begins a new one, a restart does not. The control file has
-- the timeline of the last checkpoint, which is late; the name of the WAL file that is being written begins with it.
SELECT
    system_identifier,
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint AS timeline
FROM pg_control_system();
