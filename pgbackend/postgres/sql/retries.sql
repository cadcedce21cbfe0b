-- Failed events that wait to be tried again, as operators see them and make them due at once.

-- name: list_waiting
-- A page of subscription $1's, above position $2, by a function of the log for roles that may not read events.
SELECT waiting.position, waiting.id, waiting.source, waiting.type, waiting.attempts, waiting.due_at, waiting.error,
    waiting.given_up,
    (
        SELECT failed.history::text
        FROM {schema}.redeliveries AS failed
        WHERE failed.subscription = $1
            AND failed.position = waiting.position
    ) AS history
FROM {schema}.waiting_events($1, $2, $3) AS waiting
ORDER BY waiting.position;

-- name: retry_now
-- Subscription $1's failed events, or the one at position $2, are due now; how many that changed. Null: there is no such
-- subscription. A row that a commit has locked is about to change anyway, and one that an attempt has started is no
-- waiting event. `retried_at` tells workers, which know the times of ordered shards by heart.
WITH asked AS (
    UPDATE {schema}.subscriptions
    SET retried_at = clock_timestamp()
    WHERE name = $1
    RETURNING name
),
waiting AS MATERIALIZED (
    SELECT failed.position
    FROM {schema}.redeliveries AS failed
    WHERE failed.subscription = $1
        AND ($2::bigint IS NULL OR failed.position = $2)
        AND failed.due_at > clock_timestamp()
        AND failed.started_by IS NULL
    FOR UPDATE SKIP LOCKED
),
due AS (
    UPDATE {schema}.redeliveries AS failed
    SET due_at = clock_timestamp()
    FROM waiting
    WHERE failed.subscription = $1
        AND failed.position = waiting.position
    RETURNING 1
)
SELECT CASE WHEN EXISTS (SELECT FROM asked) THEN (SELECT count(*) FROM due) END AS due;

-- name: find_requests
-- When each of these subscriptions was last asked to retry now. No row for one that never was.
SELECT name, retried_at
FROM {schema}.subscriptions
WHERE name = ANY ($1::text[])
    AND retried_at IS NOT NULL;

-- name: find_due_among
-- The positions $2 of subscription $1's failed events that are due. A row that does not have the attempts $3 belongs to
-- an earlier failure.
SELECT known.position
FROM unnest($2::bigint[], $3::int[]) AS known (position, attempts)
JOIN {schema}.redeliveries AS failed
    ON failed.subscription = $1
    AND failed.position = known.position
    AND failed.attempt = known.attempts
WHERE failed.due_at <= clock_timestamp()
    AND failed.started_by IS NULL;
