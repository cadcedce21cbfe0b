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
-- By a function of the log, for roles that may not read events.
SELECT event_hash % $2::int AS old_shard, event_hash % $3::int AS new_shard,
    range_agg(int8range(event_position, event_position + 1))::text AS positions
FROM {schema}.key_hashes($1::text::int8multirange)
GROUP BY event_hash % $2::int, event_hash % $3::int;

-- name: count_events
-- The events from position $1 on and before $2: those recorded after the date $3, if there is one, and the others.
SELECT
    count(*) FILTER (WHERE $3::timestamptz IS NULL OR recorded_at > $3) AS later,
    count(*) FILTER (WHERE recorded_at <= $3) AS earlier
FROM {schema}.events
WHERE position >= $1::bigint
    AND position < $2::bigint;

-- name: count_by_key
-- Those of the events in $2 that subscription $1 has settled and that come after a seek to $3 or to the date $4, and
-- those that it has not settled and that do not come. `coming` are all that come. While the number of shards changes, an
-- event has two shards.
SELECT
    count(*) FILTER (WHERE comes) AS coming,
    count(*) FILTER (WHERE settled AND comes) AS again,
    count(*) FILTER (WHERE NOT settled AND NOT comes) AS skipped
FROM (
    SELECT found.event_position,
        bool_and(found.event_position <= stored.position AND NOT stored.pending @> found.event_position) AS settled
    FROM {schema}.key_hashes($2::text::int8multirange) AS found
    JOIN {schema}.offsets AS stored
        ON stored.subscription = $1
        AND stored.shard = found.event_hash % stored.shards
        AND (stored.until IS NULL OR found.event_position <= stored.until)
    GROUP BY found.event_position
) AS decided
JOIN LATERAL (
    SELECT event.position > $3::bigint AND ($4::timestamptz IS NULL OR event.recorded_at > $4) AS comes
    FROM {schema}.events AS event
    WHERE event.position = decided.event_position
) AS placed ON true;

-- name: count_waiting
-- The failed events of subscription $1 that do not come after a seek to $2 or to the date $3.
SELECT count(*)
FROM {schema}.redeliveries AS waiting
WHERE waiting.subscription = $1
    AND (
        waiting.position <= $2::bigint
        OR EXISTS (
            SELECT
            FROM {schema}.events AS event
            WHERE event.position = waiting.position
                AND event.recorded_at <= $3::timestamptz
        )
    );

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

-- name: find_standing
-- For position $2: whether its event is redacted, the hash of its key (null if the log has no such event), and whether it
-- waits to be tried again in subscription $1.
SELECT
    EXISTS (SELECT FROM {schema}.redactions WHERE position = $2::bigint) AS is_redacted,
    coalesce(
        (SELECT event_hash FROM {schema}.key_hashes(int8multirange(int8range($2, $2, '[]')))),
        (
            SELECT waiting.key_hash
            FROM {schema}.redeliveries AS waiting
            JOIN {schema}.kept_events AS copy ON copy.position = waiting.position
            WHERE waiting.subscription = $1::text
                AND waiting.position = $2
        )
    ) AS key_hash,
    EXISTS (SELECT FROM {schema}.redeliveries WHERE subscription = $1 AND position = $2) AS is_waiting;

-- name: skip_event
-- Compare and swap of one shard, which gets a new epoch and no owner, together with the dead letter of the event that it
-- owes no more. The version is compared once the row is locked, so nothing was committed since it was read.
WITH given AS (
    SELECT
        $1::text AS name, $2::int AS shards, $3::int AS shard, $4::bigint AS epoch, $5::text AS version,
        $6::text AS incarnation, $7::bigint AS skipped, $8::bigint AS position, $9::text AS pending, $10::text AS holes
),
held AS MATERIALIZED (
    SELECT stored.subscription, stored.shards, stored.shard
    FROM {schema}.offsets AS stored
    WHERE stored.subscription = (SELECT name FROM given)
        AND stored.shards = (SELECT shards FROM given)
        AND stored.shard = (SELECT shard FROM given)
        AND stored.epoch = (SELECT epoch FROM given)
        AND stored.xmin = (SELECT version::xid FROM given)
        AND (SELECT id FROM {schema}.life) = (SELECT incarnation FROM given)
    FOR UPDATE
),
buried AS MATERIALIZED (
    SELECT {schema}.bury_skipped(held.subscription, (SELECT skipped FROM given)) AS letters
    FROM held
)
UPDATE {schema}.offsets AS stored
SET position = given.position,
    pending = given.pending::int8multirange,
    holes = given.holes::int8multirange,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    owner = NULL
FROM given
CROSS JOIN held
CROSS JOIN buried
WHERE buried.letters > 0
    AND stored.subscription = held.subscription
    AND stored.shards = held.shards
    AND stored.shard = held.shard
RETURNING stored.shard;

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
