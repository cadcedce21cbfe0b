-- Whether the log can be appended to, for `Backend.probe()`.

-- name: examine
-- Everything that would make an append fail, as seen by the role and in the session that would append.
SELECT
    current_setting('transaction_read_only')::boolean AS read_only,
    current_user AS role,
    (
        SELECT bool_and(has_column_privilege(attrelid, attnum, 'INSERT'))
        FROM pg_catalog.pg_attribute
        WHERE attrelid = to_regclass(quote_ident({schema_literal}) || '.events')
            AND attname IN (
                'specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema',
                'partitionkey', 'extensions', 'data', 'data_encoding'
            )
    ) AS may_insert;

-- name: write
-- A commit as durable as an append's: it has an xid, flushes its WAL, and waits for a synchronous standby.
-- It leaves nothing behind: no position, no row, no changed page. Any role may run it, at any wal_level.
SELECT pg_logical_emit_message(true, 'pgbackend', 'probe');
