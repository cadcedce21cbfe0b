-- The status of the log and of its subscriptions, from views in its schema, and whether offsets and log fit together.

-- name: find_figures
-- The log as a whole: the highest position given out, events a second over the last minute, segments, bytes on disk.
SELECT head, events_per_second, segments, bytes_on_disk
FROM {schema}.log_status;

-- name: list_status
-- One row a shard, with what its subscription owes.
SELECT
    subscription.subscription, subscription.ordering, subscription.state, subscription.paused_at,
    subscription.paused_by, subscription.pause_reason, subscription.lag_events, subscription.lag_seconds,
    subscription.in_flight, subscription.redeliveries, subscription.dead_letters, subscription.skipped,
    subscription.last_error, stored.shard, stored.shards, stored.position, stored.until, stored.pending, stored.epoch,
    stored.owner, stored.owner_name
FROM {schema}.lag AS subscription
JOIN {schema}.shard_lag AS stored ON stored.subscription = subscription.subscription
ORDER BY subscription.subscription, stored.shards, stored.shard;

-- name: find_extremes
-- The highest offset, event and position given out, and whether a worker has found the log set back.
SELECT
    coalesce((SELECT set_back FROM {schema}.incarnation), false) AS set_back,
    coalesce((SELECT max(position) FROM {schema}.offsets), 0) AS offset_position,
    coalesce((SELECT max(position) FROM {schema}.events), 0) AS event_position,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head;
