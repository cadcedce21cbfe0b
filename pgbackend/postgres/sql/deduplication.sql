-- Deduplication: the window in which the log takes each source and id once. See pgbackend/log/deduplication.py.

-- name: find_window
-- The window in microseconds; null when none was ever set.
SELECT window_us
FROM {schema}.deduplication;

-- name: store_window
-- The log has this window from now on, for all of its producers.
INSERT INTO {schema}.deduplication (window_us)
VALUES ($1)
ON CONFLICT (single) DO UPDATE
SET window_us = excluded.window_us;

-- name: forget_keys
-- Empties the partitions whose windows have passed, with the owner's rights. How many it emptied.
SELECT {schema}.forget_keys();
