-- Leases. A worker's row in `workers` stands for its leases on all its shards. All times are PostgreSQL's.

-- name: renew
-- Register or renew this worker, and list the epochs that it still holds. The backend that runs this is the worker's
-- sign of life: when it is gone, others need not wait for `lease_timeout`. A pooler's backend is no such sign. It is
-- recognised by its pid, which is not the one that the connection was given ($4).
WITH renewed AS (
    INSERT INTO {schema}.workers AS worker (id, name, backend_pid, backend_start, lease_timeout)
    SELECT $1, $2, activity.pid, activity.backend_start, make_interval(secs => $3::float8)
    FROM (SELECT pg_backend_pid() AS pid) AS own
    LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = own.pid AND own.pid = $4
    ON CONFLICT (id) DO UPDATE
    SET backend_pid = excluded.backend_pid,
        backend_start = excluded.backend_start,
        heartbeat_at = clock_timestamp()
)
SELECT coalesce(array_agg(epoch), '{}') AS epochs
FROM {schema}.offsets
WHERE owner = $1;

-- name: find_worker
SELECT EXISTS (SELECT FROM {schema}.workers WHERE id = $1);

-- name: announce
-- The subscriptions that this worker runs, and whether it asks for more shards. A request expires unless it is repeated.
UPDATE {schema}.workers
SET subscriptions = $2::text[],
    asked_at = CASE WHEN $3::boolean THEN clock_timestamp() END
WHERE id = $1;

-- name: survey_workers
-- The living workers, what each runs, and whether it has asked for more within the last three rounds.
SELECT id, subscriptions, coalesce(asked_at > clock_timestamp() - interval '3 s', false) AS asks
FROM {schema}.living_workers;

-- name: survey_shards
-- Every shard with its owner. It is free without one, or with a dead one. While a subscription's number of shards
-- changes it has old shards, which end at `until`, and new ones, which wait for them.
SELECT
    stored.subscription, stored.shards, stored.shard, stored.epoch, stored.owner,
    worker.id IS NULL AS free,
    coalesce(subscription.draining_until > clock_timestamp(), false) AS draining,
    stored.until IS NOT NULL AS old,
    coalesce(stored.position >= least(stored.until, subscription.end_position - 1), false) AS finished,
    subscription.paused_at, subscription.paused_by, subscription.pause_reason, subscription.resumed_at
FROM {schema}.offsets AS stored
JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner;

-- name: claim
-- Own those of the given shards that are free, each under a new epoch. One statement in autocommit: no client can stop
-- between the lock and the commit.
-- Free rows are found first and locked by epoch afterwards. A row that another worker claims in between has a new epoch
-- and drops out. The lock's own recheck would let it pass, because it does not join the new owner's row in `workers`.
-- The same holds for the subscription's terms: they belong to the epoch that was found, since every change of them
-- gives a new one. A pause gives none: it is as old as this statement's snapshot.
WITH given AS (
    SELECT $1::text[] AS subscriptions, $2::int[] AS counts, $3::int[] AS shards, $4::uuid AS worker,
        $5::text AS incarnation
),
free AS MATERIALIZED (
    SELECT stored.subscription, stored.shards, stored.shard, stored.epoch,
        subscription.ordering, subscription.start_position, subscription.start_at, subscription.end_position,
        subscription.end_at, subscription.paused_at, subscription.paused_by, subscription.pause_reason,
        subscription.resumed_at
    FROM given
    CROSS JOIN LATERAL unnest(given.subscriptions, given.counts, given.shards) AS wanted (subscription, shards, shard)
    JOIN {schema}.offsets AS stored
        ON stored.subscription = wanted.subscription
        AND stored.shards = wanted.shards
        AND stored.shard = wanted.shard
    JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
    WHERE worker.id IS NULL
        AND (subscription.draining_until IS NULL OR subscription.draining_until <= clock_timestamp())
        AND CASE
            WHEN stored.until IS NOT NULL THEN stored.position < least(stored.until, subscription.end_position - 1)
            -- New shards wait for old ones. Looked up once: for each of 4,000 shards it took two seconds.
            ELSE stored.subscription <> ALL (
                ARRAY (SELECT DISTINCT old.subscription FROM {schema}.offsets AS old WHERE old.until IS NOT NULL)
            )
        END
),
locked AS (
    SELECT stored.subscription, stored.shards, stored.shard,
        free.ordering, free.start_position, free.start_at, free.end_position, free.end_at, free.paused_at,
        free.paused_by, free.pause_reason, free.resumed_at
    FROM {schema}.offsets AS stored
    JOIN free USING (subscription, shards, shard, epoch)
    ORDER BY stored.subscription, stored.shards, stored.shard
    FOR UPDATE OF stored SKIP LOCKED
)
UPDATE {schema}.offsets AS stored
SET owner = given.worker,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    -- A worker that releases a shard leaves no owner. If there is one, it died with the shard.
    crashes = stored.crashes + CASE WHEN stored.owner IS NULL THEN 0 ELSE 1 END
FROM locked
CROSS JOIN given
WHERE stored.subscription = locked.subscription
    AND stored.shards = locked.shards
    AND stored.shard = locked.shard
    AND (SELECT id FROM {schema}.life) = given.incarnation
RETURNING stored.subscription, stored.shard, stored.shards, stored.until, stored.position,
    stored.pending::text AS pending, stored.holes::text AS holes, stored.epoch, stored.ctid, stored.completed_at,
    stored.crashes,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head,
    locked.ordering, locked.start_position, locked.start_at, locked.end_position, locked.end_at, locked.paused_at,
    locked.paused_by, locked.pause_reason, locked.resumed_at;

-- name: release
UPDATE {schema}.offsets
SET owner = NULL
WHERE owner = $1
    AND epoch = ANY ($2::bigint[]);

-- name: leave
-- Release what this worker still has, too: it may have claimed a shard just when it was stopped, and did not crash.
WITH released AS (
    UPDATE {schema}.offsets
    SET owner = NULL
    WHERE owner = $1
)
DELETE FROM {schema}.workers
WHERE id = $1;

-- name: delete_dead_workers
-- Long after they died. A worker that was only frozen registers anew.
DELETE FROM {schema}.workers
WHERE heartbeat_at < clock_timestamp() - greatest(lease_timeout * 2, interval '5 minutes');
