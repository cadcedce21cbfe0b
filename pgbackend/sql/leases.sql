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

-- name: claim
-- Take every free shard of these subscriptions, each under a new epoch. Free: nobody's, or a dead worker's. Dead: no
-- heartbeat for its own `lease_timeout`, or the backend it registered is gone; a start time that this role may not see
-- proves nothing. One statement in autocommit: no client can stop between the lock and the commit.
-- Found first and locked by epoch after: a row that another worker claims in between has a new epoch and drops out. The
-- lock's recheck of the whole condition let it pass, because the new owner's row in `workers` is not joined anew.
-- For the same reason the subscription's terms are those of the epoch that was found: who changes them gives a new one.
WITH free AS MATERIALIZED (
    SELECT stored.subscription, stored.shards, stored.shard, stored.epoch,
        subscription.ordering, subscription.start_position, subscription.start_at, subscription.end_position,
        subscription.end_at
    FROM {schema}.offsets AS stored
    JOIN {schema}.subscriptions AS subscription ON subscription.name = stored.subscription
    LEFT JOIN {schema}.workers AS worker ON worker.id = stored.owner
    WHERE stored.subscription = ANY ($1::text[])
        AND (
            stored.owner IS NULL
            OR worker.id IS NULL
            OR worker.heartbeat_at < clock_timestamp() - worker.lease_timeout
            OR worker.backend_pid IS NOT NULL AND NOT EXISTS (
                SELECT
                FROM pg_catalog.pg_stat_activity AS activity
                WHERE activity.pid = worker.backend_pid
                    AND (activity.backend_start = worker.backend_start OR activity.backend_start IS NULL)
            )
        )
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
SET owner = $2,
    epoch = nextval(to_regclass(quote_ident({schema_literal}) || '.epochs'))
FROM locked
WHERE stored.subscription = locked.subscription
    AND stored.shards = locked.shards
    AND stored.shard = locked.shard
    AND (SELECT id FROM {schema}.incarnation) = $3
RETURNING stored.subscription, stored.shard, stored.shards, stored.until, stored.position,
    stored.pending::text AS pending, stored.epoch, stored.ctid, stored.completed_at,
    locked.ordering, locked.start_position, locked.start_at, locked.end_position, locked.end_at;

-- name: held
-- Which of this worker's leases are still its own.
SELECT epoch
FROM {schema}.offsets
WHERE owner = $1;

-- name: release
-- Give shards up, so that the next round of any worker may claim them.
UPDATE {schema}.offsets
SET owner = NULL
WHERE owner = $1
    AND epoch = ANY ($2::bigint[]);

-- name: leave
DELETE FROM {schema}.workers
WHERE id = $1
    OR heartbeat_at < clock_timestamp() - greatest(lease_timeout, interval '1 day');
