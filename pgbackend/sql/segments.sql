-- Segments: the range partitions of the log, made ahead of it.

-- name: find_reach
-- How far the newest segment reaches, and how far the log has come: all that is needed to see that nothing is to do.
-- The last position given out counts, whether or not it can be seen yet. The newest is found by its name, which ends in
-- its lower bound: reading the bounds of all takes 4 ms with 100 segments, this 0.5 ms.
SELECT
    last_value AS head,
    (bounds[1])::bigint AS lower,
    (bounds[2])::bigint AS upper
FROM {schema}.events_position_seq
LEFT JOIN (
    SELECT segment.oid, relpartbound
    FROM pg_inherits
    JOIN pg_class AS segment ON segment.oid = inhrelid
    WHERE inhparent = to_regclass(quote_ident({schema_literal}) || '.events')
    ORDER BY length(relname) DESC, relname DESC
    LIMIT 1
) AS newest ON true
LEFT JOIN regexp_match(pg_get_expr(relpartbound, newest.oid), '\(''(\d+)''\) TO \(''(\d+)''\)') AS bounds ON true;

-- name: limit_waits
-- Nothing here is worth a long wait: the next look is soon. Ends with the transaction: a pooler may stand between.
SELECT set_config('lock_timeout', '1s', true);

-- name: try_lock
-- Of all who find that segments are missing one makes them; the others have better things to do.
SELECT pg_try_advisory_xact_lock(hashtextextended('pgbackend segments ' || {schema_literal}, 0));

-- name: lock
-- The same for those who cannot go on without a new segment.
SELECT pg_advisory_xact_lock(hashtextextended('pgbackend segments ' || {schema_literal}, 0));

-- name: define_segment
-- The statements that make the segment $1 ≤ position < $2, as text, because DDL takes no parameters.
-- CREATE, then ATTACH. Not PARTITION OF: it takes AccessExclusive on the parent, and so queues every producer behind one
-- open appender. Without the identity: 17 and newer attach no table that has one. The CHECK spares ATTACH its scan.
SELECT
    format(
        '/* pgbackend:create_segment */ CREATE TABLE %1$I.%2$I ('
        'LIKE %1$I.events INCLUDING ALL EXCLUDING IDENTITY, '
        'CONSTRAINT segment_bounds CHECK (position >= %3$s AND position < %4$s))',
        {schema_literal}, 'events_' || $1::bigint, $1::bigint, $2::bigint
    ) AS create_segment,
    format(
        '/* pgbackend:attach_segment */ ALTER TABLE %1$I.events '
        'ATTACH PARTITION %1$I.%2$I FOR VALUES FROM (%3$s) TO (%4$s)',
        {schema_literal}, 'events_' || $1::bigint, $1::bigint, $2::bigint
    ) AS attach_segment;
