-- Failed events that are due again, and dead letters. They change in offsets.sql, fenced; here they are read.

-- name: find_due
-- For each shard that asks: its failed events whose time has come, oldest first, with their content from the log. Within
-- its room by count and bytes, the first in any case, and without those that are at work already. One whose row is gone
-- from the log has no position here.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, weight, epoch, attempt, failure, started_by
FROM (
    SELECT
        event.*, due.key_hash, asked.epoch, asked.room_bytes, due.due_at, due.attempt, due.failure, due.started_by,
        sum(event.weight) OVER (
            PARTITION BY asked.epoch ORDER BY due.due_at, event.position
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS bytes_before
    FROM unnest($1::bigint[], $2::text[], $3::int[], $4::int[], $5::int[], $6::bigint[], $9::boolean[])
        AS asked (epoch, subscription, shard, shards, room, room_bytes, given_up)
    CROSS JOIN LATERAL (
        SELECT *
        FROM {schema}.redeliveries AS waiting
        WHERE waiting.subscription = asked.subscription
            AND waiting.due_at <= clock_timestamp()
            AND waiting.key_hash % asked.shards = asked.shard
            AND (waiting.failure IS NOT NULL OR NOT asked.given_up)
            AND waiting.position <> ALL (
                -- An array, made once for each shard: for each row it took a minute with 160 shards and 100 at work in each.
                ARRAY (
                    SELECT busy.position
                    FROM unnest($7::bigint[], $8::bigint[]) AS busy (epoch, position)
                    WHERE busy.epoch = asked.epoch
                )
            )
        ORDER BY waiting.due_at
        LIMIT asked.room
    ) AS due
    LEFT JOIN LATERAL (
        -- By itself for each: a join may read the whole log.
        SELECT *, {weight} AS weight
        FROM {schema}.stored_events
        WHERE position = due.position
        OFFSET 0
    ) AS event ON true
) AS found
WHERE bytes_before IS NULL OR bytes_before < room_bytes
ORDER BY due_at;

-- name: find_gone
-- A shard's failed events whose rows are gone from the log, due or not, without those that are at work: they are skipped
-- together, because each by itself would be a range of its own on record.
SELECT waiting.position
FROM {schema}.redeliveries AS waiting
WHERE waiting.subscription = $1
    AND waiting.key_hash % $3::int = $2::int
    AND waiting.position <> ALL ($4::bigint[])
    AND (SELECT event.position FROM {schema}.stored_events AS event WHERE event.position = waiting.position) IS NULL
ORDER BY waiting.position
LIMIT 10000;

-- name: find_due_letters
-- The same for dead letters that an operator sent on their way again, with their content from the letter.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, weight, epoch, attempt, letter_id, started_by
FROM (
    SELECT
        due.*, asked.epoch, asked.room_bytes,
        sum(due.weight) OVER (
            PARTITION BY asked.epoch ORDER BY due.due_at, due.letter_id
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS bytes_before
    FROM unnest($1::bigint[], $2::text[], $3::int[], $4::int[], $5::int[], $6::bigint[])
        AS asked (epoch, subscription, shard, shards, room, room_bytes)
    CROSS JOIN LATERAL (
        SELECT *, {weight} AS weight
        FROM {schema}.dead_letters AS letter
        WHERE letter.subscription = asked.subscription
            AND letter.due_at <= clock_timestamp()
            AND letter.key_hash % asked.shards = asked.shard
            AND letter.letter_id <> ALL (
                -- An array, made once for each shard: for each row it took a minute with 160 shards and 100 at work in each.
                ARRAY (
                    SELECT busy.letter_id
                    FROM unnest($7::bigint[], $8::bigint[]) AS busy (epoch, letter_id)
                    WHERE busy.epoch = asked.epoch
                )
            )
        ORDER BY letter.due_at
        LIMIT asked.room
    ) AS due
) AS found
WHERE bytes_before IS NULL OR bytes_before < room_bytes
ORDER BY due_at;

-- name: find_attempts
-- The retries of a shard in an ordered mode, by their positions. A new owner goes on from there.
SELECT position, attempt, failure, started_by, greatest(extract(epoch FROM due_at - clock_timestamp()), 0)::float8 AS delay
FROM {schema}.redeliveries
WHERE subscription = $1
    AND key_hash % $3::int = $2::int;

-- name: list_letters
-- A page of them, which ends by count or by weight; the first in any case.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, weight, letter_id, subscription, attempts, error, details,
    buried_at, due_at, failure_group, history::text AS history
FROM (
    SELECT
        *,
        sum(weight) OVER (ORDER BY letter_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS weight_before
    FROM (
        SELECT
            *,
            {weight} + 4 * (octet_length(error) + octet_length(details::text)) AS weight,
            {failure_group} AS failure_group
        FROM {schema}.dead_letters
        WHERE letter_id > $1
            AND ($2::text IS NULL OR subscription = $2)
            AND ($4::text IS NULL OR {failure_group} = $4)
        ORDER BY letter_id
        LIMIT 100
    ) AS letter
) AS page
WHERE weight_before IS NULL OR weight_before < $3
ORDER BY letter_id;

-- name: list_groups
-- The groups of letters that failed alike, the largest first. Equal errors are counted first, because most are equal, and
-- finding the group of an error takes most of the time.
SELECT {failure_group} AS failure_group, subscription, sum(letters)::bigint AS letters, sum(due)::bigint AS due,
    min(first_at) AS first_at, max(last_at) AS last_at, max(error) AS error
FROM (
    SELECT subscription, error, count(*) AS letters, count(due_at) AS due, min(buried_at) AS first_at,
        max(buried_at) AS last_at
    FROM {schema}.dead_letters
    WHERE $1::text IS NULL
        OR subscription = $1
    GROUP BY subscription, error
) AS equal
GROUP BY subscription, {failure_group}
ORDER BY letters DESC, last_at DESC;

-- name: purge_letters
-- Without those that are on their way again: a worker may be dispatching them.
DELETE FROM {schema}.dead_letters
WHERE ($1::bigint[] IS NULL OR letter_id = ANY ($1))
    AND ($2::text IS NULL OR subscription = $2)
    AND ($3::text IS NULL OR {failure_group} = $3)
    AND due_at IS NULL
RETURNING letter_id;

-- name: redeliver_letters
-- Send dead letters on their way again, from the first attempt on.
UPDATE {schema}.dead_letters
SET due_at = clock_timestamp(),
    attempt = 0,
    started_by = NULL,
    lives = 0,
    history = jsonb_path_query_array(
        history || jsonb_build_array(jsonb_build_object('at', clock_timestamp(), 'what', 'redelivered')),
        '$[last-19 to last]'
    )
WHERE ($1::bigint[] IS NULL OR letter_id = ANY ($1))
    AND ($2::text IS NULL OR subscription = $2)
    AND ($3::text IS NULL OR {failure_group} = $3)
    AND due_at IS NULL
RETURNING letter_id;

-- name: find_start
-- An attempt that started and whose end nobody reported, of an event ($2) or a dead letter ($3): how many attempts were
-- made before, which worker started it, whether the server still has that worker's connection, and for how long the
-- server has been running. No row: it is over.
WITH given AS (
    SELECT $1::text AS subscription, $2::bigint AS position, $3::bigint AS letter_id
),
found AS (
    SELECT kept.attempt, kept.started_by, kept.due_at
    FROM given
    JOIN {schema}.redeliveries AS kept USING (subscription, position)
    WHERE given.letter_id IS NULL
    UNION ALL
    SELECT letter.attempt, letter.started_by, letter.due_at
    FROM given
    JOIN {schema}.dead_letters AS letter USING (subscription, letter_id)
)
SELECT
    found.attempt,
    found.started_by,
    extract(epoch FROM clock_timestamp() - found.due_at)::float8 AS overdue,
    EXISTS (
        SELECT
        FROM {schema}.workers AS worker
        JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = worker.backend_pid
        WHERE worker.id = found.started_by
            AND coalesce(activity.backend_start = worker.backend_start, true)
    ) AS connected,
    extract(epoch FROM clock_timestamp() - pg_catalog.pg_postmaster_start_time())::float8 AS server_age
FROM found;

-- name: report_survival
-- A worker that lost its lease during an attempt lives: the attempt does not count.
UPDATE {schema}.redeliveries
SET started_by = NULL
WHERE subscription = $2
    AND position = $3
    AND started_by = $1;

-- name: report_survival_of_letter
UPDATE {schema}.dead_letters
SET started_by = NULL
WHERE letter_id = $2
    AND started_by = $1;

-- name: report_outlived
-- The process of these workers ($1) lives, though they ended, perhaps ($2) with their server. Their attempts do not
-- count, unless the event was at work when each of the last $3 lives of the server ended: it may be what ends them.
WITH given AS (
    SELECT $1::uuid[] AS workers, CASE WHEN $2::boolean THEN 1 ELSE 0 END AS died, $3::int AS most
),
events AS (
    UPDATE {schema}.redeliveries AS kept
    SET started_by = CASE WHEN given.died = 1 AND kept.lives + 1 >= given.most THEN kept.started_by END,
        lives = kept.lives + given.died
    FROM given
    WHERE kept.started_by = ANY (given.workers)
    RETURNING 1
),
letters AS (
    UPDATE {schema}.dead_letters AS letter
    SET started_by = CASE WHEN given.died = 1 AND letter.lives + 1 >= given.most THEN letter.started_by END,
        lives = letter.lives + given.died
    FROM given
    WHERE letter.started_by = ANY (given.workers)
    RETURNING 1
)
SELECT (SELECT count(*) FROM events) + (SELECT count(*) FROM letters) AS reported;
