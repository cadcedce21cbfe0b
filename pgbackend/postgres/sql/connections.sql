-- Run on each new connection, to make its session what our statements need. See pgbackend/postgres/connections.py.

-- name: prepare_session
-- Overrides what the role, the database, the server or the DSN sets. Timeouts: each statement has one of its own, and
-- the connection of the leases is idle for long. client_min_messages: a commit without its standby causes a warning.
-- Joined with pg_settings, because older servers do not know all of these.
-- Not here: synchronous_commit, search_path, TimeZone and default_transaction_read_only are the user's to set.
-- pgbackend.checked: events are checked before they are sent, so the log need not check them again.
SELECT set_config('pgbackend.checked', 'on', false)
UNION ALL
SELECT set_config(wanted.name, wanted.setting, false)
FROM (
    VALUES
        ('client_min_messages', 'warning'),
        ('default_transaction_isolation', 'read committed'),
        ('default_transaction_deferrable', 'off'),
        ('idle_in_transaction_session_timeout', '60s'),
        ('idle_session_timeout', '0'),
        ('lock_timeout', '0'),
        ('statement_timeout', '0'),
        ('transaction_timeout', '0'),
        ('standard_conforming_strings', 'on'),
        ('DateStyle', 'ISO, MDY'),
        ('IntervalStyle', 'postgres')
) AS wanted (name, setting)
JOIN pg_catalog.pg_settings AS known ON known.name = wanted.name;

-- name: hides_warnings
-- A pooler keeps no settings between statements.
SELECT current_setting('client_min_messages') IN ('error', 'fatal', 'panic') AS hides_warnings
