-- The revision of the log's tables. Alembic writes it; see pgbackend/postgres/alembic_migrations.py.

-- name: find_revision
-- Fails with undefined_table where there is no log. Reads one page, without an index.
SELECT version_num
FROM {schema}.pgbackend_revision;

-- name: find_unversioned
-- Whether the schema holds a log without a version table, as the first versions made it.
SELECT count(*) = 4 AS has_log
FROM pg_catalog.pg_class
JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname = {schema_literal}
    AND relname IN ('events', 'incarnation', 'epochs', 'offsets')
    AND NOT EXISTS (
        SELECT
        FROM pg_catalog.pg_class AS version
        WHERE version.relnamespace = pg_class.relnamespace
            AND version.relname = 'pgbackend_revision'
    )
