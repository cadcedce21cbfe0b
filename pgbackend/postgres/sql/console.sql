-- What the web console shows: see pgbackend/console/. Each statement runs in a read-only transaction with short limits,
-- and reads a bounded number of events by their positions.

-- name: limit_reading
-- No statement of this transaction runs for longer than $1, or waits for a lock for that long.
SELECT
    set_config('statement_timeout', $1, true) AS statement_timeout,
    set_config('lock_timeout', $1, true) AS lock_timeout;

-- name: show_log
-- The log as a whole, and the server's time.
SELECT clock_timestamp() AS now, head, events_per_second, segments, bytes_on_disk
FROM {schema}.log_status;

-- name: show_appenders
SELECT pid, gid, application, age_seconds
FROM {schema}.appenders
ORDER BY began_at NULLS FIRST;

-- name: show_subscriptions
-- All subscriptions with what they owe, and the beginnings of their errors.
SELECT
    subscription AS name, ordering, shards, state, owners, lag_events, lag_seconds, in_flight, redeliveries,
    dead_letters, skipped, left(last_error, 300) AS last_error, paused_at, paused_by, pause_reason
FROM {schema}.lag
ORDER BY subscription;

-- name: show_subscription
-- One of them. A statement of its own: with a parameter that may be null, PostgreSQL computes all of them.
SELECT
    subscription AS name, ordering, shards, state, owners, lag_events, lag_seconds, in_flight, redeliveries,
    dead_letters, skipped, last_error, paused_at, paused_by, pause_reason
FROM {schema}.lag
WHERE subscription = $1;

-- name: show_shards
-- The shards of subscription $1.
SELECT shard, shards, position, lag_events, lag_seconds, pending, in_flight, epoch, owner_name, until
FROM {schema}.shard_lag
WHERE subscription = $1
ORDER BY shards, shard;

-- name: show_waiting
-- The first of subscription $1's failed events, at most $2.
SELECT position, id, source, type, attempts, due_at, error, given_up
FROM {schema}.waiting_events($1, 0, $2)
ORDER BY position;

-- name: show_workers
SELECT name, id, is_alive, started_at, heartbeat_seconds, lease_seconds, subscriptions, shards
FROM {schema}.worker_status
ORDER BY name, started_at;

-- name: show_minutes
-- The last 60 full minutes and the present one: the events that were recorded in each, and the position of the last
-- event that was recorded by its end.
WITH past AS MATERIALIZED (
    SELECT minute, position, events
    FROM {schema}.rates
),
present AS MATERIALIZED (
    SELECT
        date_trunc('minute', statement_timestamp()) AS minute,
        (SELECT max(past.position) FROM past) AS lower,
        coalesce((SELECT event.position FROM {schema}.events AS event ORDER BY event.position DESC LIMIT 1), 0) AS upper
),
unused AS (
    SELECT coalesce(range_agg(int8range(last_position + 1, upper_bound)), '{}') AS positions
    FROM {schema}.segments
    WHERE last_position + 1 < upper_bound
)
SELECT past.minute, past.position, 60.0::float8 AS seconds, past.events
FROM past
UNION ALL
SELECT
    present.minute,
    greatest(present.lower, present.upper),
    extract(epoch FROM statement_timestamp() - present.minute)::float8,
    (
        SELECT greatest(0, present.upper - present.lower - coalesce(sum(upper(range) - lower(range)), 0))::bigint
        FROM unnest(
            unused.positions
            * int8multirange(int8range(present.lower + 1, greatest(present.lower, present.upper) + 1))
        ) AS range
    )
FROM present
CROSS JOIN unused
ORDER BY minute;

-- name: show_backlogs
-- How many positions subscription $1 owes now up to each of the positions $2; a null stands for the head of the log. By
-- the arithmetic of `shard_lag`, so the last number is the lag. No rows: there is no such subscription.
WITH unused AS MATERIALIZED (
    SELECT coalesce(range_agg(int8range(last_position + 1, upper_bound)), '{}') AS positions
    FROM {schema}.segments
    WHERE last_position + 1 < upper_bound
),
kept AS MATERIALIZED (
    SELECT coalesce(range_agg(int8range(position, position, '[]')), '{}') AS positions
    FROM {schema}.kept_events
),
dropped AS MATERIALIZED (
    SELECT coalesce(range_agg(int8range(lower_bound, last_position + 1)), '{}')
        - (SELECT kept.positions FROM kept) AS positions
    FROM {schema}.segments
    WHERE dropped_at IS NOT NULL
        AND lower_bound <= last_position
),
head AS MATERIALIZED (
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS position
    FROM {schema}.events_position_seq
),
owed AS MATERIALIZED (
    SELECT stored.shards, stored.shard, lower(part.range) AS lower, upper(part.range) AS upper
    FROM unused
    CROSS JOIN dropped
    CROSS JOIN head
    CROSS JOIN {schema}.offsets AS stored
    CROSS JOIN LATERAL unnest(
        stored.pending
        + int8multirange(int8range(stored.position + 1, greatest(stored.position, head.position) + 1))
        - unused.positions - dropped.positions
    ) AS part (range)
    WHERE stored.subscription = $1
        AND EXISTS (
            SELECT
            FROM {schema}.offsets AS other
            WHERE other.subscription = $1
                AND other.completed_at IS NULL
        )
)
SELECT coalesce(
    (
        SELECT max(shard.positions)
        FROM (
            SELECT sum(least(owed.upper, edge.position + 1) - owed.lower)::bigint AS positions
            FROM owed
            WHERE owed.lower <= edge.position
            GROUP BY owed.shards, owed.shard
        ) AS shard
    ),
    0
) AS backlog
FROM (
    SELECT coalesce(given.position, head.position) AS position, given.number
    FROM unnest($2::bigint[]) WITH ORDINALITY AS given (position, number)
    CROSS JOIN head
) AS edge
JOIN {schema}.subscriptions AS subscription ON subscription.name = $1
ORDER BY edge.number;

-- name: show_head
-- The highest position that was given out.
SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS head
FROM {schema}.events_position_seq;

-- name: read_in_order
-- From here on this transaction reads events by their primary key. For so few rows of a range the planner would rather
-- read the whole range and sort it: of 200,000 events that took 160 ms, and 2 ms by the key.
SELECT
    set_config('enable_sort', 'off', true) AS enable_sort,
    set_config('enable_bitmapscan', 'off', true) AS enable_bitmapscan,
    set_config('enable_seqscan', 'off', true) AS enable_seqscan;

-- name: search_events
-- The newest events below position $1 and above $2 that match, at most $3, each with the first bytes of its data. $4 to
-- $7 are patterns of LIKE. $8 is a text in small letters, and $9 the forms that its bytes may have in the data, as
-- encode(…, 'escape') writes them: data need not be UTF-8. At most 10,000 events are read, for at most 1.5 s: the last
-- one that was read comes even if it does not match, and the first one that was not has no `is_match`.
WITH given AS (
    SELECT
        $1::bigint AS before, $2::bigint AS after, $3::int AS most, $4::text AS type, $5::text AS source,
        $6::text AS subject, $7::text AS id, $8::text AS text, $9::text[] AS forms
)
SELECT
    position, id, source, type, subject, {readable_date} AS recorded_at, octet_length(data)::bigint AS size,
    substr(data, 1, 1000) AS beginning, data_encoding, is_match
FROM (
    SELECT *, row_number() OVER (ORDER BY position DESC) AS number
    FROM (
        SELECT
            *,
            CASE
                WHEN clock_timestamp() - statement_timestamp() < interval '1.5 seconds' THEN coalesce(
                    ((SELECT type FROM given) IS NULL OR event.type LIKE (SELECT type FROM given))
                    AND ((SELECT source FROM given) IS NULL OR event.source LIKE (SELECT source FROM given))
                    AND ((SELECT subject FROM given) IS NULL OR event.subject LIKE (SELECT subject FROM given))
                    AND ((SELECT id FROM given) IS NULL OR event.id LIKE (SELECT id FROM given))
                    AND CASE
                        WHEN (SELECT text FROM given) IS NULL THEN true
                        WHEN strpos(
                            lower(concat_ws(
                                chr(10), event.id, event.source, event.type, event.subject, event.time,
                                event.datacontenttype, event.dataschema, event.partitionkey, event.extensions::text
                            )),
                            (SELECT text FROM given)
                        ) > 0 THEN true
                        ELSE EXISTS (
                            SELECT
                            FROM lower(encode(event.data, 'escape') COLLATE "C") AS found (data)
                            CROSS JOIN unnest((SELECT forms FROM given)) AS form (bytes)
                            WHERE strpos(found.data, form.bytes) > 0
                        )
                    END,
                    false
                )
            END AS is_match
        FROM {schema}.events AS event
        WHERE event.position < (SELECT before FROM given)
            AND event.position > (SELECT after FROM given)
        ORDER BY event.position DESC
        LIMIT 10000
    ) AS seen
) AS numbered
WHERE is_match IS DISTINCT FROM false
    OR number = 10000
ORDER BY position DESC
LIMIT (SELECT most FROM given);

-- name: show_event
-- The event at position $1, with at most $2 bytes of its data. Also a redacted one, which has none.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions,
    substr(data, 1, $2::int) AS data, data_encoding, position, {recorded_at} AS recorded_at, {key_hash} AS key_hash,
    octet_length(data)::bigint AS size
FROM {schema}.all_events
WHERE position = $1;

-- name: show_buried_event
-- The same from one of its dead letters, for an event that is gone from the log.
SELECT
    letter.specversion, letter.id, letter.source, letter.type, letter.subject, letter.time, letter.datacontenttype,
    letter.dataschema, letter.partitionkey, letter.extensions, substr(letter.data, 1, $2::int) AS data,
    letter.data_encoding, letter.position, pg_catalog.timestamptz_send(letter.recorded_at) AS recorded_at,
    letter.key_hash, octet_length(letter.data)::bigint AS size
FROM {schema}.subscriptions AS subscription
JOIN {schema}.dead_letters AS letter
    ON letter.subscription = subscription.name
    AND letter.position = $1
LIMIT 1;

-- name: show_outcomes
-- The state of the event at position $1 in each subscription, by its shard and what is recorded of the event. $2 is the
-- hash of its key. While the number of shards changes, an old shard decides up to where it ends.
SELECT DISTINCT ON (subscription.name)
    subscription.name,
    stored.position AS reached,
    stored.pending @> $1::bigint AS is_pending,
    stored.holes @> $1::bigint AS is_hole,
    stored.completed_at IS NOT NULL AS is_complete,
    worker.id IS NOT NULL AS is_run,
    waiting.attempt,
    waiting.due_at,
    waiting.last_error,
    waiting.failure,
    waiting.history::text AS history,
    letter.letter_id,
    letter.attempts AS letter_attempts,
    letter.error AS letter_error,
    letter.buried_at,
    letter.due_at AS letter_due_at,
    letter.history::text AS letter_history,
    skip.skipped_at
FROM {schema}.subscriptions AS subscription
JOIN {schema}.offsets AS stored
    ON stored.subscription = subscription.name
    AND stored.shard = $2::bigint % stored.shards
    AND (stored.until IS NULL OR $1 <= stored.until)
LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
LEFT JOIN {schema}.redeliveries AS waiting
    ON waiting.subscription = subscription.name
    AND waiting.position = $1
LEFT JOIN {schema}.dead_letters AS letter
    ON letter.subscription = subscription.name
    AND letter.position = $1
LEFT JOIN LATERAL (
    SELECT record.skipped_at
    FROM {schema}.skipped AS record
    WHERE record.subscription = subscription.name
        AND record.positions @> $1
    ORDER BY record.skipped_at
    LIMIT 1
) AS skip ON true
ORDER BY subscription.name, stored.until NULLS LAST;

-- name: show_data
-- All of the event's data.
SELECT data, data_encoding
FROM {schema}.all_events
WHERE position = $1;

-- name: show_buried_data
SELECT letter.data, letter.data_encoding
FROM {schema}.subscriptions AS subscription
JOIN {schema}.dead_letters AS letter
    ON letter.subscription = subscription.name
    AND letter.position = $1
LIMIT 1;

-- name: show_letters
-- A page of dead letters without their data: behind the id $1, of subscription $2 and failure group $3 if they are given.
SELECT
    letter_id, subscription, position, id, source, type, attempts, error, details, buried_at, due_at,
    {failure_group} AS failure_group
FROM {schema}.dead_letters
WHERE letter_id > $1
    AND ($2::text IS NULL OR subscription = $2)
    AND ($3::text IS NULL OR {failure_group} = $3)
ORDER BY letter_id
LIMIT $4;

-- name: count_letters
-- The dead letters that an action would be about, and how many of them are on their way again already.
SELECT count(*) AS letters, count(due_at) AS due
FROM {schema}.dead_letters
WHERE ($1::bigint[] IS NULL OR letter_id = ANY ($1))
    AND ($2::text IS NULL OR subscription = $2)
    AND ($3::text IS NULL OR {failure_group} = $3);
