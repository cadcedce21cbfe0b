"""Views that say how the log and its subscriptions stand: for `status()`, psql, dashboards and autoscalers.

Revision ID: r0007
Revises: r0006

    log_status      one row: head, rate, segments, bytes on disk
    lag             a row for each subscription, made of `shard_lag`
    shard_lag       a row for each shard
    holes           open positions, with the `appenders` that may fill them
    appenders       open transactions that have appended
    worker_status   a row for each worker, living or not
    rates           a row for each of the last 60 minutes

A view reads its tables with its owner's rights, and calls functions with its reader's: so the only function of the log
that a view calls is one that all readers of the status may call. No view scans the log: each reads events by position,
a bounded number of them. docs/status.md explains each column.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0007"
down_revision = "r0006"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (APPENDERS, HOLES, SHARD_LAG, LAG, WORKER_STATUS, _with_search(LOG_STATUS), _with_search(RATES)),
        events="{schema}.events",
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(op, [f"DROP VIEW {{schema}}.{view}" for view in VIEWS])


VIEWS = ("rates", "log_status", "worker_status", "lag", "shard_lag", "holes", "appenders")

# The transactions that hold positions open, with what the reader or the log's owner may see of them.
APPENDERS = """
    CREATE VIEW {schema}.appenders AS
    SELECT
        held.virtualtransaction AS virtual_transaction,
        held.pid,
        prepared.gid,
        activity.application_name AS application,
        coalesce(began.xact_start, prepared.prepared) AS began_at,
        extract(epoch FROM clock_timestamp() - coalesce(began.xact_start, prepared.prepared))::float8 AS age_seconds
    FROM pg_catalog.pg_locks AS held
    LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = held.pid
    CROSS JOIN LATERAL (
        SELECT coalesce(activity.xact_start, {schema}.appender_began(held.pid)) AS xact_start
    ) AS began
    -- Found by the lock on its own xid: a prepared transaction has its old name until a restart makes it "-1/<xid>".
    LEFT JOIN pg_catalog.pg_prepared_xacts AS prepared
        ON held.pid IS NULL
        AND EXISTS (
            SELECT
            FROM pg_catalog.pg_locks AS own
            WHERE own.locktype = 'transactionid'
                AND own.pid IS NULL
                AND own.virtualtransaction = held.virtualtransaction
                AND own.transactionid = prepared.transaction
        )
    WHERE held.locktype = 'relation'
        AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
        AND held.relation = {events}::regclass
        AND held.mode = 'RowExclusiveLock'
        AND held.granted"""

# Positions at the ends of segments that were cut: no event ever had one.
_UNUSED = """unused AS MATERIALIZED (
        SELECT coalesce(range_agg(int8range(last_position + 1, upper_bound)), '{}') AS positions
        FROM {schema}.segments
        WHERE last_position + 1 < upper_bound
    )"""

# Positions without an event: those that offsets have as open holes, and, while an appender is open, those among the
# last 10,000 events. An offset's holes may contain events that were not read yet, so events are taken out of them, up
# to 10,000 of each hole.
# PostgreSQL does not say which transaction has drawn a position. An appender that began after a later event was
# recorded has not: both times come from one clock, and a second covers what lies between drawing a position and
# recording its event. A hole among the last events that no appender may fill is dead. One of an offset is shown without
# an appender.
HOLES = """
    CREATE VIEW {schema}.holes AS
    WITH gone AS MATERIALIZED (
        SELECT coalesce(
            range_agg(int8range(CASE WHEN dropped_at IS NULL THEN last_position + 1 ELSE lower_bound END, upper_bound)),
            '{}'
        ) AS positions
        FROM {schema}.segments
    ),
    opened AS MATERIALIZED (
        SELECT virtual_transaction, pid, gid, application, began_at, age_seconds
        FROM {schema}.appenders
    ),
    head AS MATERIALIZED (
        SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS position
        FROM {schema}.events_position_seq
    ),
    recent AS MATERIALIZED (
        SELECT int8multirange(int8range(
            greatest(
                1,
                coalesce(min(last.position), head.position) - CASE WHEN count(*) < 10000 THEN 10000 ELSE 0 END
            ),
            head.position + 1
        )) AS positions
        FROM head
        LEFT JOIN (
            SELECT event.position
            FROM {schema}.events AS event
            WHERE EXISTS (SELECT FROM opened)
            ORDER BY event.position DESC
            LIMIT 10000
        ) AS last ON true
        WHERE EXISTS (SELECT FROM opened)
        GROUP BY head.position
    ),
    passed AS MATERIALIZED (
        SELECT stored.subscription, stored.holes AS positions
        FROM {schema}.offsets AS stored
        WHERE stored.holes <> '{}'
            AND stored.completed_at IS NULL
    ),
    searched AS MATERIALIZED (
        SELECT unnest(recent.positions - gone.positions) AS range
        FROM recent
        CROSS JOIN gone
        UNION ALL
        SELECT unnest(
            coalesce(range_agg(part.range), '{}')
            - coalesce((SELECT recent.positions FROM recent), '{}')
            - (SELECT gone.positions FROM gone)
        )
        FROM (SELECT unnest(passed.positions) AS range FROM passed) AS part
    ),
    missing AS MATERIALIZED (
        SELECT gap.lower, gap.upper
        FROM searched
        CROSS JOIN LATERAL (
            WITH taken AS MATERIALIZED (
                SELECT event.position
                FROM {schema}.events AS event
                WHERE event.position >= lower(searched.range)
                    AND event.position < upper(searched.range)
                ORDER BY event.position
                LIMIT 10001
            )
            SELECT
                coalesce(lag(part.position) OVER (ORDER BY part.position) + 1, lower(searched.range)) AS lower,
                part.position AS upper
            FROM (
                SELECT taken.position
                FROM taken
                UNION ALL
                SELECT upper(searched.range)
                WHERE (SELECT count(*) FROM taken) <= 10000
            ) AS part
        ) AS gap
        WHERE gap.lower < gap.upper
    )
    SELECT
        missing.lower AS first_position,
        missing.upper - 1 AS last_position,
        waiting.subscriptions,
        candidate.pid,
        candidate.gid,
        candidate.virtual_transaction,
        candidate.application,
        candidate.age_seconds
    FROM missing
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(DISTINCT passed.subscription ORDER BY passed.subscription), '{}') AS subscriptions
        FROM passed
        WHERE passed.positions && int8range(missing.lower, missing.upper)
    ) AS waiting
    LEFT JOIN LATERAL (
        SELECT event.recorded_at
        FROM {schema}.events AS event
        WHERE event.position >= missing.upper
        ORDER BY event.position
        LIMIT 1
    ) AS later ON true
    LEFT JOIN opened AS candidate
        ON later.recorded_at IS NULL
        OR candidate.began_at IS NULL
        OR candidate.began_at <= later.recorded_at + interval '1 second'
    WHERE candidate.virtual_transaction IS NOT NULL
        OR waiting.subscriptions <> '{}'"""

# One row for each shard, with its debt. `lag_seconds` is the age of the oldest event that is above the offset, or
# pending, or to be tried again. Each of the three is the first hit of an index scan. Pending ranges are tried in their
# order until one holds an event. The failed event is looked up without a join: PostgreSQL 15 made the join a merge,
# which reads the log from its beginning. `lag_events` counts the positions up to the head that are above the offset or
# pending, except those that no event has any more or ever had.
# statement_timestamp(), because a column with the volatile clock_timestamp() is computed even where nobody asks for it.
SHARD_LAG = """
    CREATE VIEW {schema}.shard_lag AS
    WITH {unused},
    kept AS MATERIALIZED (
        SELECT coalesce(range_agg(int8range(position, position, '[]')), '{}') AS positions
        FROM {schema}.kept_events
    ),
    dropped AS MATERIALIZED (
        SELECT coalesce(range_agg(int8range(lower_bound, last_position + 1)), '{}')
            - (SELECT kept.positions FROM kept) AS positions
        FROM {schema}.segments
        WHERE dropped_at IS NOT NULL
            AND lower_bound <= last_position
    ),
    head AS MATERIALIZED (
        SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS position
        FROM {schema}.events_position_seq
    )
    SELECT
        stored.subscription,
        stored.shard,
        stored.shards,
        stored.until,
        stored.position,
        (
            SELECT coalesce(sum(upper(range) - lower(range)), 0)::bigint
            FROM unnest(
                stored.pending
                + int8multirange(int8range(stored.position + 1, greatest(stored.position, head.position) + 1))
                - unused.positions - dropped.positions
            ) AS range
        ) AS lag_events,
        (
            SELECT extract(epoch FROM statement_timestamp() - min(owed.recorded_at))::float8
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
                    SELECT (
                        SELECT event.recorded_at FROM {schema}.events AS event WHERE event.position = waiting.position
                    )
                    FROM {schema}.redeliveries AS waiting
                    WHERE waiting.subscription = stored.subscription
                    ORDER BY waiting.position
                    LIMIT 1
                )
            ) AS owed
            WHERE isfinite(owed.recorded_at)
        ) AS lag_seconds,
        (
            SELECT coalesce(sum(upper(range) - lower(range)), 0)::bigint
            FROM unnest(stored.pending - unused.positions) AS range
        ) AS pending,
        (
            SELECT coalesce(sum(upper(range) - lower(range)), 0)::bigint
            FROM unnest(stored.pending - stored.holes - unused.positions) AS range
        ) AS in_flight,
        stored.epoch,
        stored.owner,
        worker.name AS owner_name,
        stored.completed_at IS NOT NULL AS complete,
        -- Dropped by a hard limit, and not recorded in `skipped`, because no worker runs the shard.
        CASE
            WHEN worker.id IS NULL AND stored.completed_at IS NULL THEN
                dropped.positions * (stored.pending + int8multirange(int8range(
                    stored.position + 1,
                    CASE WHEN stored.until IS NOT NULL THEN greatest(stored.position, stored.until) + 1 END
                )))
            ELSE '{}'
        END AS dropped
    FROM unused
    CROSS JOIN dropped
    CROSS JOIN head
    CROSS JOIN {schema}.offsets AS stored
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = stored.owner""".replace("{unused}", _UNUSED)

LAG = """
    CREATE VIEW {schema}.lag AS
    SELECT
        subscription.name AS subscription,
        subscription.ordering,
        subscription.shards,
        CASE
            WHEN total.complete THEN 'complete'
            WHEN subscription.paused_at IS NOT NULL THEN 'paused'
            WHEN total.owners <> '{}' THEN 'running'
            ELSE 'stopped'
        END AS state,
        subscription.paused_at,
        subscription.paused_by,
        subscription.pause_reason,
        total.owners,
        CASE WHEN total.complete THEN 0 ELSE total.lag_events END AS lag_events,
        CASE WHEN NOT total.complete THEN greatest(0, total.lag_seconds) END AS lag_seconds,
        total.in_flight,
        total.pending,
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
                SELECT range_agg(part.positions) AS positions
                FROM (
                    SELECT record.positions
                    FROM {schema}.skipped AS record
                    WHERE record.subscription = subscription.name
                    UNION ALL
                    SELECT unnest(one.positions)
                    FROM unnest(total.dropped) AS one (positions)
                ) AS part
            ) AS recorded
            CROSS JOIN LATERAL unnest(recorded.positions) AS range
        ) AS skipped,
        (
            SELECT waiting.last_error
            FROM {schema}.redeliveries AS waiting
            WHERE waiting.subscription = subscription.name
            ORDER BY waiting.due_at DESC
            LIMIT 1
        ) AS last_error
    FROM {schema}.subscriptions AS subscription
    JOIN (
        SELECT
            shard.subscription,
            bool_and(shard.complete) AS complete,
            coalesce(
                array_agg(DISTINCT shard.owner_name ORDER BY shard.owner_name)
                FILTER (WHERE shard.owner_name IS NOT NULL),
                '{}'
            ) AS owners,
            max(shard.lag_events) AS lag_events,
            max(shard.lag_seconds) AS lag_seconds,
            sum(shard.in_flight)::bigint AS in_flight,
            sum(shard.pending)::bigint AS pending,
            array_agg(shard.dropped) AS dropped
        FROM {schema}.shard_lag AS shard
        GROUP BY shard.subscription
    ) AS total ON total.subscription = subscription.name"""

# `workers` is the table. A row of a dead worker stays until another worker deletes it.
WORKER_STATUS = """
    CREATE VIEW {schema}.worker_status AS
    SELECT
        worker.name,
        worker.id,
        living.id IS NOT NULL AS is_alive,
        worker.started_at,
        extract(epoch FROM clock_timestamp() - worker.heartbeat_at)::float8 AS heartbeat_seconds,
        extract(epoch FROM worker.lease_timeout)::float8 AS lease_seconds,
        worker.subscriptions,
        (SELECT count(*) FROM {schema}.offsets AS stored WHERE stored.owner = worker.id) AS shards
    FROM {schema}.workers AS worker
    LEFT JOIN {schema}.living_workers AS living ON living.id = worker.id"""

# `recorded_at` has no index, and grows with the position: the last position that was recorded by a time is found by
# bisection over the primary key. Each step reads one event, and there are about 24 steps for 10 million positions.
_SEARCH = """bounds AS MATERIALIZED (
        SELECT
            coalesce((SELECT position - 1 FROM {schema}.events ORDER BY position LIMIT 1), 0) AS low,
            coalesce((SELECT position FROM {schema}.events ORDER BY position DESC LIMIT 1), 0) AS high
    ),
    search (time, low, high) AS (
        SELECT edges.time, bounds.low, bounds.high
        FROM edges
        CROSS JOIN bounds
        UNION ALL
        SELECT
            search.time,
            CASE WHEN probe.recorded_at <= search.time THEN probe.position ELSE search.low END,
            CASE WHEN probe.recorded_at <= search.time THEN search.high ELSE step.middle - 1 END
        FROM search
        CROSS JOIN LATERAL (SELECT search.low + (search.high - search.low + 1) / 2 AS middle) AS step
        CROSS JOIN LATERAL (
            SELECT event.position, event.recorded_at
            FROM {schema}.events AS event
            WHERE event.position >= step.middle
            ORDER BY event.position
            LIMIT 1
        ) AS probe
        WHERE search.low < search.high
    ),
    found AS MATERIALIZED (
        SELECT search.time, search.low AS position
        FROM search
        WHERE search.low >= search.high
    )"""
# The events between two positions of `part`, by the difference. So appends that were rolled back count, too.
_COUNT = """(
            SELECT greatest(0, part.upper - part.lower - coalesce(sum(upper(range) - lower(range)), 0))::bigint
            FROM unnest(
                unused.positions * int8multirange(int8range(part.lower + 1, greatest(part.lower, part.upper) + 1))
            ) AS range
        )"""


def _with_search(view: str) -> str:
    return view.replace("{unused}", _UNUSED).replace("{search}", _SEARCH).replace("{count}", _COUNT)


LOG_STATUS = """
    CREATE VIEW {schema}.log_status AS
    WITH RECURSIVE {unused},
    edges AS MATERIALIZED (
        SELECT statement_timestamp() - interval '1 minute' AS time
    ),
    {search}
    SELECT
        CASE WHEN positions.is_called THEN positions.last_value ELSE 0 END AS head,
        {count} / 60.0::float8 AS events_per_second,
        size.segments,
        size.bytes_on_disk
    FROM {schema}.events_position_seq AS positions
    CROSS JOIN unused
    CROSS JOIN (
        SELECT found.position AS lower, bounds.high AS upper
        FROM found
        CROSS JOIN bounds
    ) AS part
    CROSS JOIN (
        SELECT
            count(*) AS segments,
            coalesce(sum(pg_catalog.pg_total_relation_size(inhrelid)), 0)::bigint AS bytes_on_disk
        FROM pg_catalog.pg_inherits
        WHERE inhparent = {events}::regclass
    ) AS size"""

RATES = """
    CREATE VIEW {schema}.rates AS
    WITH RECURSIVE {unused},
    edges AS MATERIALIZED (
        SELECT date_trunc('minute', statement_timestamp()) - passed * interval '1 minute' AS time
        FROM generate_series(0, 60) AS passed
    ),
    {search}
    SELECT
        counted.minute,
        counted.position,
        counted.events,
        counted.events / 60.0::float8 AS events_per_second
    FROM (
        SELECT part.time AS minute, part.upper AS position, {count} AS events
        FROM (
            SELECT
                found.time,
                found.position AS lower,
                lead(found.position) OVER (ORDER BY found.time) AS upper
            FROM found
        ) AS part
        CROSS JOIN unused
        WHERE part.upper IS NOT NULL
    ) AS counted"""
