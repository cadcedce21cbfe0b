-- Who runs which shard. A worker's lease on all its shards is its row in `workers`; all times are PostgreSQL's.

-- name: renew
-- Register or renew this worker, and list the epochs that it still holds. The connection that runs this is the worker's
-- sign of life: when its backend is gone, so is the worker, and others need not wait for `lease_timeout`. Unless the
-- backend is not the one that this connection was promised ($4): then it is a pooler's, and lives or dies without us.
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
-- What this worker runs, and whether it has room for more: that is forgotten after a moment if it is not said again.
UPDATE {schema}.workers
SET subscriptions = $2::text[],
    asked_at = CASE WHEN $3::boolean THEN clock_timestamp() END
WHERE id = $1;

-- name: survey_workers
-- Who is alive, what it runs, and whether it has asked for more within the last three rounds.
SELECT id, subscriptions, coalesce(asked_at > clock_timestamp() - interval '3 s', false) AS asks
FROM {schema}.living_workers;

-- name: survey_shards
-- Every shard, with who has it. Free: nobody's, or a dead worker's. While a subscription's number of shards changes it
-- has the old ones, which end at `until`, and the new ones, which wait for them.
SELECT
    stored.subscription, stored.shards, stored.shard, stored.epoch, stored.owner,
    worker.id IS NULL AS free,
    coalesce(subscription.resting_until > clock_timestamp(), false) AS resting,
    stored.until IS NOT NULL AS old,
    coalesce(stored.position >= least(stored.until, subscription.end_position - 1), false) AS over
FROM {schema}.offsets AS stored
JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner;

-- name: claim
-- Take these shards, as far as they are free, each under a new epoch. One statement in autocommit: no client can stop
-- between the lock and the commit.
-- Found first and locked by epoch after: a row that another worker claims in between has a new epoch and drops out. The
-- lock's recheck of the whole condition let it pass, because the new owner's row in `workers` is not joined anew.
-- For the same reason the subscription's terms are those of the epoch that was found: who changes them gives a new one.
WITH free AS MATERIALIZED (
    SELECT stored.subscription, stored.shards, stored.shard, stored.epoch,
        subscription.ordering, subscription.start_position, subscription.start_at, subscription.end_position,
        subscription.end_at
    FROM unnest($1::text[], $2::int[], $3::int[]) AS wanted (subscription, shards, shard)
    JOIN {schema}.offsets AS stored USING (subscription, shards, shard)
    JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner
    WHERE worker.id IS NULL
        AND (subscription.resting_until IS NULL OR subscription.resting_until <= clock_timestamp())
        AND CASE
            WHEN stored.until IS NOT NULL THEN stored.position < least(stored.until, subscription.end_position - 1)
            -- Looked up once: for each of 4,000 shards of one subscription it took two seconds.
            ELSE stored.subscription <> ALL (
                ARRAY (SELECT DISTINCT old.subscription FROM {schema}.offsets AS old WHERE old.until IS NOT NULL)
            )
        END
),
locked AS (
    SELECT stored.subscription, stored.shards, stored.shard,
        free.ordering, free.start_position, free.start_at, free.end_position, free.end_at
    FROM {schema}.offsets AS stored
    JOIN free USING (subscription, shards, shard, epoch)
    ORDER BY stored.subscription, stored.shards, stored.shard
    FOR UPDATE OF stored SKIP LOCKED
)
UPDATE {schema}.offsets AS stored
SET owner = $4,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs')),
    -- Who gives a shard up is no longer its owner: one that still has an owner was left by a dead one.
    crashes = stored.crashes + CASE WHEN stored.owner IS NULL THEN 0 ELSE 1 END
FROM locked
WHERE stored.subscription = locked.subscription
    AND stored.shards = locked.shards
    AND stored.shard = locked.shard
    AND (SELECT id FROM {schema}.life) = $5
RETURNING stored.subscription, stored.shard, stored.shards, stored.until, stored.position,
    stored.pending::text AS pending, stored.holes::text AS holes, stored.epoch, stored.ctid, stored.completed_at,
    stored.crashes,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head,
    locked.ordering, locked.start_position, locked.start_at, locked.end_position, locked.end_at;

-- name: release
-- Give shards up, so that the next round of any worker may claim them.
UPDATE {schema}.offsets
SET owner = NULL
WHERE owner = $1
    AND epoch = ANY ($2::bigint[]);

-- name: leave
-- With what it may still have, claimed in the moment in which it was told to end: it has not died with that.
WITH released AS (
    UPDATE {schema}.offsets
    SET owner = NULL
    WHERE owner = $1
)
DELETE FROM {schema}.workers
WHERE id = $1;

-- name: forget_dead
-- Long after they died: one that was only frozen registers anew.
DELETE FROM {schema}.workers
WHERE heartbeat_at < clock_timestamp() - greatest(lease_timeout * 2, interval '5 minutes');
