-- The log itself: appending to it and reading it in order.

-- name: append_one
-- One event. Several are appended by COPY.
INSERT INTO {schema}.events (
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12);

-- name: append_one_and_notify
-- The same with a NOTIFY in its transaction, which tells of the event half a millisecond sooner than one that follows.
-- No row when there is none: with a synchronous standby the commit may wait for long, and would keep the lock that all
-- commits with a NOTIFY share. Gives up, and stores nothing, when another one keeps it for longer than $15.
WITH stored AS (
    INSERT INTO {schema}.events (
        specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
        data_encoding
    )
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
    RETURNING position
)
SELECT
    set_config('lock_timeout', $15, true),
    pg_notify($13, $14)
FROM stored
WHERE current_setting('synchronous_standby_names') = '';

-- name: append_one_fresh
-- One event with the key $13, unless it is a repeat within the window $14: then its key is returned, else none. Null, and
-- nothing is stored, when the log has another window. Fails when an open transaction has claimed the key.
WITH claimed AS MATERIALIZED (
    SELECT {schema}.claim_keys_soon(ARRAY[$13::bytea], $14) AS repeats
),
stored AS (
    INSERT INTO {schema}.events (
        specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
        data_encoding
    )
    SELECT
        $1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::text, $8::text, $9::text, $10::json, $11::bytea,
        $12::text
    FROM claimed
    WHERE cardinality(repeats) = 0
)
SELECT repeats
FROM claimed;

-- name: claim_keys
-- Those of the keys $1 that this transaction did not get, because their events are repeats within the window $2. Null
-- when the log has another window. Fails when an open transaction has claimed one of them.
SELECT {schema}.claim_keys_soon($1, $2);

-- name: claim_new_keys
-- True when this transaction got all of the keys $1, which follow each other in order; false when the window is not $2. Fails for a
-- repeat, and when an open transaction has claimed one of them.
SELECT {schema}.claim_new_keys($1, $2);

-- name: find_blocked
-- Those of the keys $1 that an open transaction has claimed.
SELECT {schema}.blocked_keys($1);

-- name: read_page
-- The visible events above position $1, in log order, by the primary key. Empty in another incarnation than $2.
-- With the hashes of their keys if $3: subscriptions with one shard need none.
-- Large events come with position and weight only, and `read_large` fetches the rest. So a page never outweighs its rows
-- times 16 KiB, whatever the log holds. A running sum of weights that ends the page costs twice as much (measured).
-- The position hides in a subquery and the limit is a constant, so that a plan for this position promises no more than
-- the generic plan and PostgreSQL keeps that. With 11 segments, planning took 1.8 of 2.0 ms a page.
SELECT {page_columns}
FROM (
    SELECT *, {weight} AS weight, CASE WHEN $3::boolean THEN {key_hash} END AS key_hash
    FROM {schema}.events
    WHERE position > (SELECT $1::bigint)
        AND (SELECT id FROM {schema}.life) = $2
    ORDER BY position
    LIMIT 1000
) AS page
ORDER BY position;

-- name: read_page_and_holes
-- The same, preceded by the events that have appeared in the open holes $4, all in one snapshot: no event of a
-- transaction may overtake a late one. Also those of which only a copy is left. A hole is looked up as one range, also
-- that of a rolled-back bulk load.
-- Without the page when $5 is false.
-- `read_page` stays beside it: at the tail it takes 0.11 ms, this one 0.16 ms with no holes.
SELECT {page_columns}
FROM (
    (
        SELECT late.*
        FROM unnest($4::text::int8multirange) AS hole
        CROSS JOIN LATERAL (
            SELECT *, {weight} AS weight, CASE WHEN $3::boolean THEN {key_hash} END AS key_hash
            FROM {schema}.all_events
            WHERE position >= lower(hole)
                AND position < upper(hole)
                AND (SELECT id FROM {schema}.life) = $2
            ORDER BY position
            LIMIT 1000
        ) AS late
        ORDER BY late.position
        LIMIT 1000
    )
    UNION ALL
    (
        SELECT *, {weight} AS weight, CASE WHEN $3::boolean THEN {key_hash} END AS key_hash
        FROM {schema}.events
        WHERE position > (SELECT $1::bigint)
            AND (SELECT id FROM {schema}.life) = $2
            AND $5::boolean
        ORDER BY position
        LIMIT 1000
    )
) AS found
ORDER BY position;

-- name: read_large
-- The whole of large events that a page has without their content, except redacted ones. Empty in another incarnation:
-- their positions may have been given out again.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, {recorded_at} AS recorded_at, {key_hash} AS key_hash, {weight} AS weight
FROM {schema}.stored_events
WHERE position = ANY ($1::bigint[])
    AND (SELECT id FROM {schema}.life) = $2;

-- name: find_page
-- The positions and keys of what `read_page_and_holes` reads, for a page with a row that cannot be decoded. It names the
-- dates that no datetime can hold, because finding such rows one by one takes 20 ms each.
(
    SELECT late.*
    FROM unnest($3::text::int8multirange) AS hole
    CROSS JOIN LATERAL (
        SELECT position, {key_hash} AS key_hash, CASE WHEN {readable_date} IS NULL THEN recorded_at::text END AS bad_date
        FROM {schema}.all_events
        WHERE position >= lower(hole)
            AND position < upper(hole)
            AND (SELECT id FROM {schema}.life) = $2
        ORDER BY position
        LIMIT 1000
    ) AS late
    ORDER BY late.position
    LIMIT 1000
)
UNION ALL
(
    SELECT position, {key_hash} AS key_hash, CASE WHEN {readable_date} IS NULL THEN recorded_at::text END AS bad_date
    FROM {schema}.events
    WHERE position > $1::bigint
        AND (SELECT id FROM {schema}.life) = $2
        AND $4::boolean
    ORDER BY position
    LIMIT 1000
)
ORDER BY position;

-- name: find_position
-- The first event at or above position $1, and whether it was recorded by the date $2: one step of a search by time.
SELECT position, recorded_at <= $2 AS is_before
FROM {schema}.events
WHERE position >= $1
ORDER BY position
LIMIT 1;

-- name: find_holes
-- The ranges of positions above $1 and up to $2 that no visible event has, in one snapshot, the last $3 of them.
SELECT lower, upper
FROM (
    SELECT
        coalesce(lag(position) OVER (ORDER BY position), $1::bigint) + 1 AS lower,
        position AS upper
    FROM (
        SELECT position
        FROM {schema}.events
        WHERE position > $1
            AND position <= $2
        UNION ALL
        SELECT $2::bigint + 1
    ) AS taken
) AS between_neighbours
WHERE lower < upper
ORDER BY lower DESC
LIMIT $3;

-- name: find_segments
-- The segments that hold events or will, in order: without those that are emptied or being detached. And, not attached,
-- the positions at the ends of segments that were cut, which no event has.
SELECT (bounds[1])::bigint AS lower, (bounds[2])::bigint AS upper, true AS is_attached
FROM pg_catalog.pg_inherits
JOIN pg_catalog.pg_class AS segment ON segment.oid = inhrelid
CROSS JOIN LATERAL regexp_match(
    pg_get_expr(segment.relpartbound, segment.oid), '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]'
) AS bounds
WHERE inhparent = to_regclass(quote_ident({schema_literal}) || '.events')
    AND NOT inhdetachpending
    -- A partition with other bounds (DEFAULT, MINVALUE) is no segment.
    AND bounds IS NOT NULL
    AND (bounds[1])::bigint NOT IN (SELECT lower_bound FROM {schema}.segments WHERE dropped_at IS NOT NULL)
UNION ALL
SELECT last_position + 1, upper_bound, false
FROM {schema}.segments
WHERE last_position + 1 < upper_bound
ORDER BY lower;

-- name: find_kept
-- The positions in these ranges whose events are gone from the log, and of which copies are kept.
SELECT copy.position
FROM unnest($1::text::int8multirange) AS range
JOIN {schema}.kept_events AS copy ON copy.position >= lower(range) AND copy.position < upper(range)
ORDER BY copy.position;

-- name: find_incarnation
-- The server's incarnation; null or no row when it has no name yet.
SELECT id
FROM {schema}.life;

-- name: compare_landmarks
-- Whether the log is still the one that a process knows: its incarnation; the last position given out; whether any event
-- at a position of $1 was replaced (it was recorded at another time than $2 says) or is missing; and the newest event,
-- as the next landmark. Times are microseconds since 1970 as text, because Python cannot hold every date.
SELECT
    (SELECT id FROM {schema}.life) AS incarnation,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head,
    compared.replaced,
    compared.missing,
    newest.position,
    newest.recorded_at
FROM (
    SELECT
        coalesce(bool_or(stored <> recorded_at), false) AS replaced,
        coalesce(bool_or(stored IS NULL), false) AS missing
    FROM (
        SELECT
            known.recorded_at,
            (
                SELECT trunc(extract(epoch FROM event.recorded_at) * 1000000)::text
                FROM {schema}.events AS event
                WHERE event.position = known.position
            ) AS stored
        FROM unnest($1::bigint[], $2::text[]) AS known (position, recorded_at)
    ) AS looked_up
) AS compared
LEFT JOIN LATERAL (
    SELECT position, trunc(extract(epoch FROM recorded_at) * 1000000)::text AS recorded_at
    FROM {schema}.events
    ORDER BY position DESC
    LIMIT 1
) AS newest ON true;

-- name: end_incarnation
-- The incarnation $1 ends for every process, because the log was set back in it.
SELECT {schema}.end_life($1);

-- name: begin_incarnation
-- A crash or a promotion empties the unlogged table, and the first process to notice inserts the row. PostgreSQL makes
-- up the name, since most roles may not write it.
INSERT INTO {schema}.incarnation (single)
VALUES (true)
ON CONFLICT DO NOTHING;

-- name: notify
-- A commit with a NOTIFY has an xid, and so would be flushed. No flush, because a lost wake-up only makes an event late.
-- All commits with a NOTIFY share one lock, whose owner may wait for a standby: give up after $3.
SELECT
    set_config('synchronous_commit', 'off', true),
    set_config('lock_timeout', $3, true),
    pg_notify($1, $2);

-- name: free_notifications
-- PostgreSQL frees the notifications that all listeners have read when it is asked how full their queue is.
SELECT pg_notification_queue_usage();
