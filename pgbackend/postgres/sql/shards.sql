-- The shards of one subscription, as calls that change it read and write them.

-- name: read_shards
-- One row a shard, each with the subscription's definition. `version` and `shard_version` change with every update.
SELECT
    subscription.name, subscription.ordering, subscription.shards, subscription.start_position, subscription.start_at,
    subscription.end_position, subscription.end_at, subscription.start_bound, subscription.xmin::text AS version,
    stored.shards AS modulus, stored.shard, stored.until, stored.position, stored.pending::text AS pending,
    stored.holes::text AS holes, stored.epoch, stored.xmin::text AS shard_version,
    worker.id IS NULL AS free
FROM {schema}.subscriptions AS subscription
JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
WHERE subscription.name = $1
ORDER BY stored.shards, stored.shard;

-- name: find_waiting
SELECT modulus.shards AS modulus, waiting.key_hash % modulus.shards AS shard,
    range_agg(int8range(waiting.position, waiting.position + 1))::text AS positions
FROM (SELECT DISTINCT shards FROM {schema}.offsets WHERE subscription = $1) AS modulus
JOIN {schema}.redeliveries AS waiting ON waiting.subscription = $1
GROUP BY modulus.shards, waiting.key_hash % modulus.shards;

-- name: find_events
-- Ranges are looked up one by one, or all of the log is read: 800 ranges in a log of 300,000 events took two minutes.
SELECT event.key_hash % $2::int AS old_shard, event.key_hash % $3::int AS new_shard,
    range_agg(int8range(event.position, event.position + 1))::text AS positions
FROM unnest($1::text::int8multirange) AS wanted (range)
CROSS JOIN LATERAL (
    SELECT held.position, held.key_hash
    FROM {schema}.events AS held
    WHERE held.position >= lower(wanted.range)
        AND held.position < upper(wanted.range)
    ORDER BY held.position
    OFFSET 0
) AS event
GROUP BY event.key_hash % $2::int, event.key_hash % $3::int;

-- name: swap_shards
-- Compare and swap: see pgbackend/subscriptions/shards.py. Offsets are locked before the subscription, as by a commit.
-- `seen` is the statement's snapshot, `locked` the rows as they are once they are locked. They differ if another
-- transaction committed in between, and then the snapshot of `redeliveries` is old as well.
WITH given AS (
    SELECT
        $1::text AS name, $2::text AS version, $3::text AS incarnation,
        $4::text AS ordering, $5::int AS shards, $6::bigint AS start_position, $7::timestamptz AS start_at,
        $8::bigint AS end_position, $9::timestamptz AS end_at, $10::text AS start_bound,
        $11::int AS removed, $12::bigint AS drops_redeliveries_above, $13::boolean AS ends_drain
),
expected AS (
    SELECT shards, shard, epoch, version
    FROM unnest($14::int[], $15::int[], $16::bigint[], $17::text[]) AS item (shards, shard, epoch, version)
),
written AS (
    SELECT shards, shard, until, position, pending, holes
    FROM unnest($18::int[], $19::int[], $20::bigint[], $21::bigint[], $22::text[], $23::text[])
        AS item (shards, shard, until, position, pending, holes)
),
seen AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.epoch, stored.xmin::text AS version
    FROM {schema}.offsets AS stored
    WHERE stored.subscription = (SELECT name FROM given)
),
locked AS MATERIALIZED (
    SELECT stored.shards, stored.shard, stored.xmin::text AS version
    FROM {schema}.offsets AS stored
    WHERE stored.subscription = (SELECT name FROM given)
    ORDER BY stored.subscription, stored.shards, stored.shard
    FOR UPDATE
),
held AS MATERIALIZED (
    SELECT subscription.name
    FROM {schema}.subscriptions AS subscription
    WHERE subscription.name = (SELECT name FROM given)
        AND subscription.xmin = (SELECT version::xid FROM given)
        AND (SELECT id FROM {schema}.life) = (SELECT incarnation FROM given)
        AND (SELECT count(*) FROM locked) = (SELECT count(*) FROM expected)
    FOR NO KEY UPDATE
),
unchanged AS MATERIALIZED (
    SELECT given.*
    FROM held
    CROSS JOIN given
    WHERE NOT EXISTS (
        SELECT
        FROM expected
        LEFT JOIN seen USING (shards, shard, epoch)
        LEFT JOIN locked ON locked.shards = seen.shards AND locked.shard = seen.shard AND locked.version = seen.version
        WHERE locked.version IS NULL
            OR locked.version <> expected.version
    )
),
redefined AS (
    UPDATE {schema}.subscriptions AS subscription
    SET ordering = unchanged.ordering,
        shards = unchanged.shards,
        start_position = unchanged.start_position,
        start_at = unchanged.start_at,
        end_position = unchanged.end_position,
        end_at = unchanged.end_at,
        start_bound = unchanged.start_bound,
        draining_until = CASE WHEN NOT unchanged.ends_drain THEN subscription.draining_until END
    FROM unchanged
    WHERE subscription.name = unchanged.name
),
removed AS (
    DELETE FROM {schema}.offsets AS stored
    USING unchanged
    WHERE stored.subscription = unchanged.name
        AND stored.shards = unchanged.removed
),
dropped AS (
    DELETE FROM {schema}.redeliveries AS waiting
    USING unchanged
    WHERE waiting.subscription = unchanged.name
        AND waiting.position > unchanged.drops_redeliveries_above
)
INSERT INTO {schema}.offsets (subscription, shards, shard, until, position, pending, holes, epoch)
SELECT unchanged.name, written.shards, written.shard, written.until, written.position,
    written.pending::int8multirange, written.holes::int8multirange,
    nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM unchanged
CROSS JOIN written
ON CONFLICT (subscription, shards, shard) DO UPDATE
SET until = excluded.until,
    position = excluded.position,
    pending = excluded.pending,
    holes = excluded.holes,
    epoch = excluded.epoch,
    owner = NULL,
    completed_at = NULL
RETURNING shard;

-- name: set_start_bound
UPDATE {schema}.subscriptions
SET start_bound = $3
WHERE name = $1
    AND xmin = $2::text::xid;

-- name: request_drain
-- For $2 seconds, workers let what is at work end, release the subscription's shards, and claim none of them.
UPDATE {schema}.subscriptions
SET draining_until = clock_timestamp() + make_interval(secs => $2::float8)
WHERE name = $1;

-- name: renew_drain
-- The same, unless it is draining or a worker has refused. Both are returned: whether it was over, whether refused.
WITH renewed AS (
    UPDATE {schema}.subscriptions
    SET draining_until = clock_timestamp() + make_interval(secs => $2::float8)
    WHERE name = $1
        AND (draining_until IS NULL OR draining_until <= clock_timestamp())
        AND draining_until IS DISTINCT FROM '-infinity'
    RETURNING name
)
SELECT
    EXISTS (SELECT FROM renewed) AS renewed,
    EXISTS (
        SELECT FROM {schema}.subscriptions WHERE name = $1 AND draining_until = '-infinity'
    ) AS refused;

-- name: refuse_drain
-- The calls that wait for the drain find that a worker does not release its shards in time.
UPDATE {schema}.subscriptions
SET draining_until = '-infinity'
WHERE name = $1
    AND draining_until > clock_timestamp();

-- name: end_drain
UPDATE {schema}.subscriptions
SET draining_until = NULL
WHERE name = $1;

-- name: find_owners
-- The names of the living workers that own a shard of this subscription.
SELECT DISTINCT worker.name
FROM {schema}.offsets AS stored
JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
WHERE stored.subscription = $1
ORDER BY worker.name;
