-- Committing offsets: one statement for all shards of a process, each row under its epoch (I5).

-- name: commit_offsets
-- Rows are found by the ctid that the last commit returned: under a snapshot held for an hour the index keeps every old
-- version's entry, and a look-up by key went from 0.3 to 5.8 ms after 20,000 commits, by ctid it stayed flat.
-- A row that is not returned was moved by somebody else, or has another owner: see `commit_by_key`.
UPDATE {schema}.offsets AS stored
SET position = marked.position,
    pending = marked.pending::int8multirange,
    holes = marked.holes::int8multirange,
    completed_at = CASE WHEN marked.complete THEN coalesce(stored.completed_at, now()) ELSE stored.completed_at END
FROM unnest($1::bigint[], $2::tid[], $3::bigint[], $4::text[], $5::boolean[], $8::text[])
    AS marked (epoch, place, position, pending, complete, holes)
WHERE stored.ctid = marked.place
    AND stored.epoch = marked.epoch
    AND stored.owner = $6
    AND stored.position <= marked.position
    AND (SELECT id FROM {schema}.life) = $7
RETURNING stored.epoch, stored.ctid;

-- name: commit_by_key
-- The same by primary key, together with what became of failed events: an event is either in the log's path or in
-- redelivery, never in both, because both change in this one statement. Every part but the first is fenced by it.
-- An event whose row is gone is neither scheduled nor buried: it is returned as lost, and recorded as skipped.
WITH marked AS (
    SELECT *
    FROM jsonb_to_recordset($1::jsonb) AS mark (
        subscription text, shards int, shard int, epoch bigint, position bigint, pending text, holes text,
        complete boolean, calm boolean
    )
),
fenced AS (
    UPDATE {schema}.offsets AS stored
    SET position = marked.position,
        pending = marked.pending::int8multirange,
        holes = marked.holes::int8multirange,
        completed_at = CASE WHEN marked.complete THEN coalesce(stored.completed_at, now()) ELSE stored.completed_at END,
        crashes = CASE WHEN marked.calm THEN 0 ELSE stored.crashes END
    FROM marked
    WHERE stored.subscription = marked.subscription
        AND stored.shards = marked.shards
        AND stored.shard = marked.shard
        AND stored.epoch = marked.epoch
        AND stored.owner = $2
        AND stored.position <= marked.position
        AND (SELECT id FROM {schema}.life) = $3
    RETURNING stored.epoch, stored.subscription, stored.ctid
),
scheduled AS (
    INSERT INTO {schema}.redeliveries AS kept
        (subscription, position, key_hash, attempt, due_at, last_error, failure, begun)
    SELECT fenced.subscription, due.position, event.key_hash, due.attempt,
        clock_timestamp() + make_interval(secs => due.delay), due.error, due.failure::json, due.begun
    FROM jsonb_to_recordset($4::jsonb) AS due (
        epoch bigint, position bigint, attempt int, delay float8, error text, failure jsonb, begun boolean
    )
    JOIN fenced USING (epoch)
    JOIN {schema}.events AS event ON event.position = due.position
    ON CONFLICT (subscription, position) DO UPDATE
    SET attempt = excluded.attempt,
        due_at = excluded.due_at,
        last_error = excluded.last_error,
        failure = excluded.failure,
        begun = excluded.begun
),
forgotten AS (
    DELETE FROM {schema}.redeliveries AS kept
    USING fenced
    JOIN jsonb_to_recordset($5::jsonb) AS done (epoch bigint, position bigint) USING (epoch)
    WHERE kept.subscription = fenced.subscription
        AND kept.position = done.position
),
buried AS MATERIALIZED (
    -- With the owner's rights, by a function of the log. It is called only if there are letters.
    SELECT {schema}.bury(
        jsonb_agg(dead.letter || jsonb_build_object('subscription', fenced.subscription, 'owner', $2::uuid))
    ) AS letters
    FROM jsonb_array_elements($6::jsonb) AS dead (letter)
    JOIN fenced ON fenced.epoch = (dead.letter ->> 'epoch')::bigint
    HAVING count(*) > 0
),
delivered_letters AS (
    DELETE FROM {schema}.dead_letters AS letter
    USING fenced
    JOIN jsonb_to_recordset($7::jsonb) AS done (epoch bigint, letter bigint) USING (epoch)
    WHERE letter.letter_id = done.letter
        AND letter.subscription = fenced.subscription
),
failed_letters AS (
    UPDATE {schema}.dead_letters AS letter
    SET attempt = failed.attempt,
        -- Once for each attempt: it may have been noted before, as one that had begun.
        attempts = letter.attempts + failed.attempt - letter.attempt,
        error = failed.error,
        details = failed.details::json,
        due_at = clock_timestamp() + make_interval(secs => failed.delay),
        begun = failed.begun
    FROM jsonb_to_recordset($8::jsonb) AS failed (
        epoch bigint, letter bigint, attempt int, delay float8, error text, details jsonb, begun boolean
    )
    JOIN fenced USING (epoch)
    WHERE letter.letter_id = failed.letter
        AND letter.subscription = fenced.subscription
),
lost AS (
    -- In ordered modes a scheduled event stays pending, so it is not lost before its last attempt is.
    SELECT fenced.epoch, fenced.subscription, failed.position
    FROM jsonb_to_recordset($4::jsonb || $6::jsonb) AS failed (epoch bigint, position bigint, stays boolean)
    JOIN fenced USING (epoch)
    WHERE failed.stays IS NOT TRUE
        -- One look-up for each: a join may read the whole log.
        AND (SELECT event.position FROM {schema}.events AS event WHERE event.position = failed.position) IS NULL
),
skipped AS (
    INSERT INTO {schema}.skipped (subscription, positions)
    SELECT gone.subscription, fresh
    FROM (
        SELECT subscription, range_agg(positions) AS positions
        FROM (
            SELECT fenced.subscription, int8range(found.lower, found.upper) AS positions
            FROM jsonb_to_recordset($9::jsonb) AS found (epoch bigint, lower bigint, upper bigint)
            JOIN fenced USING (epoch)
            UNION ALL
            SELECT subscription, int8range(position, position + 1)
            FROM lost
        ) AS part
        GROUP BY subscription
    ) AS gone
    CROSS JOIN LATERAL (
        -- Other shards may have met the same gap, and a former owner may have recorded it before it died.
        SELECT coalesce(range_agg(known.positions), '{}') AS positions
        FROM {schema}.skipped AS known
        WHERE known.subscription = gone.subscription
            AND known.positions && range_merge(gone.positions)
    ) AS recorded
    CROSS JOIN LATERAL unnest(gone.positions - recorded.positions) AS fresh
    ON CONFLICT DO NOTHING
    RETURNING subscription, positions
)
SELECT
    epoch,
    ctid,
    (SELECT letters FROM buried) AS letters,  -- asked for, or nothing is buried
    ARRAY (SELECT lost.position FROM lost WHERE lost.epoch = fenced.epoch) AS lost,
    (
        SELECT range_agg(skipped.positions)::text
        FROM skipped
        WHERE skipped.subscription = fenced.subscription
    ) AS skipped
FROM fenced;
