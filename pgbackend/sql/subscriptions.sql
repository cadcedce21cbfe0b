-- Subscriptions: their definition, and the offset rows that come and go with it.

-- name: find_subscription
SELECT name, ordering, shards, start_at, end_position, end_at
FROM {schema}.subscriptions
WHERE name = $1;

-- name: create_subscription
-- The definition and its offsets at once; nothing when somebody else was first.
WITH created AS (
    INSERT INTO {schema}.subscriptions (name, ordering, shards, start_at, end_position, end_at)
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (name) DO NOTHING
    RETURNING name, shards
)
INSERT INTO {schema}.offsets (subscription, shard, shards, position, pending, epoch)
SELECT created.name, shard, created.shards, $7, $8::text::int8multirange,
    nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM created
CROSS JOIN LATERAL generate_series(0, created.shards - 1) AS shard
RETURNING shard;

-- name: move_subscription
-- Every shard to a new place, under new epochs: whoever runs them finds that they are not theirs any more. What was
-- waiting to be tried again belongs to the old place; dead letters stay. Rows are locked in key order.
WITH locked AS (
    SELECT subscription, shards, shard
    FROM {schema}.offsets
    WHERE subscription = $1
    ORDER BY subscription, shards, shard
    FOR UPDATE
),
dropped AS (
    DELETE FROM {schema}.redeliveries
    WHERE subscription = $1
),
bounded AS (
    UPDATE {schema}.subscriptions
    SET start_at = $4
    WHERE name = $1
)
UPDATE {schema}.offsets AS stored
SET position = $2,
    pending = $3::text::int8multirange,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    owner = NULL,
    completed_at = NULL
FROM locked
WHERE stored.subscription = locked.subscription
    AND stored.shards = locked.shards
    AND stored.shard = locked.shard
RETURNING stored.shard;

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
-- One row a shard, with what its subscription owes.
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
    ) AS last_error
FROM {schema}.subscriptions AS subscription
JOIN {schema}.offsets AS stored ON stored.subscription = subscription.name
LEFT JOIN {schema}.workers AS worker ON worker.id = stored.owner
ORDER BY subscription.name, stored.shards, stored.shard;

-- name: find_places
-- The highest places that offsets stand at, to be held against the sequence.
SELECT
    coalesce((SELECT max(position) FROM {schema}.offsets), 0) AS offset_position,
    coalesce((SELECT max(position) FROM {schema}.events), 0) AS event_position,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head,
    pg_is_in_recovery() AS in_recovery;
