"""Repair: failed events can be tried now, one event can be skipped, and one can be redacted.

Revision ID: r0006
Revises: r0005

A redacted event keeps its row: position, date, and the attributes that CloudEvents requires. Everything else is gone,
and `data_encoding` says `redacted`, which no INSERT can say that is checked. `stored_events` lacks it, so that nothing
copies, buries or dispatches it. `all_events` has it, so that readers count it as skipped.

The UPDATE of `redact` is the one exception to a log of inserts only. It draws no position and changes none, and the
index keeps all rows, so the fence proves what it proved before. While it runs it has the lock that an INSERT has, so a
reader that meets a hole waits for it as for any appender: one row is written then.

Workers of earlier versions go on beside it. They dispatch what is left of a redacted event.
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0006"
down_revision = "r0005"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            "ALTER TABLE {schema}.subscriptions ADD COLUMN retried_at timestamptz",
            REDACTIONS,
            ALL_EVENTS,
            f"CREATE OR REPLACE VIEW {{schema}}.stored_events AS {STORED_EVENTS} WHERE {NOT_REDACTED}",
            KEY_HASHES.replace("{wanted}", f"AND {NOT_REDACTED}"),
            WAITING_EVENTS,
            BURY_SKIPPED,
            REDACT_OF,
            REDACT,
            *[f"REVOKE ALL ON FUNCTION {{schema}}.{signature} FROM PUBLIC" for signature in FUNCTIONS],
        ),
        events="{schema}.events",
    )


def downgrade(*, op: Operations) -> None:
    # Redacted events stay redacted. Former versions deliver what is left of them.
    ddl.run(
        op,
        (
            *[f"DROP FUNCTION {{schema}}.{signature}" for signature in FUNCTIONS],
            KEY_HASHES.replace("{wanted}", ""),
            f"CREATE OR REPLACE VIEW {{schema}}.stored_events AS {FORMER_STORED_EVENTS}",
            "DROP VIEW {schema}.all_events",
            "DROP TABLE {schema}.redactions",
            "ALTER TABLE {schema}.subscriptions DROP COLUMN retried_at",
        ),
    )


_COLUMNS = """position, recorded_at, specversion, id, source, type, subject, time, datacontenttype, dataschema,
        partitionkey, extensions, data, data_encoding"""

NOT_REDACTED = "data_encoding IS DISTINCT FROM 'redacted'"

# Which events were redacted, when, and by which role.
REDACTIONS = """
    CREATE TABLE {schema}.redactions (
        position bigint NOT NULL,
        redacted_at timestamptz NOT NULL DEFAULT now(),
        redacted_by text NOT NULL,
        CONSTRAINT redactions_pkey PRIMARY KEY (position)
    )"""

FORMER_STORED_EVENTS = """
    SELECT {columns}
    FROM {schema}.events
    UNION ALL
    SELECT {columns}
    FROM {schema}.kept_events""".replace("{columns}", _COLUMNS)

ALL_EVENTS = f"CREATE VIEW {{schema}}.all_events AS {FORMER_STORED_EVENTS}"

STORED_EVENTS = """
    SELECT {columns}
    FROM {schema}.all_events""".replace("{columns}", _COLUMNS)

# As in r0002, without redacted events, whose keys are gone.
KEY_HASHES = """
    CREATE OR REPLACE FUNCTION {schema}.key_hashes(ranges int8multirange)
    RETURNS TABLE (event_position bigint, event_hash bigint)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT event.position, event.key_hash
        FROM unnest(key_hashes.ranges) AS wanted (range)
        CROSS JOIN LATERAL (
            SELECT
                held.position,
                {schema}.key_hash(held.partitionkey, held.subject, held.source, held.id) AS key_hash
            FROM {schema}.events AS held
            WHERE held.position >= lower(wanted.range)
                AND held.position < upper(wanted.range)
                {wanted}
            ORDER BY held.position
            OFFSET 0
        ) AS event;
    END"""

# The failed events of a subscription, in order, at most 1,000: for roles that may not read events. An event whose row
# is gone has no id.
WAITING_EVENTS = """
    CREATE FUNCTION {schema}.waiting_events(name text, above bigint, most integer)
    RETURNS TABLE (
        "position" bigint, id text, source text, type text, attempts integer, due_at timestamptz, error text,
        given_up boolean
    )
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT waiting.position, event.id, event.source, event.type, waiting.attempt, waiting.due_at,
            waiting.last_error, waiting.failure IS NOT NULL
        FROM {schema}.redeliveries AS waiting
        LEFT JOIN LATERAL (
            SELECT found.id, found.source, found.type
            FROM {schema}.stored_events AS found
            WHERE found.position = waiting.position
            OFFSET 0
        ) AS event ON true
        WHERE waiting.subscription = waiting_events.name
            AND waiting.position > waiting_events.above
        ORDER BY waiting.position
        LIMIT least(greatest(waiting_events.most, 0), 1000);
    END"""

# The event becomes a dead letter of the subscription, which does not try it again. Its error names the role that is
# connected. Returns the number of letters; 0, and nothing has changed, if the event is not in the log.
BURY_SKIPPED = """
    CREATE FUNCTION {schema}.bury_skipped(name text, skipped bigint) RETURNS bigint
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
            RETURNING failed.position, failed.attempt, failed.failure, failed.last_error
        ),
        buried AS (
            INSERT INTO {schema}.dead_letters (
                subscription, position, recorded_at, key_hash, specversion, id, source, type, subject, time,
                datacontenttype, dataschema, partitionkey, extensions, data, data_encoding, attempts, error, details
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
                END
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
                lives = 0
            RETURNING 1
        )
        SELECT count(*) FROM buried;
    END"""

# Redacts an event and its copies. `tables`: those with changed rows, whose old versions stay until a VACUUM; empty if
# nothing of the event is there. `unsettled`: the subscriptions that have not settled it.
# No copy survives. The lock on `dead_letters` waits for each statement that may copy from what it has read before, and
# each one that begins afterwards reads the redacted row: a statement has its locks before it takes its snapshot. A copy
# of retention's comes before the UPDATE, which waits for the segment, or has the redacted row.
REDACT_OF = """
    CREATE FUNCTION {schema}.redact_of(
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
                SET last_error = ''(redacted)'', failure = NULL, due_at = clock_timestamp()
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

# The same, on record. Again, it says who did it first. Null: there is nothing at this position.
REDACT = """
    CREATE FUNCTION {schema}.redact(
        redacted bigint,
        OUT redacted_at timestamptz, OUT redacted_by text, OUT letters bigint, OUT unsettled text[], OUT tables text[]
    )
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH done AS MATERIALIZED (
            SELECT found.letters, found.unsettled, found.tables
            FROM {schema}.redact_of({events}::regclass, redact.redacted) AS found
        ),
        noted AS (
            INSERT INTO {schema}.redactions AS stored (position, redacted_by)
            SELECT redact.redacted, session_user
            FROM done
            WHERE done.tables <> '{}'
            ON CONFLICT (position) DO UPDATE
            SET redacted_by = stored.redacted_by
            RETURNING stored.redacted_at, stored.redacted_by
        )
        SELECT noted.redacted_at, noted.redacted_by, done.letters, done.unsettled, done.tables
        FROM noted
        CROSS JOIN done;
    END"""

FUNCTIONS = (
    "redact(bigint)",
    "redact_of(regclass, bigint)",
    "bury_skipped(text, bigint)",
    "waiting_events(text, bigint, integer)",
)
