-- The assumptions of the fence: see pgbackend/log/requirements.py.

-- name: find_properties
-- The properties of the log's tables that the proof in pgbackend/log/fence.py rests on, from the catalogs.
SELECT
    log.relpersistence = 'p' AND NOT EXISTS (
        SELECT
        FROM pg_catalog.pg_inherits AS part
        JOIN pg_catalog.pg_class AS segment ON segment.oid = part.inhrelid
        WHERE part.inhparent = log.oid
            AND segment.relpersistence <> 'p'
    ) AS events_logged,
    ARRAY(
        SELECT segment.relname::text
        FROM pg_catalog.pg_inherits AS part
        JOIN pg_catalog.pg_class AS segment ON segment.oid = part.inhrelid
        WHERE part.inhparent = log.oid
            AND segment.relpersistence <> 'p'
    ) AS unlogged,
    (
        SELECT kept.relpersistence = 'p'
        FROM pg_catalog.pg_class AS kept
        WHERE kept.oid = to_regclass(quote_ident({schema_literal}) || '.offsets')
    ) AS offsets_logged,
    (
        SELECT life.relpersistence = 'u'
        FROM pg_catalog.pg_class AS life
        WHERE life.oid = to_regclass(quote_ident({schema_literal}) || '.incarnation')
    ) AS incarnation_unlogged,
    EXISTS (
        SELECT
        FROM pg_catalog.pg_index AS key
        WHERE key.indrelid = log.oid
            AND key.indisprimary
            AND key.indisvalid
    ) AS has_primary_key,
    position.attidentity = 'a' AS is_identity,
    EXISTS (
        SELECT
        FROM pg_catalog.pg_depend AS used
        WHERE used.classid = 'pg_catalog.pg_class'::regclass
            AND used.objid = numbers.seqrelid
            AND used.refclassid = 'pg_catalog.pg_class'::regclass
            AND used.refobjid = log.oid
            AND used.refobjsubid = position.attnum
            AND used.deptype = 'i'
    ) AS uses_sequence,
    sequence.relpersistence = 'p' AS sequence_logged,
    format_type(numbers.seqtypid, NULL) AS type,
    numbers.seqincrement AS increment,
    numbers.seqcache AS cache,
    numbers.seqcycle AS cycle,
    numbers.seqmin AS minimum,
    numbers.seqmax AS maximum
FROM pg_catalog.pg_class AS log
JOIN pg_catalog.pg_attribute AS position
    ON position.attrelid = log.oid
    AND position.attname = 'position'
JOIN pg_catalog.pg_class AS sequence
    ON sequence.oid = to_regclass(quote_ident({schema_literal}) || '.events_position_seq')
JOIN pg_catalog.pg_sequence AS numbers ON numbers.seqrelid = sequence.oid
WHERE log.oid = to_regclass(quote_ident({schema_literal}) || '.events');

-- name: find_distributed
-- The tables of the log that Citus distributes.
SELECT {schema}.find_distributed(to_regclass(quote_ident({schema_literal}) || '.events')) AS tables;

-- name: open_appender
-- Makes this transaction an appender that draws no position, and returns its virtual transaction; null on a server whose
-- locks do not show that.
SELECT {schema}.open_appender() AS virtual_transaction;
