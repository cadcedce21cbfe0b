-- The evidence that the fence rests on. The proof is in pgbackend/log/fence.py.

-- name: take_evidence
-- The highest position given out, and then the transactions that may hold one of those open. A function of the log takes
-- both in that order, which leaves no planner the choice.
SELECT
    evidence.upto,
    evidence.appenders,
    evidence.server_start,
    (SELECT id FROM {schema}.life) AS incarnation
FROM {schema}.appenders_in_flight(
    to_regclass(quote_ident({schema_literal}) || '.events'),
    to_regclass(quote_ident({schema_literal}) || '.events_position_seq')
) AS evidence;

-- name: describe_appenders
-- The same transactions for people, not for the proof: oldest first, with what this role or the log's owner may see.
SELECT
    held.virtualtransaction AS virtual_transaction,
    held.pid,
    prepared.gid,
    activity.application_name AS application,
    extract(epoch FROM clock_timestamp() - coalesce(began.xact_start, prepared.prepared))::float8 AS age,
    began.xact_start
FROM pg_catalog.pg_locks AS held
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = held.pid
CROSS JOIN LATERAL (
    SELECT coalesce(activity.xact_start, {schema}.appender_began(held.pid)) AS xact_start
) AS began
-- Found by the lock on its own xid: a prepared transaction has its old name until a restart makes it "-1/<xid>".
LEFT JOIN pg_catalog.pg_prepared_xacts AS prepared
    ON held.pid IS NULL
    AND EXISTS (
        SELECT
        FROM pg_catalog.pg_locks AS own
        WHERE own.locktype = 'transactionid'
            AND own.pid IS NULL
            AND own.virtualtransaction = held.virtualtransaction
            AND own.transactionid = prepared.transaction
    )
WHERE held.locktype = 'relation'
    AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
    AND held.relation = to_regclass(quote_ident({schema_literal}) || '.events')
    AND held.mode = 'RowExclusiveLock'
    AND held.granted
ORDER BY age DESC NULLS LAST;
