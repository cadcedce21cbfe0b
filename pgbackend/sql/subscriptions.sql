-- Subscriptions: their definition, and the offset rows that come and go with it.

-- name: find_subscription
-- With the version of its row, to be named when it is altered.
SELECT name, ordering, shards, start_at, end_position, end_at, start_bound, xmin::text AS version
FROM {schema}.subscriptions
WHERE name = $1;

-- name: create_subscription
-- The definition and its offsets at once; nothing when somebody else was first. Nor when the server lives another life
-- than the one ($11) in which the place was found: after a failover the log may be shorter, and new events would get
-- positions at or below the offset.
WITH created AS (
    INSERT INTO {schema}.subscriptions
        (name, ordering, shards, start_at, end_position, end_at, start_bound, start_position)
    SELECT $1::text, $2::text, $3::int, $4::timestamptz, $5::bigint, $6::timestamptz, $9::text, $10::bigint
    WHERE (SELECT id FROM {schema}.incarnation) = $11
    ON CONFLICT (name) DO NOTHING
    RETURNING name, shards
)
INSERT INTO {schema}.offsets (subscription, shard, shards, position, pending, epoch)
SELECT created.name, shard, created.shards, $7, $8::text::int8multirange,
    nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM created
CROSS JOIN LATERAL generate_series(0, created.shards - 1) AS shard
RETURNING shard;

-- name: alter_subscription
-- Other terms ($4 to $7), and another place ($8 to $11) unless that is null; all shards get new epochs, so that whoever
-- runs them finds that they are not theirs any more. What was waiting to be tried again belongs to the old place; dead
-- letters stay. Nothing happens unless version $2 is still the one that counts and every shard is free (as `claim` has
-- it), or $3 says not to wait. Nor in another life of the server than $12, in which the place was found.
-- Nothing happens either when a row is not what the snapshot shows once it is locked: then somebody committed, and what
-- the snapshot shows of `redeliveries` is old. Every change there comes with one of the offset's row, so the same rows
-- mean the same redeliveries, and whoever did the same a moment ago has left others.
-- In order "none" a failed event is settled and lives in `redeliveries`; in the others it is pending, and may lie above
-- the offset, and the row there is its count and its time. So a change between them adds those positions to what is
-- pending, or takes them out, and the offset up to the last of them with the rest pending.
WITH found AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.ctid AS place,
        subscription.ordering = 'none' AND $4 <> 'none' AS to_ordered,
        subscription.ordering <> 'none' AND $4 = 'none' AS to_none,
        stored.owner IS NULL
        OR worker.id IS NULL
        OR worker.heartbeat_at < clock_timestamp() - worker.lease_timeout
        OR worker.backend_pid IS NOT NULL AND NOT EXISTS (
            SELECT
            FROM pg_catalog.pg_stat_activity AS activity
            WHERE activity.pid = worker.backend_pid
                AND (activity.backend_start = worker.backend_start OR activity.backend_start IS NULL)
        ) AS free
    FROM {schema}.subscriptions AS subscription
    JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
    LEFT JOIN {schema}.workers AS worker ON worker.id = stored.owner
    WHERE subscription.name = $1
        AND subscription.xmin = $2::text::xid
        AND (SELECT id FROM {schema}.incarnation) = $12
),
locked AS MATERIALIZED (
    SELECT shards, shard, ctid AS place
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
),
unchanged AS MATERIALIZED (
    SELECT count(*) AS shards
    FROM found
    LEFT JOIN locked USING (shards, shard, place)
    HAVING count(*) > 0
        AND count(*) = count(locked.place)
        AND (bool_and(found.free) OR $3::boolean)
),
owed AS (
    SELECT found.shards, found.shard, found.to_ordered, found.to_none,
        coalesce(
            range_agg(int8range(waiting.position, waiting.position + 1)) FILTER (WHERE waiting.position IS NOT NULL),
            '{}'
        ) AS positions,
        coalesce(max(waiting.position), 0) AS last
    FROM found
    CROSS JOIN unchanged
    LEFT JOIN {schema}.redeliveries AS waiting
        ON waiting.subscription = $1
        AND waiting.key_hash % found.shards = found.shard
    GROUP BY found.shards, found.shard, found.to_ordered, found.to_none
),
altered AS (
    UPDATE {schema}.subscriptions
    SET ordering = $4,
        end_position = $5,
        end_at = $6,
        start_bound = $7,
        start_at = CASE WHEN $8::bigint IS NULL THEN start_at ELSE $10::timestamptz END,
        start_position = CASE WHEN $8::bigint IS NULL THEN start_position ELSE $11::bigint END
    WHERE name = $1
        AND EXISTS (SELECT FROM unchanged)
),
dropped AS (
    DELETE FROM {schema}.redeliveries
    WHERE subscription = $1
        AND $8::bigint IS NOT NULL
        AND EXISTS (SELECT FROM unchanged)
)
UPDATE {schema}.offsets AS stored
SET position = CASE
        WHEN $8::bigint IS NOT NULL THEN $8
        WHEN owed.to_none THEN greatest(stored.position, owed.last)
        ELSE stored.position
    END,
    pending = CASE
        WHEN $8::bigint IS NOT NULL THEN $9::text::int8multirange
        WHEN owed.to_ordered THEN stored.pending + owed.positions
        WHEN owed.to_none THEN
            stored.pending
            + int8multirange(int8range(stored.position + 1, greatest(stored.position, owed.last) + 1))
            - owed.positions
        ELSE stored.pending
    END,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    owner = NULL,
    completed_at = NULL
FROM owed
WHERE stored.subscription = $1
    AND stored.shards = owed.shards
    AND stored.shard = owed.shard
RETURNING stored.shard;

-- name: note_start_bound
-- It moves nothing, so nobody has to stop for it.
UPDATE {schema}.subscriptions
SET start_bound = $3
WHERE name = $1
    AND xmin = $2::text::xid;

-- name: delete_subscription
-- With all that refers to it. Its offsets are locked first, as a commit does that schedules redeliveries: the other way
-- round each would wait for the other.
WITH locked AS (
    SELECT subscription
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
)
DELETE FROM {schema}.subscriptions
WHERE name = $1
    AND (SELECT count(*) FROM locked) >= 0
RETURNING name;

-- name: list_status
-- One row a shard, with what its subscription owes, and for how long: since its oldest event that is above the offset,
-- or pending, or to be tried again was recorded. Each of the three is the first hit of an index scan; of what is pending
-- the first range that holds an event at all, which comes first in the multirange. The failed one's event is no join:
-- PostgreSQL 15 made that a merge, which reads the log from its beginning.
SELECT
    subscription.name, subscription.ordering, stored.shard, stored.shards, stored.position,
    stored.pending::text AS pending, stored.epoch, stored.owner, worker.name AS owner_name, stored.completed_at,
    (
        SELECT count(*) FROM {schema}.redeliveries AS waiting WHERE waiting.subscription = subscription.name
    ) AS redeliveries,
    (
        SELECT count(*) FROM {schema}.dead_letters AS letter WHERE letter.subscription = subscription.name
    ) AS dead_letters,
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
    ) AS lag_seconds
FROM {schema}.subscriptions AS subscription
JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
LEFT JOIN {schema}.workers AS worker ON worker.id = stored.owner
ORDER BY subscription.name, stored.shards, stored.shard;

-- name: find_places
-- The highest places that offsets stand at, to be held against the sequence.
SELECT
    coalesce((SELECT max(position) FROM {schema}.offsets), 0) AS offset_position,
    coalesce((SELECT max(position) FROM {schema}.events), 0) AS event_position,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head;
