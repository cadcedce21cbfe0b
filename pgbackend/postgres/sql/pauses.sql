-- Pauses of subscriptions: see pgbackend/subscriptions/pauses.py.

-- name: pause
-- By an operator, whose pause replaces a dispatcher's. A pause that is there keeps its time, and its reason unless there
-- is a new one ($2). $3 names the process that asks.
UPDATE {schema}.subscriptions
SET paused_at = CASE WHEN paused_by = 'operator' THEN paused_at ELSE clock_timestamp() END,
    paused_by = 'operator',
    pause_reason = coalesce(
        $2::text,
        CASE WHEN paused_by = 'operator' THEN pause_reason END,
        format('no reason given, by role %s from %s', session_user, $3::text)
    )
WHERE name = $1
RETURNING name;

-- name: resume
-- Also if it is not paused: a dispatcher's pause that is on its way to the row is void.
UPDATE {schema}.subscriptions
SET paused_at = NULL,
    paused_by = NULL,
    pause_reason = NULL,
    resumed_at = clock_timestamp()
WHERE name = $1
RETURNING name;

-- name: pause_for_dispatcher
-- Unless it is paused, was resumed since the process looked ($3), has another target ($4), or no shard of it belongs to
-- this worker.
UPDATE {schema}.subscriptions
SET paused_at = clock_timestamp(),
    paused_by = 'dispatcher',
    pause_reason = $2
WHERE name = $1
    AND paused_at IS NULL
    AND resumed_at IS NOT DISTINCT FROM $3::timestamptz
    AND ($4::text IS NULL OR target = $4)
    AND EXISTS (SELECT FROM {schema}.offsets AS stored WHERE stored.subscription = $1 AND stored.owner = $5::uuid)
    AND (SELECT id FROM {schema}.life) = $6::text
RETURNING name;

-- name: change_target
-- A dispatcher's pause ends when the target ($2) is another one. Null is for a new dispatcher that names no target: the
-- stored one stays, and the pause ends. Returns the reason of the pause that has ended.
WITH before AS (
    SELECT pause_reason
    FROM {schema}.subscriptions
    WHERE name = $1
        AND paused_by = 'dispatcher'
)
UPDATE {schema}.subscriptions
SET target = coalesce($2::text, target),
    paused_at = CASE WHEN paused_by = 'operator' THEN paused_at END,
    paused_by = CASE WHEN paused_by = 'operator' THEN paused_by END,
    pause_reason = CASE WHEN paused_by = 'operator' THEN pause_reason END
WHERE name = $1
    AND (target IS DISTINCT FROM coalesce($2::text, target) OR ($2::text IS NULL AND paused_by = 'dispatcher'))
RETURNING (SELECT pause_reason FROM before) AS ended;
