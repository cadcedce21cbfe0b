-- Failed events that are due again, and dead letters. They change in offsets.sql, fenced; here they are read.

-- name: find_due
-- For each shard that asks: its failed events whose time has come, oldest first, with their content from the log.
SELECT
    event.specversion, event.id, event.source, event.type, event.subject, event.time, event.datacontenttype,
    event.dataschema, event.partitionkey, event.extensions, event.data, event.data_encoding, event.position,
    event.recorded_at, event.key_hash, asked.epoch, due.attempt, due.failure, due.last_error
FROM unnest($1::bigint[], $2::text[], $3::int[], $4::int[], $5::int[])
    AS asked (epoch, subscription, shard, shards, room)
CROSS JOIN LATERAL (
    SELECT *
    FROM {schema}.redeliveries AS waiting
    WHERE waiting.subscription = asked.subscription
        AND waiting.due_at <= clock_timestamp()
        AND waiting.key_hash % asked.shards = asked.shard
    ORDER BY waiting.due_at
    LIMIT asked.room
) AS due
JOIN {schema}.events AS event ON event.position = due.position;

-- name: find_due_letters
-- The same for dead letters that an operator sent on their way again, with their content from the letter.
SELECT
    due.specversion, due.id, due.source, due.type, due.subject, due.time, due.datacontenttype, due.dataschema,
    due.partitionkey, due.extensions, due.data, due.data_encoding, due.position, due.recorded_at, due.key_hash,
    asked.epoch, due.attempt, due.letter_id
FROM unnest($1::bigint[], $2::text[], $3::int[], $4::int[], $5::int[])
    AS asked (epoch, subscription, shard, shards, room)
CROSS JOIN LATERAL (
    SELECT *
    FROM {schema}.dead_letters AS letter
    WHERE letter.subscription = asked.subscription
        AND letter.due_at <= clock_timestamp()
        AND letter.key_hash % asked.shards = asked.shard
    ORDER BY letter.due_at
    LIMIT asked.room
) AS due;

-- name: find_attempts
-- Of a shard in an ordered mode: what its waiting positions have behind them. A new owner goes on from there.
SELECT position, attempt, failure, greatest(extract(epoch FROM due_at - clock_timestamp()), 0)::float8 AS delay
FROM {schema}.redeliveries
WHERE subscription = $1
    AND key_hash % $3::int = $2::int;

-- name: list_letters
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, recorded_at, key_hash, letter_id, subscription, attempts, error, details, buried_at, due_at
FROM {schema}.dead_letters
WHERE letter_id > $1
    AND ($2::text IS NULL OR subscription = $2)
ORDER BY letter_id
LIMIT $3;

-- name: redeliver_letters
-- Send dead letters on their way again, from the first attempt on.
UPDATE {schema}.dead_letters
SET due_at = clock_timestamp(),
    attempt = 0
WHERE ($1::bigint[] IS NULL OR letter_id = ANY ($1))
    AND ($2::text IS NULL OR subscription = $2)
    AND due_at IS NULL
RETURNING letter_id;
