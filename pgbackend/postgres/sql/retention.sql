-- Retention: how long events stay, and the steps in which segments go. See pgbackend/log/retention.py.

-- name: find_retention
-- How long settled events stay; limits that unsettled events do not outlast; how long dead letters stay. Times are in
-- microseconds. Null: no limit.
SELECT keep_us, max_age_us, max_bytes, dead_letters_us
FROM {schema}.retention;

-- name: store_retention
-- The log has this retention from now on, for all workers.
INSERT INTO {schema}.retention (keep_us, max_age_us, max_bytes, dead_letters_us)
VALUES ($1, $2, $3, $4)
ON CONFLICT (single) DO UPDATE
SET keep_us = excluded.keep_us,
    max_age_us = excluded.max_age_us,
    max_bytes = excluded.max_bytes,
    dead_letters_us = excluded.dead_letters_us;

-- name: bound_pauses
-- For the transaction of one of the functions below: a process that hangs before its COMMIT loses its locks after a second.
SELECT set_config('idle_in_transaction_session_timeout', '1s', true);

-- name: cut_segment
-- A function of the log decides whether the segment that is being filled is cut, and cuts it. Null: none was.
SELECT lower_bound, upper_bound, last_position
FROM {schema}.cut_segment();

-- name: empty_segment
-- A function of the log empties the first segment that may go, and says why. Null: none may, or each is locked.
SELECT lower_bound, upper_bound, last_position, reason, losses
FROM {schema}.empty_segment();

-- name: remove_segments
-- Drops segments that were emptied: where each began. Waits for the lock on the log for $1 milliseconds at most.
SELECT lower_bound
FROM {schema}.remove_segments($1) AS removed (lower_bound);

-- name: forget_letters
-- Deletes some dead letters that have been kept for long enough. How many.
SELECT {schema}.forget_letters();

-- name: forget_removed
-- Deletes copies of events that wait no longer, and records of segments that every subscription is past.
SELECT {schema}.forget_removed();

-- name: find_holders
-- The subscriptions that hold the oldest segment in the log though its events are older than `keep`, whether a worker
-- runs them, and whether they are paused. A function of the log, because few roles may read segments.
SELECT holder.subscription, holder.is_run, stored.paused_at IS NOT NULL AS is_paused
FROM {schema}.find_holders() AS holder
JOIN {schema}.subscriptions AS stored ON stored.name = holder.subscription
ORDER BY holder.subscription;
