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
LEFT JOIN regexp_match(pg_get_expr(relpartbound, newest.oid), '[(]''([0-9]+)''[)] TO [(]''([0-9]+)''[)]') AS bounds ON true;

-- name: make_segment
-- The bounds of the segment that was made, with the owner's rights, by a function of the log. It decides
-- on them, locks, and gives up a wait after a second. Null when nothing was made, because enough are ahead.
SELECT lower_bound, upper_bound
FROM {schema}.make_segment()
