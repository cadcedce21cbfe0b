-- The log itself: appending to it and reading it in order.

-- name: append_one
-- One event. Several are appended by COPY.
INSERT INTO {schema}.events (
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12);

-- name: read_page
-- What is visible above a position, in log order, by the primary key. Empty when the incarnation is another one.
-- Of large events only position and weight: `read_large` fetches the rest. So a page never outweighs its rows times
-- 16 KiB, whatever the log holds. A running sum that ends the page costs twice as much (measured).
-- The position hides in a subquery, and the limit is a constant, so that a plan made for this position promises no more
-- than the generic one: PostgreSQL then keeps that. Planning anew with 11 segments took 1.8 ms of 2.0 a page.
SELECT
    CASE WHEN weight <= 16384 THEN specversion END AS specversion,
    CASE WHEN weight <= 16384 THEN id END AS id,
    CASE WHEN weight <= 16384 THEN source END AS source,
    CASE WHEN weight <= 16384 THEN type END AS type,
    CASE WHEN weight <= 16384 THEN subject END AS subject,
    CASE WHEN weight <= 16384 THEN time END AS time,
    CASE WHEN weight <= 16384 THEN datacontenttype END AS datacontenttype,
    CASE WHEN weight <= 16384 THEN dataschema END AS dataschema,
    CASE WHEN weight <= 16384 THEN partitionkey END AS partitionkey,
    CASE WHEN weight <= 16384 THEN extensions END AS extensions,
    CASE WHEN weight <= 16384 THEN data END AS data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, weight
FROM (
    SELECT *, {weight} AS weight
    FROM {schema}.events
    WHERE position > (SELECT $1::bigint)
        AND (SELECT id FROM {schema}.life) = $2
    ORDER BY position
    LIMIT 1000
) AS page
ORDER BY position;

-- name: read_page_and_holes
-- The same, preceded by what has appeared in the open holes, all in one snapshot: a late event must not be overtaken by
-- one of its own transaction. Holes are looked up as ranges; a rolled-back bulk load is one range, however long.
-- Without the page when $4 is false.
SELECT
    CASE WHEN weight <= 16384 THEN specversion END AS specversion,
    CASE WHEN weight <= 16384 THEN id END AS id,
    CASE WHEN weight <= 16384 THEN source END AS source,
    CASE WHEN weight <= 16384 THEN type END AS type,
    CASE WHEN weight <= 16384 THEN subject END AS subject,
    CASE WHEN weight <= 16384 THEN time END AS time,
    CASE WHEN weight <= 16384 THEN datacontenttype END AS datacontenttype,
    CASE WHEN weight <= 16384 THEN dataschema END AS dataschema,
    CASE WHEN weight <= 16384 THEN partitionkey END AS partitionkey,
    CASE WHEN weight <= 16384 THEN extensions END AS extensions,
    CASE WHEN weight <= 16384 THEN data END AS data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, weight
FROM (
    (
        SELECT late.*
        FROM unnest($3::text::int8multirange) AS hole
        CROSS JOIN LATERAL (
            SELECT *, {weight} AS weight
            FROM {schema}.events
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
        SELECT *, {weight} AS weight
        FROM {schema}.events
        WHERE position > (SELECT $1::bigint)
            AND (SELECT id FROM {schema}.life) = $2
            AND $4::boolean
        ORDER BY position
        LIMIT 1000
    )
) AS found
ORDER BY position;

-- name: read_large
-- The whole of single events that a page left behind. Nothing when the incarnation is another one by now: their
-- positions may have been given out again.
SELECT
    specversion, id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash, {weight} AS weight
FROM {schema}.events
WHERE position = ANY ($1::bigint[])
    AND (SELECT id FROM {schema}.life) = $2;

-- name: find_page
-- What `read_page_and_holes` reads, by position and key only: for the case that a row cannot be decoded. With its date
-- where that is why: finding such rows one by one takes 20 ms each.
(
    SELECT late.*
    FROM unnest($3::text::int8multirange) AS hole
    CROSS JOIN LATERAL (
        SELECT position, key_hash, CASE WHEN {readable_date} IS NULL THEN recorded_at::text END AS bad_date
        FROM {schema}.events
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
    SELECT position, key_hash, CASE WHEN {readable_date} IS NULL THEN recorded_at::text END AS bad_date
    FROM {schema}.events
    WHERE position > $1::bigint
        AND (SELECT id FROM {schema}.life) = $2
        AND $4::boolean
    ORDER BY position
    LIMIT 1000
)
ORDER BY position;

-- name: find_position
-- The first event at or above a position, and whether it was recorded by a date: one step of a search by time.
SELECT position, recorded_at <= $2 AS is_before
FROM {schema}.events
WHERE position >= $1
ORDER BY position
LIMIT 1;

-- name: find_holes
-- The positions above one and up to another that no committed event has, as ranges in one snapshot.
SELECT lower, upper
FROM (
    SELECT
        coalesce(lag(position) OVER (ORDER BY position), $1::bigint) + 1 AS lower,
        position AS upper
    FROM (
        SELECT position
        FROM {schema}.events
        WHERE position > $1 AND position <= $2
        UNION ALL
        SELECT $2::bigint + 1
    ) AS taken
) AS between_neighbours
WHERE lower < upper
ORDER BY lower DESC
LIMIT $3;

-- name: find_segments
-- The segments that are part of the log, in its order: not those that are detached, or on their way to it.
SELECT (bounds[1])::bigint AS lower, (bounds[2])::bigint AS upper
FROM pg_catalog.pg_inherits
JOIN pg_catalog.pg_class AS segment ON segment.oid = inhrelid
CROSS JOIN LATERAL regexp_match(
    pg_get_expr(segment.relpartbound, segment.oid), '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]'
) AS bounds
WHERE inhparent = to_regclass(quote_ident({schema_literal}) || '.events')
    AND NOT inhdetachpending
    -- A partition that somebody made by other bounds (DEFAULT, MINVALUE) is none of ours.
    AND bounds IS NOT NULL
ORDER BY lower;

-- name: find_incarnation
SELECT id
FROM {schema}.life;

-- name: find_signs
-- What tells whether the log is still the one that this process knows: the life, the last position given out, whether
-- an event at one of the positions $1 is another one than that which was recorded at $2, or gone, and the newest event
-- for the next time. Dates are microseconds as text: Python cannot hold each one that PostgreSQL can.
SELECT
    (SELECT id FROM {schema}.life) AS incarnation,
    (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.events_position_seq) AS head,
    compared.replaced,
    compared.missing,
    newest.position,
    newest.recorded_at
FROM (
    SELECT coalesce(bool_or(stored <> recorded_at), false) AS replaced,
        coalesce(bool_or(stored IS NULL), false) AS missing
    FROM (
        SELECT known.recorded_at,
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

-- name: end_life
SELECT {schema}.end_life($1);

-- name: begin_incarnation
-- After a crash or a promotion the unlogged table is empty: whoever comes first has the new life named. PostgreSQL makes
-- up the name: most roles may not write it.
INSERT INTO {schema}.incarnation (single)
VALUES (true)
ON CONFLICT DO NOTHING;

-- name: notify
-- A NOTIFY must have an xid, and so a flush at its commit, which nobody needs: a lost wake-up is only a late one. For the
-- same reason it waits only $3 for the lock that all commits with a NOTIFY share: its owner may wait for a standby.
SELECT
    set_config('synchronous_commit', 'off', true),
    set_config('lock_timeout', $3, true),
    pg_notify($1, $2);
