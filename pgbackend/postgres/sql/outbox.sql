-- Appending in a transaction of the caller's, through any driver. Each statement has one parameter, $1, which is text:
-- the caller's session may decode json in its own way. Names have their schema, because its search_path may be any.

-- name: append_rows
-- The events of a JSON array, which `pgbackend/codec/row_json.py` writes, in its order. PostgreSQL sorts before it draws
-- positions. Without repeats, if the log deduplicates.
WITH given AS MATERIALIZED (
    SELECT *
    FROM ROWS FROM (
        pg_catalog.json_to_recordset(CAST(CAST($1 AS pg_catalog.text) AS pg_catalog.json)) AS (
            specversion pg_catalog.text,
            id pg_catalog.text,
            source pg_catalog.text,
            type pg_catalog.text,
            subject pg_catalog.text,
            time pg_catalog.text,
            datacontenttype pg_catalog.text,
            dataschema pg_catalog.text,
            partitionkey pg_catalog.text,
            extensions pg_catalog.text,
            data pg_catalog.text,
            data_encoding pg_catalog.text
        )
    ) WITH ORDINALITY AS recordset
)
INSERT INTO {schema}.events (
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding
)
SELECT
    given.specversion, given.id, given.source, given.type, given.subject, given.time, given.datacontenttype,
    given.dataschema, given.partitionkey, CAST(given.extensions AS pg_catalog.json),
    pg_catalog.decode(given.data, 'base64'), given.data_encoding
FROM given
WHERE CASE
    WHEN EXISTS (SELECT FROM {schema}.deduplication AS stored WHERE stored.window_us OPERATOR(pg_catalog.>) 0)
        THEN given.ordinality OPERATOR(pg_catalog.=) ANY (
            SELECT pg_catalog.unnest((
                SELECT {schema}.first_copies(
                    pg_catalog.array_agg(every.source ORDER BY every.ordinality),
                    pg_catalog.array_agg(every.id ORDER BY every.ordinality)
                )
                FROM given AS every
            ))
        )
    ELSE true
END
ORDER BY given.ordinality;

-- name: notify_at_commit
-- The processes that listen on channel $1 look at the log once this transaction has committed. With an empty payload
-- workers would look at the shards, too.
SELECT pg_catalog.pg_notify(CAST($1 AS pg_catalog.text), 'outbox');

-- name: notify_after_commit
-- The same in a transaction of its own. No flush, and no long wait for the lock that all commits with a NOTIFY share:
-- a lost wake-up only makes an event late.
SELECT
    pg_catalog.set_config('synchronous_commit', 'off', true),
    pg_catalog.set_config('lock_timeout', '100ms', true),
    pg_catalog.pg_notify(CAST($1 AS pg_catalog.text), 'outbox');
