-- Subscriptions: created with their offsets, found, deleted. shards.sql changes them.

-- name: find_subscription
SELECT name, ordering, shards, start_position, start_at, end_position, end_at, start_bound
FROM {schema}.subscriptions
WHERE name = $1;

-- name: create_subscription
-- The definition and its offsets at once; nothing if it exists. Nor in another incarnation than the one in which the
-- place was found: after a failover the log may be shorter, and new events would get positions at or below the offset.
WITH given AS (
    SELECT
        $1::text AS name, $2::text AS ordering, $3::int AS shards, $4::bigint AS end_position,
        $5::timestamptz AS end_at, $6::text AS start_bound, $7::bigint AS start_position, $8::timestamptz AS start_at,
        $9::bigint AS position, $10::text::int8multirange AS pending, $11::text AS incarnation
),
created AS (
    INSERT INTO {schema}.subscriptions
        (name, ordering, shards, end_position, end_at, start_bound, start_position, start_at)
    SELECT name, ordering, shards, end_position, end_at, start_bound, start_position, start_at
    FROM given
    WHERE (SELECT id FROM {schema}.life) = incarnation
    ON CONFLICT (name) DO NOTHING
    RETURNING name, shards
)
INSERT INTO {schema}.offsets (subscription, shard, shards, position, pending, holes, epoch)
SELECT created.name, shard, created.shards, given.position, given.pending, given.pending,
    nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM created
CROSS JOIN given
CROSS JOIN LATERAL generate_series(0, created.shards - 1) AS shard
RETURNING shard;

-- name: delete_subscription
-- With everything that refers to it. The offsets are locked first, as by a commit that schedules redeliveries: in the
-- other order each would wait for the other.
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
