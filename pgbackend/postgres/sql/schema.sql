-- Which revision the log's tables are at. Alembic writes the table; see pgbackend/postgres/schema.py.

-- name: find_revision
-- Fails with undefined_table where there is no log; an answer costs one index-less page.
SELECT version_num
FROM {schema}.pgbackend_revision
