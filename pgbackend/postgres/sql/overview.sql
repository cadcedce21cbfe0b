-- What all subscriptions owe, and whether their offsets and the log fit together.

-- name: list_status
-- One row a shard, with what its subscription owes. `lag_seconds` is the age of the oldest event that is above the offset,
-- or pending, or to be tried again. Each of the three is the first hit of an index scan. Pending ranges are tried in
-- their order until one holds an event. The failed event is looked up without a join: PostgreSQL 15 made the join a
-- merge, which reads the log from its beginning.
SELECT
    subscription.name, subscription.ordering, stored.shard, stored.shards, stored.position,
    stored.until, stored.pending::text AS pending, stored.epoch, stored.owner, worker.name AS owner_name,
    stored.completed_at,
    (
        SELECT count(*) FROM {schema}.redeliveries AS waiting WHERE waiting.subscription = subscription.name
    ) AS redeliveries,
    (
        SELECT count(*) FROM {schema}.dead_letters AS letter WHERE letter.subscription = subscription.name
    ) AS dead_letters,
    (
        -- Two shards may have recorded overlapping ranges at the same time.
        SELECT coalesce(sum(upper(range) - lower(range)), 0)::bigint
        FROM (
            SELECT range_agg(record.positions) AS positions
            FROM {schema}.skipped AS record
            WHERE record.subscription = subscription.name
        ) AS recorded
        CROSS JOIN LATERAL unnest(recorded.positions) AS range
    ) AS skipped,
    (
        SELECT waiting.last_error
        FROM {schema}.redeliveries AS waiting
        WHERE waiting.subscription = subscription.name
        ORDER BY waiting.due_at DESC
        LIMIT 1
    ) AS last_error,
    (
        SELECT extract(epoch FROM clock_timestamp() - min(owed.recorded_at))::float8
        FROM (
            (
                SELECT event.recorded_at
                FROM {schema}.events AS event
                WHERE event.position > stored.position
                ORDER BY event.position
                LIMIT 1
            )
            UNION ALL
            (
                SELECT event.recorded_at
                FROM unnest(stored.pending) AS pending (range)
                CROSS JOIN LATERAL (
                    SELECT held.recorded_at
                    FROM {schema}.events AS held
                    WHERE held.position >= lower(pending.range)
                        AND held.position < upper(pending.range)
                    ORDER BY held.position
                    LIMIT 1
                ) AS event
                LIMIT 1
            )
            UNION ALL
            (
                SELECT (SELECT event.recorded_at FROM {schema}.events AS event WHERE event.position = waiting.position)
                FROM {schema}.redeliveries AS waiting
                WHERE waiting.subscription = subscription.name
                ORDER BY waiting.position
                LIMIT 1
            )
        ) AS owed
        WHERE isfinite(owed.recorded_at)
    ) AS lag_seconds
FROM {schema}.subscriptions AS subscription
JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
ORDER BY subscription.name, stored.shards, stored.shard;

-- name: find_extremes
-- The highest offset, event and position given out, and whether a worker has found the log set back.
SELECT
    coalesce((SELECT set_back FROM {schema}.incarnation), false) AS set_back,
    coalesce((SELECT max(position) FROM {schema}.offsets), 0) AS offset_position,
    coalesce((SELECT max(position) FROM {schema}.events), 0) AS event_position,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head;
