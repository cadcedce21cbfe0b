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
SELECT virtual_transaction, pid, gid, application, age_seconds AS age, began_at
FROM {schema}.appenders
ORDER BY age_seconds DESC NULLS LAST;
