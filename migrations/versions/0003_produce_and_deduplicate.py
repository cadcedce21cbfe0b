"""The SQL function `produce`, for every language that speaks SQL, and deduplication.

Revision ID: r0003
Revises: r0002
"""

from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "r0003"
down_revision = "r0002"


def upgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            DEDUPLICATION,
            RECENT_EVENTS,
            *RECENT_EVENTS_PARTS,
            EVENT_KEY,
            _with_expressions(CLAIM_KEYS_LATER),
            _with_expressions(CLAIM_KEYS),
            CLAIM_KEYS_SOON,
            _with_expressions(CLAIM_NEW_KEYS),
            _with_expressions(BLOCKED_KEYS_OF),
            BLOCKED_KEYS,
            FIRST_COPIES,
            _with_expressions(FORGET_KEYS_OF),
            FORGET_KEYS,
            _with_expressions(ENCODE_EVENT),
            *PRODUCE,
            *[f"REVOKE ALL ON FUNCTION {{schema}}.{signature} FROM PUBLIC" for signature in FUNCTIONS],
        ),
        recent="{schema}.recent_events",
        deduplication="{schema}.deduplication",
    )


def downgrade(*, op: Operations) -> None:
    ddl.run(
        op,
        (
            # Logs that were migrated by an unreleased version have no claim_keys_later().
            *[f"DROP FUNCTION IF EXISTS {{schema}}.{signature}" for signature in FUNCTIONS],
            "DROP TABLE {schema}.recent_events, {schema}.deduplication",
        ),
    )


def _with_expressions(text: str) -> str:
    for name, expression in EXPRESSIONS.items():
        text = text.replace(f"{{{name}}}", expression)
    return text


# At most one row. window_us: 0 for no deduplication.
DEDUPLICATION = """
    CREATE TABLE {schema}.deduplication (
        single boolean NOT NULL DEFAULT true,
        window_us bigint NOT NULL,
        CONSTRAINT deduplication_pkey PRIMARY KEY (single),
        CONSTRAINT deduplication_single CHECK (single),
        CONSTRAINT deduplication_window_not_negative CHECK (window_us >= 0)
    )"""

# The keys of recent events, as claim_keys() has it. bucket: the time since 1970 in pairs of windows; slot: bucket % 3.
# Partitions are emptied as a whole, so nothing is left to vacuum.
RECENT_EVENTS = """
    CREATE TABLE {schema}.recent_events (
        slot smallint NOT NULL,
        bucket bigint NOT NULL,
        key bytea NOT NULL,
        CONSTRAINT recent_events_pkey PRIMARY KEY (bucket, key, slot)
    ) PARTITION BY LIST (slot)"""
RECENT_EVENTS_PARTS = [
    f"""
    CREATE TABLE {{schema}}.recent_events_{slot} PARTITION OF {{schema}}.recent_events FOR VALUES IN ({slot})
    WITH (autovacuum_enabled = false)"""
    for slot in range(3)
]

# As `key_of` in pgbackend/log/deduplication.py.
EVENT_KEY = """
    CREATE FUNCTION {schema}.event_key(source text, id text) RETURNS bytea
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
    RETURN substr(sha256(convert_to(source, 'UTF8') || decode('00', 'hex') || convert_to(id, 'UTF8')), 1, 16)"""

# Claims keys that the caller's transaction has claimed up to the bucket `held`, for the buckets that its window reaches
# by now. Returns those that it does not get: another transaction has appended their events meanwhile.
CLAIM_KEYS_LATER = """
    CREATE FUNCTION {schema}.claim_keys_later(keys bytea[], held bigint) RETURNS bytea[]
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH reached AS MATERIALIZED (
            SELECT bucket.number
            FROM {schema}.deduplication AS stored
            CROSS JOIN generate_series(
                greatest(claim_keys_later.held + 1, {clock_us} / (2 * stored.window_us)),
                ({clock_us} + stored.window_us) / (2 * stored.window_us)
            ) AS bucket (number)
        ),
        claimed AS (
            INSERT INTO {schema}.recent_events (slot, bucket, key)
            SELECT reached.number % 3, reached.number, given.key
            FROM reached
            CROSS JOIN unnest(claim_keys_later.keys) AS given (key)
            ORDER BY reached.number, given.key
            ON CONFLICT DO NOTHING
            RETURNING recent_events.bucket, recent_events.key
        ),
        refused AS MATERIALIZED (
            SELECT DISTINCT given.key
            FROM reached
            CROSS JOIN unnest(claim_keys_later.keys) AS given (key)
            WHERE (reached.number, given.key) NOT IN (SELECT claimed.bucket, claimed.key FROM claimed)
        )
        SELECT CASE
            WHEN NOT EXISTS (SELECT FROM refused) THEN '{}'::bytea[]
            WHEN pg_logical_emit_message(true, 'pgbackend', 'repeat') IS NOT NULL
                THEN ARRAY(SELECT refused.key FROM refused)
        END;
    END"""

# Claims these keys for the caller's transaction, and returns those that it does not get: an event with such a key is
# in the log, or in the transaction itself, and must not be appended. All keys are claimed if the log does not
# deduplicate. Null, and none is claimed, if the window is not the one that the caller knows.
# Time is divided into buckets, each as long as two windows. A key goes into the current bucket, and into the next one
# if that begins within a window, so a copy that follows within the window finds it in its own current bucket, wherever
# an edge lies. A copy from before, because the clock was set back by up to a window, finds it in its own current bucket
# or in its own next one. It finds it by the unique index, which also has the keys of transactions that are open: those
# are waited for.
# Buckets of one window would need two keys for every event. These need 1.5, and keep them for three windows at most.
# All transactions claim in the order of buckets and keys: ORDER BY reads all of `now` before `ahead` begins. So two of
# them never wait for each other, unless one claims twice.
# A claim may wait for a first copy that is rolled back in the end, and its own buckets may pass meanwhile. So it looks
# at the clock again, last of all, and then claims for the buckets that the window has come to reach. PostgreSQL plans
# that in a function of its own: in this statement it took 0.4 ms more each time.
# A repeat is acknowledged because of another transaction's commit. The message makes this commit as durable as one that
# appends: it waits for the WAL, and for a synchronous standby.
CLAIM_KEYS = """
    CREATE FUNCTION {schema}.claim_keys(keys bytea[], known_us bigint DEFAULT NULL) RETURNS bytea[]
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH clock AS MATERIALIZED (
            SELECT {clock_us} AS us
        ),
        held AS MATERIALIZED (
            SELECT
                clock.us / (2 * stored.window_us) AS first,
                (clock.us + stored.window_us) / (2 * stored.window_us) AS last,
                stored.window_us
            FROM clock
            CROSS JOIN {schema}.deduplication AS stored
            WHERE stored.window_us > 0
                AND (claim_keys.known_us IS NULL OR stored.window_us = claim_keys.known_us)
        ),
        now AS (
            INSERT INTO {schema}.recent_events (slot, bucket, key)
            SELECT held.first % 3, held.first, given.key
            FROM held
            CROSS JOIN unnest(claim_keys.keys) AS given (key)
            ORDER BY given.key
            ON CONFLICT DO NOTHING
            RETURNING recent_events.key
        ),
        ahead AS (
            INSERT INTO {schema}.recent_events (slot, bucket, key)
            SELECT held.last % 3, held.last, now.key
            FROM held
            CROSS JOIN now
            WHERE held.last > held.first
            ORDER BY now.key
            ON CONFLICT DO NOTHING
            RETURNING recent_events.key
        ),
        claimed AS (
            SELECT now.key
            FROM now
            CROSS JOIN held
            WHERE held.last = held.first
            UNION ALL
            SELECT ahead.key
            FROM ahead
        )
        SELECT CASE
            WHEN (SELECT count(*) FROM claimed) = cardinality(claim_keys.keys) THEN '{}'::bytea[]
            WHEN NOT EXISTS (SELECT FROM held) THEN CASE WHEN claim_keys.known_us IS NULL THEN '{}'::bytea[] END
            WHEN pg_logical_emit_message(true, 'pgbackend', 'repeat') IS NOT NULL THEN ARRAY(
                SELECT given.key
                FROM unnest(claim_keys.keys) AS given (key)
                WHERE given.key NOT IN (SELECT claimed.key FROM claimed)
            )
        END || CASE
            WHEN (SELECT ({clock_us} + held.window_us) / (2 * held.window_us) > held.last FROM held)
                THEN {schema}.claim_keys_later(ARRAY(SELECT claimed.key FROM claimed), (SELECT held.last FROM held))
        END;
    END"""

# The same, without waiting long for another transaction with such a key: lock_not_available, and the caller's
# transaction has failed.
CLAIM_KEYS_SOON = """
    CREATE FUNCTION {schema}.claim_keys_soon(keys bytea[], known_us bigint) RETURNS bytea[]
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '20ms'
    BEGIN ATOMIC
        SELECT {schema}.claim_keys(claim_keys_soon.keys, claim_keys_soon.known_us);
    END"""

# The same for keys that are probably new, which follow each other in order, 16 bytes each. True if all are claimed;
# false if the log has another window. A repeat is a unique_violation. For 1,000 keys, plain INSERTs take half the time
# that ON CONFLICT takes, and one value takes 1 ms less than an array. statement_timestamp(): both INSERTs have the same
# buckets.
CLAIM_NEW_KEYS = """
    CREATE FUNCTION {schema}.claim_new_keys(keys bytea, known_us bigint) RETURNS boolean
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '20ms'
    BEGIN ATOMIC
        WITH held AS MATERIALIZED (
            SELECT {statement_us} / (2 * stored.window_us) AS first
            FROM {schema}.deduplication AS stored
            WHERE stored.window_us > 0
                AND stored.window_us = claim_new_keys.known_us
        )
        INSERT INTO {schema}.recent_events (slot, bucket, key)
        SELECT held.first % 3, held.first, substr(claim_new_keys.keys, place, 16)
        FROM held
        CROSS JOIN generate_series(1, octet_length(claim_new_keys.keys), 16) AS place;
        WITH held AS MATERIALIZED (
            SELECT ({statement_us} + stored.window_us) / (2 * stored.window_us) AS last
            FROM {schema}.deduplication AS stored
            WHERE stored.window_us > 0
                AND stored.window_us = claim_new_keys.known_us
                AND ({statement_us} + stored.window_us) / (2 * stored.window_us)
                    > {statement_us} / (2 * stored.window_us)
        )
        INSERT INTO {schema}.recent_events (slot, bucket, key)
        SELECT held.last % 3, held.last, substr(claim_new_keys.keys, place, 16)
        FROM held
        CROSS JOIN generate_series(1, octet_length(claim_new_keys.keys), 16) AS place;
        SELECT EXISTS (
            SELECT
            FROM {schema}.deduplication AS stored
            WHERE stored.window_us > 0
                AND stored.window_us = claim_new_keys.known_us
        );
    END"""

# Those of the keys that an open transaction has claimed. Claims none: each one is undone at once.
BLOCKED_KEYS_OF = """
    CREATE FUNCTION {schema}.blocked_keys_of(recent regclass, deduplication regclass, keys bytea[]) RETURNS bytea[]
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '1ms'
    AS $function$
    DECLARE
        claim CONSTANT text := format(
            'INSERT INTO %s (slot, bucket, key) SELECT bucket %% 3, bucket, $1 '
            'FROM generate_series($2 / (2 * $3), ($2 + $3) / (2 * $3)) AS bucket ON CONFLICT DO NOTHING',
            recent
        );
        window_us bigint;
        blocked bytea[] := '{}';
        one bytea;
    BEGIN
        EXECUTE format('SELECT nullif(window_us, 0) FROM %s', deduplication) INTO window_us;
        FOREACH one IN ARRAY keys LOOP
            BEGIN
                EXECUTE claim USING one, {clock_us}, window_us;
                RAISE no_data_found;
            EXCEPTION
                WHEN lock_not_available THEN
                    blocked := blocked || one;
                WHEN no_data_found THEN
                    NULL;
            END;
        END LOOP;
        RETURN blocked;
    END
    $function$"""

BLOCKED_KEYS = """
    CREATE FUNCTION {schema}.blocked_keys(keys bytea[]) RETURNS bytea[]
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT {schema}.blocked_keys_of({recent}::regclass, {deduplication}::regclass, blocked_keys.keys);
    END"""

# The numbers, from 1, of the events that the caller's transaction should append, given the source and id of each: one
# of each pair, and none that was appended within the window. All of them if the log does not deduplicate.
FIRST_COPIES = """
    CREATE FUNCTION {schema}.first_copies(sources text[], ids text[]) RETURNS integer[]
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        WITH given AS MATERIALIZED (
            SELECT
                pair.number::integer AS number,
                CASE
                    WHEN EXISTS (SELECT FROM {schema}.deduplication AS stored WHERE stored.window_us > 0)
                        THEN {schema}.event_key(pair.source, pair.id)
                END AS key
            FROM unnest(first_copies.sources, first_copies.ids) WITH ORDINALITY AS pair (source, id, number)
        ),
        claimed AS MATERIALIZED (
            SELECT {schema}.claim_keys(array_agg(DISTINCT given.key)) AS repeats
            FROM given
            WHERE given.key IS NOT NULL
            HAVING count(*) > 0
        )
        SELECT coalesce(array_agg(found.number ORDER BY found.number), '{}')
        FROM (
            SELECT given.number
            FROM given
            WHERE given.key IS NULL
            UNION ALL
            SELECT min(given.number)
            FROM given
            CROSS JOIN claimed
            WHERE given.key <> ALL (claimed.repeats)
            GROUP BY given.key
        ) AS found;
    END"""

# Empties the partitions that hold neither the current nor the next bucket, and returns how many it has emptied. The
# bucket is computed again under the lock, because windows may have passed since: no key of a live bucket is deleted.
# A clock that was set back by up to a window has left keys in the bucket after the next one. Those further ahead are
# left from a shorter window: a day's keys would stay for 56 years if the window became two days.
FORGET_KEYS_OF = """
    CREATE FUNCTION {schema}.forget_keys_of(recent regclass, deduplication regclass) RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '50ms'
    AS $function$
    DECLARE
        part record;
        current bigint;
        found boolean;
        emptied integer := 0;
    BEGIN
        FOR part IN
            SELECT inhrelid::regclass AS name, right(relname, 1)::integer AS slot
            FROM pg_inherits
            JOIN pg_class ON pg_class.oid = inhrelid
            WHERE inhparent = recent
            ORDER BY relname
        LOOP
            FOR is_locked IN 0..1 LOOP
                IF is_locked = 1 THEN
                    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', part.name);
                END IF;
                EXECUTE format(
                    'SELECT {clock_us} / nullif(2 * window_us, 0) FROM %s',
                    deduplication
                ) INTO current;
                EXECUTE format('SELECT EXISTS (SELECT FROM %s)', part.name) INTO found;
                EXIT WHEN NOT found OR part.slot IN (current % 3, (current + 1) % 3);
                IF is_locked = 1 THEN
                    EXECUTE format(
                        'SELECT EXISTS (SELECT FROM %s WHERE bucket BETWEEN $1 AND $1 + 2)', part.name
                    ) INTO found USING current;
                    IF NOT found THEN
                        EXECUTE format('TRUNCATE TABLE %s', part.name);
                        emptied := emptied + 1;
                    END IF;
                END IF;
            END LOOP;
        END LOOP;
        RETURN emptied;
    END
    $function$"""

FORGET_KEYS = """
    CREATE FUNCTION {schema}.forget_keys() RETURNS integer
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        SELECT {schema}.forget_keys_of({recent}::regclass, {deduplication}::regclass);
    END"""


# No function body has a backslash: its meaning depends on a setting of the caller's session. These are characters of
# regular expressions, as SQL that PostgreSQL computes once a session. They are UTF8's.

# The characters that CloudEvents forbids in a String, as in pgbackend/codec/attributes.py. PostgreSQL's text has
# neither zeros nor surrogates.
FORBIDDEN = (
    "'[' || chr(1) || '-' || chr(31) || chr(127) || '-' || chr(159) || chr(64976) || '-' || chr(65007) || "
    + " || ".join(f"chr({plane << 16 | 0xFFFE}) || chr({plane << 16 | 0xFFFF})" for plane in range(17))
    + " || ']'"
)
# The characters that no URI-reference has, white space as Python sees it included. A backslash is escaped by another.
NOT_IN_URIS = (
    "'[' || chr(1) || '- \"<>' || chr(92) || chr(92) || '^`{|}' || chr(127) || chr(160) || chr(5760) || chr(8192) || "
    "'-' || chr(8202) || chr(8232) || chr(8233) || chr(8239) || chr(8287) || chr(12288) || ']'"
)
# A percent sign that begins no escape.
NOT_AN_ESCAPE = "%(?![0-9A-Fa-f][0-9A-Fa-f])"
TOKEN = "[!#$%&''*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - HTTP's token
YEAR = "[0-9][0-9][0-9][0-9]"
# As `is_time` in pgbackend/codec/attributes.py.
TIME = (
    "^(?!0000)"
    f"({YEAR}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
    f"|{YEAR}-(0[13-9]|1[0-2])-(29|30)"
    f"|{YEAR}-(0[13578]|1[02])-31"
    "|([0-9][0-9](0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
    "[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)([.][0-9]+)?"
    "([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)

EXPRESSIONS = {
    "forbidden": FORBIDDEN,
    "not_in_uris": NOT_IN_URIS,
    "not_an_escape": NOT_AN_ESCAPE,
    "token": TOKEN,
    "time": TIME,
    "clock_us": "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
    "statement_us": "(extract(epoch FROM statement_timestamp()) * 1000000)::bigint",
}

# Raises an error unless Python would take this event, and says how the log stores its data and extensions. `form` says
# what the data was: text, jsonb or bytea; the octets of bytea are in `octets`. No comparison depends on a collation,
# because a caller's texts may have several.
ENCODE_EVENT = """
    CREATE FUNCTION {schema}.encode_event(
        form text, type text, source text, data text, INOUT octets bytea, subject text, id text, "time" text,
        datacontenttype text, dataschema text, partitionkey text, extensions jsonb,
        OUT content_type text, OUT encoding text, OUT more json
    )
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
    AS $function$
    DECLARE
        forbidden CONSTANT text := {forbidden};
        not_in_uris CONSTANT text := {not_in_uris};
        white CONSTANT text := ' ' || chr(9) || chr(10) || chr(13);
        texts CONSTANT text[] := ARRAY[
            type, source, id, subject, "time", datacontenttype, dataschema, partitionkey
        ];
        names CONSTANT text[] := ARRAY[
            'type', 'source', 'id', 'subject', 'time', 'datacontenttype', 'dataschema', 'partitionkey'
        ];
        is_json boolean := false;
        size bigint;
        fault text;
        parsed json;
    BEGIN
        content_type := datacontenttype;
        more := '{}';
        FOR number IN 1..8 LOOP
            IF texts[number] IS NULL THEN
                IF number <= 3 THEN
                    fault := format('attribute "%s" is missing', names[number]);
                END IF;
            ELSIF octet_length(texts[number]) = 0 THEN
                fault := format('attribute "%s" is empty', names[number]);
            ELSIF texts[number] COLLATE "C" ~ forbidden THEN
                fault := format('attribute "%s" has a control character or noncharacter', names[number]);
            END IF;
            EXIT WHEN fault IS NOT NULL;
        END LOOP;
        fault := coalesce(fault, CASE
            WHEN source COLLATE "C" ~ not_in_uris OR source COLLATE "C" ~ '{not_an_escape}'
                THEN format('attribute "source" is %L, and no URI-reference', left(source, 80))
            WHEN "time" COLLATE "C" !~ '{time}'
                THEN format('attribute "time" is %L, and no RFC 3339 timestamp', left("time", 80))
            WHEN length(datacontenttype) > 1000 OR datacontenttype COLLATE "C" !~ '^{token}/{token}( *;[ -~]*)?$'
                THEN format('attribute "datacontenttype" is %L, and no media type', left(datacontenttype, 80))
            WHEN dataschema COLLATE "C" !~ '^([A-Za-z][A-Za-z0-9+.-]*:.|#)'
                OR dataschema COLLATE "C" ~ not_in_uris OR dataschema COLLATE "C" ~ '{not_an_escape}'
                THEN format('attribute "dataschema" is %L, and no absolute URI', left(dataschema, 80))
            WHEN jsonb_typeof(extensions) <> 'object' THEN '"extensions" is no JSON object'
        END);
        IF fault IS NULL AND extensions <> '{}' THEN
            SELECT
                '{' || coalesce(string_agg(to_json(member.name)::text || ':' || member.value::text, ','), '') || '}',
                min(member.fault COLLATE "C")
            INTO more, fault
            FROM (
                SELECT
                    given.key AS name,
                    given.value,
                    CASE
                        WHEN given.key COLLATE "C" !~ '^[a-z0-9]+$' OR given.key = 'data'
                            THEN format(
                                '%L is no name of an attribute: expected lower-case letters and digits, and not "data"',
                                left(given.key, 80)
                            )
                        WHEN given.key = 'specversion' OR given.key COLLATE "C" = ANY (names)
                            THEN format('"extensions" has the member "%s", which has a parameter of its own', given.key)
                        WHEN jsonb_typeof(given.value) = 'boolean' THEN NULL
                        WHEN jsonb_typeof(given.value) = 'string'
                            THEN CASE WHEN given.value #>> '{}' COLLATE "C" ~ forbidden
                                THEN format('attribute "%s" has a control character or noncharacter', given.key)
                            END
                        WHEN jsonb_typeof(given.value) = 'number' AND given.value::text COLLATE "C" ~ '^-?[0-9]+$'
                            THEN CASE WHEN given.value::numeric NOT BETWEEN -2147483648 AND 2147483647
                                THEN format('attribute "%s" is an integer beyond 32 bits: send a string', given.key)
                            END
                        ELSE format(
                            'attribute "%s" is neither a string nor an integer nor a boolean: send a string',
                            given.key
                        )
                    END AS fault
                FROM jsonb_each(extensions) AS given
                WHERE jsonb_typeof(given.value) <> 'null'
            ) AS member;
        END IF;
        IF fault IS NULL AND (data IS NOT NULL OR octets IS NOT NULL) THEN
            content_type := coalesce(datacontenttype, 'application/json');
            is_json := lower(rtrim(split_part(content_type, ';', 1)) COLLATE "C") ~ '[/+]json$';
            IF form = 'bytea' THEN
                encoding := 'base64';
            ELSIF form = 'jsonb' THEN
                encoding := 'json';
                IF NOT is_json AND left(data, 1) = '"' THEN
                    encoding := 'text';
                    data := data::jsonb #>> '{}';
                END IF;
            ELSIF is_json THEN
                encoding := 'json';
                BEGIN
                    parsed := data::json;
                EXCEPTION WHEN data_exception OR statement_too_complex THEN
                    fault := format(
                        '"data" is no JSON (%s), and its content type is: give another datacontenttype, or to_jsonb()',
                        SQLERRM
                    );
                END;
                data := btrim(data, white);
            ELSE
                encoding := 'text';
            END IF;
            octets := coalesce(octets, convert_to(data, 'UTF8'));
        END IF;
        size := octet_length(concat(
            '1.0', type, source, id, subject, "time", content_type, dataschema, partitionkey, more
        ));
        fault := coalesce(fault, CASE
            WHEN size > 65536
                THEN format('its attributes have %s bytes, more than 65536: move the long ones into its data', size)
            WHEN size + octet_length(octets) > 1048576
                THEN format(
                    'it has %s bytes, more than 1048576: keep its data elsewhere and send a reference ("dataref")',
                    size + octet_length(octets)
                )
        END);
        IF fault IS NOT NULL THEN
            RAISE check_violation USING
                MESSAGE = format('The event was not stored: %s.', fault),
                CONSTRAINT = 'events_valid';
        END IF;
    END
    $function$"""
ENCODED_TYPES = "text, text, text, text, bytea, text, text, text, text, text, text, jsonb"

# A literal without a type is text to PostgreSQL. So is an absent one, because only that form has a default: an event
# without data. With the caller's rights. Null for a repeat.
PRODUCE = tuple(
    """
    CREATE FUNCTION {schema}.produce(
        type text,
        source text,
        data {form},
        subject text DEFAULT NULL,
        id text DEFAULT gen_random_uuid()::text,
        "time" text DEFAULT NULL,
        datacontenttype text DEFAULT NULL,
        dataschema text DEFAULT NULL,
        partitionkey text DEFAULT NULL,
        extensions jsonb DEFAULT '{}'
    ) RETURNS bigint
    LANGUAGE sql
    SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        INSERT INTO {schema}.events (
            id, source, type, subject, time, datacontenttype, dataschema, partitionkey, extensions, data, data_encoding
        )
        SELECT produce.id, produce.source, produce.type, produce.subject, produce.time, encoded.content_type,
            produce.dataschema, produce.partitionkey, encoded.more, encoded.octets, encoded.encoding
        FROM {schema}.encode_event(
            {given}, produce.subject, produce.id, produce.time, produce.datacontenttype, produce.dataschema,
            produce.partitionkey, produce.extensions
        ) AS encoded
        WHERE CASE
            WHEN EXISTS (SELECT FROM {schema}.deduplication AS stored WHERE stored.window_us > 0)
                THEN {schema}.first_copies(ARRAY[produce.source], ARRAY[produce.id]) = ARRAY[1]
            ELSE true
        END
        RETURNING position;
    END""".replace("{form}", form).replace("{given}", given)
    for form, given in (
        ("text DEFAULT NULL", "'text', produce.type, produce.source, produce.data, NULL"),
        ("jsonb", "'jsonb', produce.type, produce.source, produce.data::text, NULL"),
        ("bytea", "'bytea', produce.type, produce.source, NULL, produce.data"),
    )
)
# In the order in which they can be dropped.
FUNCTIONS = (
    *[f"produce(text, text, {form}, text, text, text, text, text, text, jsonb)" for form in ("text", "jsonb", "bytea")],
    f"encode_event({ENCODED_TYPES})",
    "first_copies(text[], text[])",
    "claim_keys_soon(bytea[], bigint)",
    "claim_new_keys(bytea, bigint)",
    "claim_keys(bytea[], bigint)",
    "claim_keys_later(bytea[], bigint)",
    "blocked_keys(bytea[])",
    "blocked_keys_of(regclass, regclass, bytea[])",
    "forget_keys()",
    "forget_keys_of(regclass, regclass)",
    "event_key(text, text)",
)
