-- Facts for `pgbackend doctor`. See pgbackend/doctor/. Each statement runs in a read-only transaction of its own with
-- short limits, reads catalogs or a few rows by an index, and takes no lock that anybody waits for. Columns that only
-- newer servers have are read by to_jsonb(), which leaves out what is not there.

-- name: limit_transaction
-- No statement of this transaction runs for long, or waits for a lock for long. Names of functions come out with their
-- schema, because the line of a cure runs elsewhere.
SELECT
    set_config('search_path', 'pg_catalog', true) AS search_path,
    set_config('statement_timeout', '5s', true) AS statement_timeout,
    set_config('lock_timeout', '500ms', true) AS lock_timeout;

-- name: describe_session
-- The role and its session. The oids and the server's start tell whether two connections lead to the same log.
SELECT
    current_database()::text AS database,
    current_user::text AS role,
    current_setting('server_version_num')::integer AS version,
    pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS sees_all,
    coalesce(pg_has_role(log.relowner, 'USAGE'), false) AS is_owner,
    log.oid::bigint AS log,
    own.oid::bigint AS database_oid,
    pg_postmaster_start_time() AS server_start,
    clock_timestamp() AS server_time
FROM pg_catalog.pg_database AS own
LEFT JOIN pg_catalog.pg_namespace AS home ON home.nspname = {schema_literal}
LEFT JOIN pg_catalog.pg_class AS log
    ON log.relnamespace = home.oid
    AND log.relname = 'events'
WHERE own.datname = current_database();

-- name: list_settings
-- Settings as a new session of this role in this database gets them, and where each comes from.
SELECT name, setting, source
FROM pg_catalog.pg_settings
WHERE name IN (
    'autovacuum', 'client_min_messages', 'default_transaction_isolation', 'default_transaction_read_only', 'fsync',
    'full_page_writes', 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'lock_timeout',
    'statement_timeout', 'synchronous_commit', 'track_counts', 'transaction_timeout'
)
ORDER BY name;

-- name: find_capacity
-- How many connections there may be and are, and how many locks the log's segments need. Counts of sessions come from
-- statistics that every role may read.
SELECT
    current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
        AS server_limit,
    (SELECT coalesce(sum(numbackends), 0) FROM pg_catalog.pg_stat_database)::integer AS server_used,
    nullif(own.datconnlimit, -1) AS database_limit,
    (
        SELECT numbackends FROM pg_catalog.pg_stat_database AS used WHERE used.datid = own.oid
    ) AS database_used,
    nullif(role.rolconnlimit, -1) AS role_limit,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_activity AS activity WHERE activity.usesysid = role.oid
    )::integer AS role_used,
    current_setting('max_locks_per_transaction')::integer * (
        current_setting('max_connections')::integer + current_setting('max_prepared_transactions')::integer
    ) AS locks,
    (
        SELECT count(*)
        FROM pg_catalog.pg_inherits AS part
        JOIN pg_catalog.pg_class AS log ON log.oid = part.inhparent
        JOIN pg_catalog.pg_namespace AS home ON home.oid = log.relnamespace
        WHERE home.nspname = {schema_literal}
            AND log.relname = 'events'
    )::integer AS segments
FROM pg_catalog.pg_database AS own
JOIN pg_catalog.pg_roles AS role ON role.rolname = current_user
WHERE own.datname = current_database();

-- name: find_synchrony
-- The standbys that commits wait for, how many of them there are, and how many sessions wait now.
SELECT
    current_setting('synchronous_standby_names') AS names,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE sync_state IN ('sync', 'quorum')
    )::integer AS connected,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE wait_event = 'SyncRep'
    )::integer AS waiting,
    pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS sees_all;

-- name: list_sessions
-- Sessions of this database whose transaction keeps VACUUM from removing rows, oldest first, and the log's dead rows.
SELECT
    activity.pid,
    activity.usename::text AS role,
    activity.application_name AS application,
    activity.state,
    activity.query,
    extract(epoch FROM clock_timestamp() - activity.xact_start)::float8 AS age,
    extract(epoch FROM clock_timestamp() - activity.state_change)::float8 AS unchanged,
    (
        SELECT coalesce(sum(held.n_dead_tup), 0)
        FROM pg_catalog.pg_stat_all_tables AS held
        WHERE held.schemaname = {schema_literal}
    )::bigint AS dead_rows
FROM pg_catalog.pg_stat_activity AS activity
WHERE activity.datname = current_database()
    AND activity.pid <> pg_backend_pid()
    AND activity.backend_type = 'client backend'
    AND (activity.backend_xmin IS NOT NULL OR activity.backend_xid IS NOT NULL)
ORDER BY age DESC NULLS LAST;

-- name: list_prepared
-- Prepared transactions of this database, oldest first.
SELECT
    prepared.gid,
    prepared.owner::text AS role,
    extract(epoch FROM clock_timestamp() - prepared.prepared)::float8 AS age,
    (
        SELECT coalesce(sum(held.n_dead_tup), 0)
        FROM pg_catalog.pg_stat_all_tables AS held
        WHERE held.schemaname = {schema_literal}
    )::bigint AS dead_rows
FROM pg_catalog.pg_prepared_xacts AS prepared
WHERE prepared.database = current_database()
ORDER BY age DESC;

-- name: list_slots
-- Replication slots, and how much WAL and how many transactions each keeps.
SELECT
    slot.slot_name::text AS name,
    slot.slot_type AS type,
    slot.active AS is_active,
    slot.wal_status,
    age(slot.xmin) AS transactions,
    age(slot.catalog_xmin) AS catalog_transactions,
    (pg_current_wal_lsn() - slot.restart_lsn)::bigint AS wal_bytes,
    extract(epoch FROM clock_timestamp() - (to_jsonb(slot) ->> 'inactive_since')::timestamptz)::float8 AS inactive
FROM pg_catalog.pg_replication_slots AS slot
WHERE NOT slot.temporary
ORDER BY slot.slot_name;

-- name: list_standbys
-- Standbys that report the oldest transaction of their queries (hot_standby_feedback).
SELECT
    standby.application_name AS application,
    standby.pid,
    age(standby.backend_xmin) AS transactions,
    (
        SELECT coalesce(sum(held.n_dead_tup), 0)
        FROM pg_catalog.pg_stat_all_tables AS held
        WHERE held.schemaname = {schema_literal}
    )::bigint AS dead_rows
FROM pg_catalog.pg_stat_replication AS standby
WHERE standby.backend_xmin IS NOT NULL
ORDER BY transactions DESC;

-- name: list_appenders
-- The transactions that the fence may have to wait for, oldest first. As `describe_appenders`, with more for people.
SELECT
    held.pid,
    prepared.gid,
    activity.usename::text AS role,
    activity.application_name AS application,
    activity.state,
    activity.query,
    extract(epoch FROM clock_timestamp() - coalesce(activity.xact_start, began.at, prepared.prepared))::float8 AS age
FROM pg_catalog.pg_locks AS held
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = held.pid
CROSS JOIN LATERAL (SELECT {schema}.appender_began(held.pid) AS at) AS began
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
    AND held.relation = to_regclass(quote_ident({schema_literal}) || '.events')
    AND held.mode = 'RowExclusiveLock'
    AND held.granted
ORDER BY age DESC NULLS LAST
LIMIT 20;

-- name: list_lock_waits
-- Sessions that wait for a lock on a table of the log, and the first one that each waits for: 0 for a prepared
-- transaction. LIMIT before the blockers are looked up, which stops the lock manager for a moment.
SELECT
    waiting.pid,
    waiting.relation,
    waiting.mode,
    waiting.waited,
    found.blocker,
    blocker.application_name AS application,
    blocker.usename::text AS role,
    blocker.state,
    blocker.query
FROM (
    SELECT
        held.pid,
        part.relname::text AS relation,
        held.mode,
        extract(epoch FROM clock_timestamp() - held.waitstart)::float8 AS waited
    FROM pg_catalog.pg_locks AS held
    JOIN pg_catalog.pg_class AS part ON part.oid = held.relation
    JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
    WHERE held.locktype = 'relation'
        AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
        AND home.nspname = {schema_literal}
        AND NOT held.granted
    ORDER BY held.waitstart
    LIMIT 5
) AS waiting
CROSS JOIN LATERAL (SELECT (pg_blocking_pids(waiting.pid))[1] AS blocker) AS found
LEFT JOIN pg_catalog.pg_stat_activity AS blocker ON blocker.pid = found.blocker
ORDER BY waiting.waited DESC NULLS LAST;

-- name: list_notification_holders
-- How full the queue of notifications is, and the sessions that may keep it full: a listener in an open transaction
-- reads nothing. All databases share the queue. One row without a session when there is none.
SELECT
    pg_notification_queue_usage()::float8 AS usage,
    suspect.pid,
    suspect.datname::text AS database,
    suspect.application_name AS application,
    suspect.query,
    extract(epoch FROM clock_timestamp() - suspect.xact_start)::float8 AS age
FROM (SELECT true) AS one
LEFT JOIN LATERAL (
    SELECT *
    FROM pg_catalog.pg_stat_activity AS activity
    WHERE activity.pid <> pg_backend_pid()
        AND activity.backend_type = 'client backend'
        AND activity.xact_start IS NOT NULL
    ORDER BY activity.xact_start
    LIMIT 3
) AS suspect ON true;

-- name: find_notify_waits
-- Sessions that wait in their COMMIT for the lock that NOTIFY takes, one for the whole server, and who holds it.
SELECT
    waiting.sessions,
    waiting.waited,
    holder.pid,
    activity.application_name AS application,
    activity.wait_event
FROM (
    SELECT
        count(*)::integer AS sessions,
        max(extract(epoch FROM clock_timestamp() - held.waitstart))::float8 AS waited
    FROM pg_catalog.pg_locks AS held
    WHERE held.locktype = 'object'
        AND held.classid = 'pg_catalog.pg_database'::regclass
        AND held.objid = 0
        AND NOT held.granted
) AS waiting
LEFT JOIN pg_catalog.pg_locks AS holder
    ON holder.locktype = 'object'
    AND holder.classid = 'pg_catalog.pg_database'::regclass
    AND holder.objid = 0
    AND holder.granted
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = holder.pid
WHERE waiting.sessions > 0;

-- name: list_tables
-- The log's tables and segments: what vacuum thinks of each, who owns it, and how large it is.
WITH locked AS MATERIALIZED (
    SELECT held.relation
    FROM pg_catalog.pg_locks AS held
    WHERE held.locktype = 'relation'
        AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
        AND held.mode = 'AccessExclusiveLock'
        AND held.relation IS NOT NULL
)
SELECT
    part.relname::text AS name,
    part.relispartition AS is_partition,
    part.relkind::text AS kind,
    part.relowner::regrole::text AS owner,
    (
        SELECT log.relowner::regrole::text
        FROM pg_catalog.pg_class AS log
        WHERE log.relnamespace = part.relnamespace
            AND log.relname = 'events'
    ) AS log_owner,
    coalesce(statistics.n_live_tup, 0)::bigint AS live_rows,
    coalesce(statistics.n_dead_tup, 0)::bigint AS dead_rows,
    extract(epoch FROM clock_timestamp() - greatest(statistics.last_vacuum, statistics.last_autovacuum))::float8
        AS vacuumed,
    CASE
        -- The size of a locked table has to wait.
        WHEN part.relkind = 'r' AND part.oid NOT IN (SELECT locked.relation FROM locked) THEN pg_relation_size(part.oid)
        ELSE 0
    END::bigint AS bytes,
    CASE WHEN part.relkind = 'r' THEN age(part.relfrozenxid) END AS transactions,
    CASE WHEN part.relkind = 'r' THEN mxid_age(part.relminmxid) END AS multixacts,
    EXISTS (
        SELECT
        FROM pg_options_to_table(part.reloptions) AS option
        WHERE option.option_name = 'autovacuum_enabled'
            AND NOT option.option_value::boolean
    ) AS is_unvacuumed,
    part.relrowsecurity AS has_policies
FROM pg_catalog.pg_class AS part
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
LEFT JOIN pg_catalog.pg_stat_all_tables AS statistics ON statistics.relid = part.oid
WHERE home.nspname = {schema_literal}
    AND part.relkind IN ('r', 'p', 'S', 'v')
ORDER BY length(part.relname), part.relname;

-- name: list_segments
-- The partitions of `events`: their bounds as PostgreSQL writes them, and whether each is as the log makes them.
SELECT
    home.nspname::text AS schema,
    part.relname::text AS name,
    pg_get_expr(part.relpartbound, part.oid) AS bounds,
    link.inhdetachpending AS is_detaching,
    part.relowner = log.relowner AS has_owner,
    part.relnamespace = log.relnamespace AS is_at_home
FROM pg_catalog.pg_inherits AS link
JOIN pg_catalog.pg_class AS part ON part.oid = link.inhrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
JOIN pg_catalog.pg_class AS log ON log.oid = link.inhparent
JOIN pg_catalog.pg_namespace AS log_home ON log_home.oid = log.relnamespace
WHERE log_home.nspname = {schema_literal}
    AND log.relname = 'events'
ORDER BY length(part.relname), part.relname;

-- name: list_privileges
-- Privileges of others than the owner that would break the fence, on the log, its segments and its sequence.
SELECT
    part.relname::text AS name,
    part.relkind::text AS kind,
    part.relispartition AS is_segment,
    entry.column,
    CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END AS grantee,
    entry.privilege_type AS privilege
FROM pg_catalog.pg_class AS part
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
CROSS JOIN LATERAL (
    SELECT NULL::text AS column, whole.grantee, whole.privilege_type
    FROM aclexplode(part.relacl) AS whole
    UNION ALL
    SELECT attribute.attname::text, single.grantee, single.privilege_type
    FROM pg_catalog.pg_attribute AS attribute
    CROSS JOIN LATERAL aclexplode(attribute.attacl) AS single
    WHERE attribute.attrelid = part.oid
        AND attribute.attacl IS NOT NULL
) AS entry
WHERE home.nspname = {schema_literal}
    AND entry.grantee <> part.relowner
    AND (
        part.relname = 'events_position_seq' AND entry.privilege_type IN ('USAGE', 'UPDATE')
        OR (part.relname = 'events' OR part.relispartition AND part.relname LIKE 'events%')
            AND entry.privilege_type IN ('UPDATE', 'DELETE', 'TRUNCATE')
        OR part.relispartition AND part.relname LIKE 'events%' AND entry.privilege_type = 'INSERT'
        OR part.relname = 'events' AND entry.privilege_type = 'INSERT'
            AND coalesce(entry.column, 'position') IN ('position', 'recorded_at')
    )
ORDER BY part.relname, grantee, privilege;

-- name: list_additions
-- Additions of others: triggers and rules on the log's tables, and foreign keys that refer to `events`. `schema` and
-- `relation` name the table that has one.
SELECT
    'trigger' AS kind, trigger.tgname::text AS name, home.nspname::text AS schema, part.relname::text AS relation,
    trigger.tgfoid::regprocedure::text AS detail
FROM pg_catalog.pg_trigger AS trigger
JOIN pg_catalog.pg_class AS part ON part.oid = trigger.tgrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
WHERE home.nspname = {schema_literal}
    AND NOT trigger.tgisinternal
    AND trigger.tgparentid = 0
    AND trigger.tgenabled <> 'D'
UNION ALL
SELECT
    'rule', rule.rulename::text, home.nspname::text, part.relname::text, NULL
FROM pg_catalog.pg_rewrite AS rule
JOIN pg_catalog.pg_class AS part ON part.oid = rule.ev_class
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
WHERE home.nspname = {schema_literal}
    AND part.relkind IN ('r', 'p')
UNION ALL
SELECT
    'foreign key', key.conname::text, home.nspname::text, part.relname::text, target.relname::text
FROM pg_catalog.pg_constraint AS key
JOIN pg_catalog.pg_class AS part ON part.oid = key.conrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
JOIN pg_catalog.pg_class AS target ON target.oid = key.confrelid
JOIN pg_catalog.pg_namespace AS target_home ON target_home.oid = target.relnamespace
WHERE key.contype = 'f'
    AND key.conparentid = 0
    AND target_home.nspname = {schema_literal}
    AND (target.relname = 'events' OR target.relispartition AND target.relname LIKE 'events%')
ORDER BY kind, schema, relation, name;

-- name: list_columns
SELECT
    part.relname::text AS relation,
    attribute.attname::text AS name,
    format_type(attribute.atttypid, attribute.atttypmod) AS type,
    attribute.attnotnull AS is_required,
    attribute.atthasdef OR attribute.attidentity <> '' AS has_default
FROM pg_catalog.pg_attribute AS attribute
JOIN pg_catalog.pg_class AS part ON part.oid = attribute.attrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
WHERE home.nspname = {schema_literal}
    AND part.relkind IN ('r', 'p')
    AND NOT part.relispartition
    AND attribute.attnum > 0
    AND NOT attribute.attisdropped
ORDER BY part.relname, attribute.attnum;

-- name: list_constraints
-- Constraints but those that newer servers have for NOT NULL, and indexes that belong to none.
SELECT
    part.relname::text AS relation, rule.conname::text AS name, rule.contype::text AS type, true AS is_valid
FROM pg_catalog.pg_constraint AS rule
JOIN pg_catalog.pg_class AS part ON part.oid = rule.conrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
WHERE home.nspname = {schema_literal}
    AND NOT part.relispartition
    AND rule.contype <> 'n'
UNION ALL
SELECT
    part.relname::text, name.relname::text, 'i', index.indisvalid
FROM pg_catalog.pg_index AS index
JOIN pg_catalog.pg_class AS part ON part.oid = index.indrelid
JOIN pg_catalog.pg_class AS name ON name.oid = index.indexrelid
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
WHERE home.nspname = {schema_literal}
    AND NOT name.relispartition
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS own WHERE own.conindid = index.indexrelid)
ORDER BY relation, name;

-- name: list_routines
-- The functions and views of the log. `body`: of a function whose text PostgreSQL keeps as it was written.
SELECT
    routine.proname::text AS name,
    routine.oid::regprocedure::text AS signature,
    routine.proowner::regrole::text AS owner,
    log.relowner::regrole::text AS log_owner,
    nullif(routine.prosrc, '') AS body
FROM pg_catalog.pg_proc AS routine
JOIN pg_catalog.pg_namespace AS home ON home.oid = routine.pronamespace
LEFT JOIN pg_catalog.pg_class AS log
    ON log.relnamespace = home.oid
    AND log.relname = 'events'
WHERE home.nspname = {schema_literal}
UNION ALL
SELECT
    part.relname::text, part.relname::text, part.relowner::regrole::text, log.relowner::regrole::text, NULL
FROM pg_catalog.pg_class AS part
JOIN pg_catalog.pg_namespace AS home ON home.oid = part.relnamespace
LEFT JOIN pg_catalog.pg_class AS log
    ON log.relnamespace = home.oid
    AND log.relname = 'events'
WHERE home.nspname = {schema_literal}
    AND part.relkind = 'v'
ORDER BY name, signature;

-- name: find_rights
-- Which of the wanted privileges this role has; null for those on objects that are missing. Names are matched with the
-- catalogs: looking them up fails for a role that may not use the schema. `column_name` is null for a whole object.
WITH wanted AS (
    SELECT number, kind, object, privilege, column_name
    FROM unnest($1::integer[], $2::text[], $3::text[], $4::text[], $5::text[])
        AS given (number, kind, object, privilege, column_name)
)
SELECT
    wanted.number,
    CASE wanted.kind
        WHEN 'SCHEMA' THEN has_schema_privilege(home.oid, wanted.privilege)
        WHEN 'SEQUENCE' THEN has_sequence_privilege(part.oid, wanted.privilege)
        WHEN 'FUNCTION' THEN (
            SELECT bool_and(has_function_privilege(routine.oid, wanted.privilege))
            FROM pg_catalog.pg_proc AS routine
            WHERE routine.pronamespace = home.oid
                AND routine.proname = split_part(wanted.object, '(', 1)
        )
        WHEN 'TABLE' THEN CASE
            WHEN wanted.column_name IS NULL THEN has_table_privilege(part.oid, wanted.privilege)
            ELSE (
                SELECT has_column_privilege(part.oid, attribute.attnum, wanted.privilege)
                FROM pg_catalog.pg_attribute AS attribute
                WHERE attribute.attrelid = part.oid
                    AND attribute.attname = wanted.column_name
            )
        END
    END AS is_held
FROM wanted
JOIN pg_catalog.pg_namespace AS home ON home.nspname = {schema_literal}
LEFT JOIN pg_catalog.pg_class AS part
    ON part.relnamespace = home.oid
    AND part.relname = wanted.object
ORDER BY wanted.number;

-- name: list_subscriptions
-- Each subscription with what it owes, and whether a living worker runs any shard of it. `oldest`: seconds since the
-- first event above the offset of its slowest shard was recorded. Counts end at $1.
SELECT
    subscription.name,
    subscription.ordering,
    stored.lowest,
    stored.is_complete,
    stored.is_run,
    stored.crashes,
    stored.open_ranges,
    stored.old_shards,
    stored.is_reshard_idle,
    extract(epoch FROM clock_timestamp() - subscription.paused_at)::float8 AS paused,
    subscription.paused_by,
    subscription.pause_reason,
    (
        SELECT extract(epoch FROM clock_timestamp() - event.recorded_at)::float8
        FROM {schema}.events AS event
        WHERE event.position > stored.lowest
        ORDER BY event.position
        LIMIT 1
    ) AS oldest,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM {schema}.dead_letters AS letter
            WHERE letter.subscription = subscription.name
            LIMIT $1
        ) AS counted
    ) AS dead_letters,
    (
        SELECT extract(epoch FROM clock_timestamp() - min(waiting.due_at))::float8
        FROM {schema}.redeliveries AS waiting
        WHERE waiting.subscription = subscription.name
    ) AS overdue,
    retried.position AS retried,
    retried.attempt,
    retried.last_error
FROM {schema}.subscriptions AS subscription
CROSS JOIN LATERAL (
    SELECT
        coalesce(min(part.position) FILTER (WHERE part.completed_at IS NULL), 0) AS lowest,
        coalesce(bool_and(part.completed_at IS NOT NULL), false) AS is_complete,
        coalesce(bool_or(worker.id IS NOT NULL), false) AS is_run,
        coalesce(max(part.crashes), 0) AS crashes,
        coalesce(max((SELECT count(*) FROM unnest(part.pending))), 0)::integer AS open_ranges,
        count(*) FILTER (WHERE part.until IS NOT NULL)::integer AS old_shards,
        coalesce(bool_and(worker.id IS NULL) FILTER (WHERE part.until IS NOT NULL), false) AS is_reshard_idle
    FROM {schema}.offsets AS part
    LEFT JOIN {schema}.living_workers AS worker ON worker.id = part.owner
    WHERE part.subscription = subscription.name
) AS stored
LEFT JOIN LATERAL (
    SELECT waiting.position, waiting.attempt, waiting.last_error
    FROM {schema}.redeliveries AS waiting
    WHERE waiting.subscription = subscription.name
    ORDER BY waiting.position
    LIMIT 1
) AS retried ON true
ORDER BY subscription.name;

-- name: list_losses
-- Positions that each subscription has lost since $1 seconds ago.
SELECT
    record.subscription,
    sum(upper(record.positions) - lower(record.positions))::bigint AS positions,
    min(lower(record.positions)) AS first,
    max(upper(record.positions)) - 1 AS last,
    extract(epoch FROM clock_timestamp() - max(record.skipped_at))::float8 AS age
FROM {schema}.skipped AS record
WHERE record.skipped_at > clock_timestamp() - make_interval(secs => $1::float8)
GROUP BY record.subscription
ORDER BY record.subscription;

-- name: find_retention_state
-- The log's retention, and what has become of it: the age of the oldest event, the bytes of all segments, and the
-- segments that were emptied long ago and are still attached. Times in seconds.
SELECT
    policy.keep_us / 1e6::float8 AS keep,
    policy.max_age_us / 1e6::float8 AS max_age,
    policy.max_bytes,
    (
        SELECT extract(epoch FROM clock_timestamp() - event.recorded_at)::float8
        FROM {schema}.events AS event
        ORDER BY event.position
        LIMIT 1
    ) AS oldest,
    coalesce((
        SELECT sum(pg_total_relation_size(link.inhrelid))
        FROM pg_catalog.pg_inherits AS link
        WHERE link.inhparent = to_regclass(quote_ident({schema_literal}) || '.events')
    ), 0)::bigint AS bytes,
    (
        SELECT count(*)
        FROM {schema}.segments AS emptied
        JOIN pg_catalog.pg_class AS part ON part.relname = 'events_' || emptied.lower_bound
        JOIN pg_catalog.pg_inherits AS link
            ON link.inhrelid = part.oid
            AND link.inhparent = to_regclass(quote_ident({schema_literal}) || '.events')
        WHERE emptied.dropped_at < clock_timestamp() - make_interval(secs => $1::float8)
    )::integer AS unremoved,
    (SELECT count(*) FROM {schema}.living_workers)::integer AS workers,
    holders.run AS held_by_run,
    holders.stopped AS held_by_stopped
FROM (
    SELECT
        coalesce(array_agg(holder.subscription) FILTER (WHERE holder.is_run), '{}') AS run,
        coalesce(array_agg(holder.subscription) FILTER (WHERE NOT holder.is_run), '{}') AS stopped
    FROM {schema}.find_holders() AS holder
) AS holders
LEFT JOIN {schema}.retention AS policy ON true;

-- name: find_old_keys
-- With deduplication: the partition of keys whose bucket has passed, and how long ago the present bucket began. A bucket
-- is as long as two windows, as forget_keys() has it.
SELECT
    part.relname::text AS name,
    pg_relation_size(part.oid) AS bytes,
    policy.window_us / 1e6::float8 AS window,
    (clock.us % (2 * policy.window_us)) / 1e6::float8 AS since
FROM {schema}.deduplication AS policy
CROSS JOIN (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS us) AS clock
JOIN pg_catalog.pg_inherits AS link
    ON link.inhparent = to_regclass(quote_ident({schema_literal}) || '.recent_events')
JOIN pg_catalog.pg_class AS part ON part.oid = link.inhrelid
WHERE policy.window_us > 0
    AND right(part.relname, 1)::bigint = (clock.us / (2 * policy.window_us) + 2) % 3;

-- name: list_workers
-- Workers with their last sign of life.
SELECT
    worker.name,
    extract(epoch FROM clock_timestamp() - worker.heartbeat_at)::float8 AS silent,
    living.id IS NOT NULL AS is_alive,
    (SELECT count(*) FROM {schema}.offsets AS part WHERE part.owner = worker.id)::integer AS shards
FROM {schema}.workers AS worker
LEFT JOIN {schema}.living_workers AS living ON living.id = worker.id
ORDER BY worker.name;

-- name: find_newest_event
-- The newest event, and how many seconds ago it was recorded; less than nothing when the server's clock went back.
SELECT
    event.position,
    extract(epoch FROM clock_timestamp() - event.recorded_at)::float8 AS age
FROM {schema}.events AS event
ORDER BY event.position DESC
LIMIT 1;
