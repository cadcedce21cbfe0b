-- Whether the log can be used, asked by those who are about to send it something.

-- name: examine
-- What would make an append fail, and costs nothing to know. The role is the one that appends, its settings as well.
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
-- A commit that goes all the way of an append's: it has an xid, its WAL is flushed, a synchronous standby is waited for.
-- And leaves nothing behind: no position is drawn, no row written, no page touched. Any role may, at any wal_level.
SELECT pg_logical_emit_message(true, 'pgbackend', 'probe');
