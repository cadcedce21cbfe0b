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
    WHERE (SELECT id FROM {schema}.life) = $11
    ON CONFLICT (name) DO NOTHING
    RETURNING name, shards
)
INSERT INTO {schema}.offsets (subscription, shard, shards, position, pending, holes, epoch)
SELECT created.name, shard, created.shards, $7, $8::text::int8multirange, $8::text::int8multirange,
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
-- While the number of shards changes all that is owed is the old ones'; another place ends them. What failed in order
-- above where they end is read again by the new ones: in order "none" it begins anew, or it would be there twice.
WITH found AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.ctid AS place,
        subscription.ordering = 'none' AND $4 <> 'none' AS to_ordered,
        subscription.ordering <> 'none' AND $4 = 'none' AS to_none,
        worker.id IS NULL AS free,
        stored.until
    FROM {schema}.subscriptions AS subscription
    JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
    WHERE subscription.name = $1
        AND subscription.xmin = $2::text::xid
        AND (SELECT id FROM {schema}.life) = $12
),
locked AS MATERIALIZED (
    SELECT shards, shard, ctid AS place
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
),
unchanged AS MATERIALIZED (
    SELECT max(found.until) AS barrier, bool_or(found.to_none) AS to_none
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
        AND (unchanged.barrier IS NULL OR (found.until IS NOT NULL AND waiting.position <= unchanged.barrier))
    GROUP BY found.shards, found.shard, found.to_ordered, found.to_none
),
altered AS (
    UPDATE {schema}.subscriptions
    SET ordering = $4,
        end_position = $5,
        end_at = $6,
        start_bound = $7,
        start_at = CASE WHEN $8::bigint IS NULL THEN start_at ELSE $10::timestamptz END,
        start_position = CASE WHEN $8::bigint IS NULL THEN start_position ELSE $11::bigint END,
        draining_until = NULL
    WHERE name = $1
        AND EXISTS (SELECT FROM unchanged)
),
dropped AS (
    DELETE FROM {schema}.redeliveries AS waiting
    USING unchanged
    WHERE waiting.subscription = $1
        AND ($8::bigint IS NOT NULL OR (unchanged.to_none AND waiting.position > unchanged.barrier))
),
ended AS (
    DELETE FROM {schema}.offsets
    WHERE subscription = $1
        AND until IS NOT NULL
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
    -- What nobody has read yet counts as a hole: there may be no event.
    holes = CASE
        WHEN $8::bigint IS NOT NULL THEN $9::text::int8multirange
        WHEN owed.to_none THEN
            stored.holes
            + int8multirange(int8range(stored.position + 1, greatest(stored.position, owed.last) + 1))
            - owed.positions
        ELSE stored.holes - owed.positions
    END,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    owner = NULL,
    completed_at = NULL
FROM owed
WHERE stored.subscription = $1
    AND stored.shards = owed.shards
    AND stored.shard = owed.shard
    AND (stored.until IS NULL OR $8::bigint IS NULL)
RETURNING stored.shard;

-- name: rest
-- Who runs its shards lets what is at work end and gives them up, and nobody claims one, for $2 seconds; 0 ends that.
UPDATE {schema}.subscriptions
SET draining_until = CASE WHEN $2::float8 > 0 THEN clock_timestamp() + make_interval(secs => $2) END
WHERE name = $1;

-- name: rest_again
-- The same for $2 seconds, unless it is at rest or somebody has refused that.
WITH again AS (
    UPDATE {schema}.subscriptions
    SET draining_until = clock_timestamp() + make_interval(secs => $2::float8)
    WHERE name = $1
        AND (draining_until IS NULL OR draining_until <= clock_timestamp())
        AND draining_until IS DISTINCT FROM '-infinity'
    RETURNING name
)
SELECT
    EXISTS (SELECT FROM again) AS again,
    EXISTS (
        SELECT FROM {schema}.subscriptions WHERE name = $1 AND draining_until = '-infinity'
    ) AS refused;

-- name: refuse_rest
-- Tell whoever wants it to rest that one of its shards is not given up now.
UPDATE {schema}.subscriptions
SET draining_until = '-infinity'
WHERE name = $1
    AND draining_until > clock_timestamp();

-- name: find_owners
-- The workers that are alive and have a shard of this subscription, by their names.
SELECT DISTINCT worker.name
FROM {schema}.offsets AS stored
JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
WHERE stored.subscription = $1
ORDER BY worker.name;

-- name: reshard
-- Another number of shards ($3), from a barrier on: the highest offset of those there are, which go on to there and no
-- further. The new ones begin there, and wait until `switch_shards` has found the old ones over. While that is under way
-- only the number of those that wait is changed; should it be the old number again, the old ones just go on.
-- Nothing happens unless version $2 is still the one that counts and every shard that ends or goes on is free. Nor when a
-- row is not what the snapshot shows once it is locked: see `alter_subscription`.
WITH found AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.ctid AS place, stored.position, stored.until,
        worker.id IS NULL AS free
    FROM {schema}.subscriptions AS subscription
    JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
    WHERE subscription.name = $1
        AND subscription.xmin = $2::text::xid
),
locked AS MATERIALIZED (
    SELECT shards, shard, ctid AS place
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
),
barrier AS MATERIALIZED (
    SELECT
        coalesce(max(found.until), max(found.position)) AS position,
        count(found.until) > 0 AS changes_shards,
        coalesce(max(found.shards) FILTER (WHERE found.until IS NOT NULL) = $3, false) AS is_back
    FROM found
    LEFT JOIN locked USING (shards, shard, place)
    HAVING count(*) > 0
        AND count(*) = count(locked.place)
        AND (
            bool_and(found.free)
            OR max(found.shards) FILTER (WHERE found.until IS NOT NULL) <> $3
        )
),
dropped AS (
    DELETE FROM {schema}.offsets AS stored
    USING barrier
    WHERE stored.subscription = $1
        AND stored.until IS NULL
        AND barrier.changes_shards
),
ending AS (
    UPDATE {schema}.offsets AS stored
    SET until = CASE WHEN NOT barrier.is_back THEN barrier.position END,
        epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
        owner = NULL,
        completed_at = NULL
    FROM barrier
    WHERE stored.subscription = $1
        AND (barrier.is_back OR NOT barrier.changes_shards)
        AND (barrier.is_back = (stored.until IS NOT NULL))
),
begun AS (
    INSERT INTO {schema}.offsets (subscription, shard, shards, position, epoch)
    SELECT $1, shard, $3, barrier.position, nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
    FROM barrier
    CROSS JOIN LATERAL generate_series(0, $3 - 1) AS shard
    WHERE NOT barrier.is_back
)
UPDATE {schema}.subscriptions
SET shards = $3,
    draining_until = NULL
WHERE name = $1
    AND EXISTS (SELECT FROM barrier)
RETURNING name;

-- name: switch_shards
-- The old shards are over and gone, and the new ones may be claimed; nothing when the old ones are not over, or somebody
-- still has one. What they leave pending goes to each of the new ones, since the key of an open hole is not known before
-- it appears. What can be seen of it, where only some of the old ones have it pending, is looked at: it goes to the one
-- whose it is now, or to none when the one whose it was has settled it (it was a hole, to the others).
-- An old shard that is over because the subscription ends before `until` has not read what lies between: that is pending
-- as well, for a later end.
-- Nothing happens when a row is not what the snapshot shows once it is locked, as above.
WITH found AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.ctid AS place, stored.until IS NOT NULL AS old,
        stored.pending
        + int8multirange(int8range(stored.position + 1, greatest(stored.position, stored.until) + 1)) AS pending,
        stored.pending - stored.holes AS known,
        stored.until IS NULL
        OR (worker.id IS NULL AND stored.position >= least(stored.until, subscription.end_position - 1)) AS is_over
    FROM {schema}.offsets AS stored
    JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
    WHERE stored.subscription = $1
),
locked AS MATERIALIZED (
    SELECT shards, shard, ctid AS place
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
),
left_over AS MATERIALIZED (
    SELECT
        (
            SELECT coalesce(range_agg(open), '{}')
            FROM found AS ended
            CROSS JOIN LATERAL unnest(ended.pending) AS open
            WHERE ended.old
        ) AS any_shard,
        range_intersect_agg(found.pending) FILTER (WHERE found.old) AS every_shard,
        (
            SELECT coalesce(range_agg(event), '{}')
            FROM found AS ended
            CROSS JOIN LATERAL unnest(ended.known) AS event
            WHERE ended.old
        ) AS known,
        max(found.shards) FILTER (WHERE found.old) AS old_shards,
        max(found.shards) FILTER (WHERE NOT found.old) AS new_shards
    FROM found
    LEFT JOIN locked USING (shards, shard, place)
    HAVING count(*) = count(locked.place)
        AND bool_or(found.old)
        AND bool_and(found.is_over)
),
visible AS MATERIALIZED (
    SELECT event.position,
        event.key_hash % left_over.old_shards AS old_shard,
        event.key_hash % left_over.new_shards AS new_shard
    FROM left_over
    CROSS JOIN LATERAL unnest(left_over.any_shard - left_over.every_shard) AS open
    CROSS JOIN LATERAL (
        -- By itself for each range, or all of the log is read: 800 ranges in a log of 300,000 events took two minutes.
        SELECT held.position, held.key_hash
        FROM {schema}.events AS held
        WHERE held.position >= lower(open)
            AND held.position < upper(open)
        ORDER BY held.position
        OFFSET 0
    ) AS event
),
seen AS MATERIALIZED (
    SELECT coalesce(range_agg(int8range(position, position + 1)), '{}') AS positions
    FROM visible
),
owed AS MATERIALIZED (
    SELECT visible.new_shard AS shard, range_agg(int8range(visible.position, visible.position + 1)) AS positions
    FROM visible
    JOIN found ON found.old AND found.shard = visible.old_shard
    WHERE found.pending @> visible.position
    GROUP BY visible.new_shard
),
ended AS (
    DELETE FROM {schema}.offsets
    WHERE subscription = $1
        AND until IS NOT NULL
        AND EXISTS (SELECT FROM left_over)
)
UPDATE {schema}.offsets AS stored
SET pending = left_over.any_shard - seen.positions
        + coalesce((SELECT owed.positions FROM owed WHERE owed.shard = stored.shard), '{}'),
    holes = left_over.any_shard - left_over.known - seen.positions,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM left_over
CROSS JOIN seen
WHERE stored.subscription = $1
    AND stored.until IS NULL
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
    stored.until, stored.pending::text AS pending, stored.epoch, stored.owner, worker.name AS owner_name,
    stored.completed_at,
    (
        SELECT count(*) FROM {schema}.redeliveries AS waiting WHERE waiting.subscription = subscription.name
    ) AS redeliveries,
    (
        SELECT count(*) FROM {schema}.dead_letters AS letter WHERE letter.subscription = subscription.name
    ) AS dead_letters,
    (
        -- Two shards may have recorded parts of each other's ranges at the same time.
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

-- name: find_places
-- The highest places that offsets stand at, to be held against the sequence, and whether that was found set back.
SELECT
    coalesce((SELECT set_back FROM {schema}.incarnation), false) AS set_back,
    coalesce((SELECT max(position) FROM {schema}.offsets), 0) AS offset_position,
    coalesce((SELECT max(position) FROM {schema}.events), 0) AS event_position,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head;
