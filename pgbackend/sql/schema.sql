-- Which revision the log's tables are at. Alembic writes the table; see migrations/env.py.

-- name: find_revision
-- Fails with undefined_table where there is no log; an answer costs one index-less page.
SELECT version_num
FROM {schema}.alembic_version

-- name: has_revision
-- For a transaction that goes on: asks without failing.
SELECT to_regclass(quote_ident({schema_literal}) || '.alembic_version') IS NOT NULL
