-- Redacting one event: a function of the log does it with its owner's rights.

-- name: redact
-- Waits a second for the locks. `redacted_at` is null if there is nothing at this position.
SELECT redacted_at, redacted_by, letters, unsettled, tables
FROM {schema}.redact($1);
