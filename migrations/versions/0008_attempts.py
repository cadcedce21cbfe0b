"""Failed events and dead letters keep the history of their attempts, across restarts and for every process.

Revision ID: r0008
Revises: r0007

`history` of `redeliveries` and `dead_letters`: a JSON array of the last 20 entries, oldest first. Each is an object:

    at       when it happened, by the server's clock
    what     failed, given up (to the dead-letter dispatcher), buried, redelivered, skipped
    attempt  the number of the attempt that failed; absent for all others
    error    its type and message, at most 500 characters; of an event that was skipped, the role that did it
    id       eight hexadecimal digits, so that a commit that is repeated after a lost answer adds nothing

The numbers of attempts begin again at 1 after `given up` and after `redelivered`. Entries are added by those who write
the rows anyway. Adding the columns rewrites no table, because their default is a constant.

Workers of the former revision go on beside it: their attempts are missing in the history.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0008"
down_revision = "r0007"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            *[f"ALTER TABLE {{schema}}.{table} ADD COLUMN history jsonb NOT NULL DEFAULT '[]'" for table in TABLES],
            JOIN_HISTORY,
            # All who write failed events need it, and it sees nothing but its arguments.
            f"GRANT EXECUTE ON FUNCTION {{schema}}.{JOIN_HISTORY_SIGNATURE} TO PUBLIC",
            _filled_in(BURY, KEPT),
            _filled_in(BURY_SKIPPED, KEPT),
            _filled_in(REDACT_OF, KEPT),
        ),
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            # An upsert depends on all columns of its table, so the former functions come after the column has gone. To
            # drop them would drop their privileges.
            *NO_BURIALS,
            *[f"ALTER TABLE {{schema}}.{table} DROP COLUMN history" for table in TABLES],
            *[_filled_in(text, dict.fromkeys(KEPT, "")) for text in (BURY, BURY_SKIPPED, REDACT_OF)],
            f"DROP FUNCTION {{schema}}.{JOIN_HISTORY_SIGNATURE}",
        ),
    )


TABLES = ("redeliveries", "dead_letters")
JOIN_HISTORY_SIGNATURE = "join_history(jsonb, jsonb)"

# The last 20 entries of both histories; those that are in both come once. The first one may be null.
# PostgreSQL puts the body of such a function into the statement that calls it. One with a subquery is called for each
# row: ten times as long.
JOIN_HISTORY = """
    CREATE FUNCTION {schema}.join_history(kept jsonb, added jsonb) RETURNS jsonb
    LANGUAGE sql
    STABLE
    PARALLEL SAFE
    RETURN jsonb_path_query_array(
        jsonb_path_query_array(
            coalesce(kept, '[]'), '$[*] ? (!(@.id == $added[*].id))', jsonb_build_object('added', added)
        ) || added,
        '$[last-19 to last]'
    )"""

NO_BURIALS = (
    "CREATE OR REPLACE FUNCTION {schema}.bury(letters jsonb) RETURNS bigint LANGUAGE sql RETURN 0",
    "CREATE OR REPLACE FUNCTION {schema}.bury_skipped(name text, skipped bigint) RETURNS bigint LANGUAGE sql RETURN 0",
)

# For the three functions below: what they do with a history.
KEPT = {
    "column": ", history",
    "given": """,
                coalesce(dead.history, '[]')""",
    "declared": ", history jsonb",
    "joined": """,
                history = {schema}.join_history(letter.history, excluded.history)""",
    "read": ", failed.history",
    "skipped": """,
                {schema}.join_history(
                    waiting.history,
                    jsonb_build_array(jsonb_build_object(
                        'at', clock_timestamp(), 'what', 'skipped', 'error', 'Skipped by ' || session_user
                    ))
                )""",
    "redacted": "history = ''[]'', ",
}


def _filled_in(text: str, parts: dict[str, str]) -> str:
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


# As in r0004, with the history that the caller gives. A worker of the former revision gives none.
BURY = """
    CREATE OR REPLACE FUNCTION {schema}.bury(letters jsonb) RETURNS bigint
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH buried AS (
            INSERT INTO {schema}.dead_letters AS letter (
                subscription, position, recorded_at, key_hash, specversion, id, source, type, subject, time,
                datacontenttype, dataschema, partitionkey, extensions, data, data_encoding, attempts, error,
                details{column}
            )
            SELECT held.subscription, event.position, event.recorded_at, event.key_hash, event.specversion, event.id,
                event.source, event.type, event.subject, event.time, event.datacontenttype, event.dataschema,
                event.partitionkey, event.extensions, event.data, event.data_encoding, dead.attempts, dead.error,
                dead.details::json{given}
            FROM jsonb_to_recordset(letters) AS dead (
                subscription text, epoch bigint, owner uuid, position bigint, attempts int, error text,
                details jsonb{declared}
            )
            JOIN {schema}.offsets AS held
                ON held.subscription = dead.subscription
                AND held.epoch = dead.epoch
                AND held.owner = dead.owner
            -- One index lookup for each letter: a join may read the whole log.
            CROSS JOIN LATERAL (
                SELECT found.position, found.recorded_at,
                    {schema}.key_hash(found.partitionkey, found.subject, found.source, found.id) AS key_hash,
                    found.specversion, found.id, found.source, found.type, found.subject, found.time,
                    found.datacontenttype, found.dataschema, found.partitionkey, found.extensions, found.data,
                    found.data_encoding
                FROM {schema}.stored_events AS found
                WHERE found.position = dead.position
                OFFSET 0
            ) AS event
            ORDER BY event.position
            ON CONFLICT (subscription, position) DO UPDATE
            SET attempts = excluded.attempts,
                error = excluded.error,
                details = excluded.details,
                buried_at = now(),
                attempt = 0,
                due_at = NULL,
                started_by = NULL,
                lives = 0{joined}
            RETURNING 1
        )
        SELECT count(*) FROM buried;
    END"""

# As in r0006, with the history of the failed attempts.
BURY_SKIPPED = """
    CREATE OR REPLACE FUNCTION {schema}.bury_skipped(name text, skipped bigint) RETURNS bigint
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH event AS MATERIALIZED (
            SELECT *
            FROM {schema}.stored_events AS found
            WHERE found.position = bury_skipped.skipped
        ),
        waiting AS (
            DELETE FROM {schema}.redeliveries AS failed
            USING event
            WHERE failed.subscription = bury_skipped.name
                AND failed.position = event.position
            RETURNING failed.position, failed.attempt, failed.failure, failed.last_error{read}
        ),
        buried AS (
            INSERT INTO {schema}.dead_letters AS letter (
                subscription, position, recorded_at, key_hash, specversion, id, source, type, subject, time,
                datacontenttype, dataschema, partitionkey, extensions, data, data_encoding, attempts, error,
                details{column}
            )
            SELECT bury_skipped.name, event.position, event.recorded_at,
                {schema}.key_hash(event.partitionkey, event.subject, event.source, event.id),
                event.specversion, event.id, event.source, event.type, event.subject, event.time,
                event.datacontenttype, event.dataschema, event.partitionkey, event.extensions, event.data,
                event.data_encoding,
                coalesce((waiting.failure ->> 'attempts')::integer, waiting.attempt, 0),
                'Skipped by ' || session_user,
                CASE
                    WHEN waiting.last_error IS NULL THEN '{}'
                    ELSE json_build_object('last_error', waiting.last_error)
                END{skipped}
            FROM event
            LEFT JOIN waiting ON waiting.position = event.position
            ON CONFLICT (subscription, position) DO UPDATE
            SET attempts = excluded.attempts,
                error = excluded.error,
                details = excluded.details,
                buried_at = now(),
                attempt = 0,
                due_at = NULL,
                started_by = NULL,
                lives = 0{joined}
            RETURNING 1
        )
        SELECT count(*) FROM buried;
    END"""

# As in r0006. A history goes, because its errors may quote the event, too.
REDACT_OF = """
    CREATE OR REPLACE FUNCTION {schema}.redact_of(
        log regclass, redacted bigint, OUT letters bigint, OUT unsettled text[], OUT tables text[]
    )
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '1s'
    AS $function$
    DECLARE
        schema text := (
            SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = log
        );
        checked text := coalesce(current_setting('pgbackend.checked', true), '');
        source text;
        segment text;
        waiting bigint;
    BEGIN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE invalid_transaction_state
                USING MESSAGE = 'redact() must see what was committed before its locks: use READ COMMITTED';
        END IF;
        EXECUTE format('LOCK TABLE %I.dead_letters IN SHARE ROW EXCLUSIVE MODE', schema);
        tables := '{}';
        -- The check of events refuses the mark. Not in a SET clause: only a superuser may write one for this parameter.
        PERFORM set_config('pgbackend.checked', 'on', true);
        FOREACH source IN ARRAY ARRAY['events', 'kept_events'] LOOP
            -- With the position as a constant, only its segment is locked.
            EXECUTE format('
                UPDATE %I.%I
                SET subject = NULL, time = NULL, datacontenttype = NULL, dataschema = NULL, partitionkey = NULL,
                    extensions = ''{}'', data = NULL, data_encoding = ''redacted''
                WHERE position = %L
                RETURNING tableoid::regclass::text', schema, source, redacted
            ) INTO segment;
            tables := tables || segment;
        END LOOP;
        PERFORM set_config('pgbackend.checked', checked, true);
        EXECUTE format('
            WITH deleted AS (
                DELETE FROM %1$I.dead_letters AS letter
                USING %1$I.subscriptions AS subscription
                WHERE letter.subscription = subscription.name AND letter.position = $1
                RETURNING 1
            )
            SELECT count(*) FROM deleted', schema
        ) INTO letters USING redacted;
        IF letters > 0 THEN
            tables := tables || format('%I.dead_letters', schema);
        END IF;
        -- An error may quote the event. Due at once, because its owner finds it gone then.
        EXECUTE format('
            WITH changed AS (
                UPDATE %1$I.redeliveries AS failed
                SET last_error = ''(redacted)'', failure = NULL, {redacted}due_at = clock_timestamp()
                FROM %1$I.subscriptions AS subscription
                WHERE failed.subscription = subscription.name AND failed.position = $1
                RETURNING 1
            )
            SELECT count(*) FROM changed', schema
        ) INTO waiting USING redacted;
        IF waiting > 0 THEN
            tables := tables || format('%I.redeliveries', schema);
        END IF;
        tables := array_remove(tables, NULL);
        EXECUTE format('
            SELECT coalesce(array_agg(owing.name ORDER BY owing.name), ''{}'')
            FROM (
                SELECT found.subscription AS name FROM %1$I.unsettled($1, $1) AS found
                UNION
                SELECT failed.subscription FROM %1$I.redeliveries AS failed WHERE failed.position = $1
            ) AS owing', schema
        ) INTO unsettled USING redacted;
    END
    $function$"""
