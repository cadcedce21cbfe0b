-- Segments: the range partitions of the log, made ahead of it. See pgbackend/log/segments.py.

-- name: find_reach
-- The last position given out, visible or not, and the bounds of the newest segment. The newest is found by its name,
-- which ends in its lower bound: with 100 segments that takes 0.5 ms, and reading the bounds of all takes 4 ms.
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
LEFT JOIN regexp_match(pg_get_expr(relpartbound, newest.oid), '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]') AS bounds ON true;

-- name: make_segment
-- The bounds of the segment that a function of the log has made, with the owner's rights. The function decides on them,
-- and waits for a lock at most a second. Null when enough segments are ahead, so that none was made.
SELECT lower_bound, upper_bound
FROM {schema}.make_segment();
