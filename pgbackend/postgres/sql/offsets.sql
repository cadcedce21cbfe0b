-- Committing offsets: one statement for all shards of a process, each row under its epoch (I5).

-- name: commit_offsets
-- Rows are found by the ctid that the last commit returned. Under a snapshot held for an hour the index keeps an entry
-- for every old version: a look-up by key went from 0.3 to 5.8 ms after 20,000 commits, by ctid it stayed flat.
-- A row that is not returned has moved or has another owner: `commit_by_key` tells which.
WITH given AS (
    SELECT marked.*, $7::uuid AS worker, $8::text AS incarnation
    FROM unnest($1::bigint[], $2::tid[], $3::bigint[], $4::text[], $5::text[], $6::boolean[])
        AS marked (epoch, place, position, pending, holes, complete)
)
UPDATE {schema}.offsets AS stored
SET position = given.position,
    pending = given.pending::int8multirange,
    holes = given.holes::int8multirange,
    completed_at = CASE WHEN given.complete THEN coalesce(stored.completed_at, now()) ELSE stored.completed_at END
FROM given
WHERE stored.ctid = given.place
    AND stored.epoch = given.epoch
    AND stored.owner = given.worker
    AND stored.position <= given.position
    AND (SELECT id FROM {schema}.life) = given.incarnation
RETURNING stored.epoch, stored.ctid;

-- name: commit_by_key
-- The same by primary key, together with what became of failed events. Both change in this one statement, so an event is
-- either in the log's path or in redelivery, never in both. Every part after `fenced` reads it, and so is fenced too.
-- An event whose row is gone is neither scheduled nor buried: it is returned as lost, and recorded as skipped.
-- The inputs come first, one set of rows for each kind: see pgbackend/delivery/commit_inputs.py. They are sent as text,
-- because a dispatcher may have set a codec for jsonb on the connection of its transaction.
WITH given AS (
    SELECT $1::uuid AS worker, $2::text AS incarnation
),
marks AS (
    SELECT *
    FROM jsonb_to_recordset($3::text::jsonb) AS mark (
        subscription text, shards int, shard int, epoch bigint, ordered boolean, position bigint, pending text,
        holes text, complete boolean, clears_crashes boolean
    )
),
retries AS (
    SELECT *
    FROM jsonb_to_recordset($4::text::jsonb) AS retry (
        epoch bigint, position bigint, attempt int, delay float8, error text, failure jsonb, started_by uuid, history jsonb
    )
),
finished AS (
    SELECT *
    FROM jsonb_to_recordset($5::text::jsonb) AS done (epoch bigint, position bigint)
),
given_up AS (
    SELECT *
    FROM jsonb_to_recordset($6::text::jsonb) AS dead (
        epoch bigint, position bigint, attempts int, error text, details jsonb, history jsonb
    )
),
letters_delivered AS (
    SELECT *
    FROM jsonb_to_recordset($7::text::jsonb) AS delivered (epoch bigint, letter bigint)
),
letters_failed AS (
    SELECT *
    FROM jsonb_to_recordset($8::text::jsonb) AS failed (
        epoch bigint, letter bigint, attempt int, delay float8, error text, details jsonb, started_by uuid, history jsonb
    )
),
gaps AS (
    SELECT *
    FROM jsonb_to_recordset($9::text::jsonb) AS gap (epoch bigint, lower bigint, upper bigint)
),
fenced AS (
    UPDATE {schema}.offsets AS stored
    SET position = marks.position,
        pending = marks.pending::int8multirange,
        holes = marks.holes::int8multirange,
        completed_at = CASE WHEN marks.complete THEN coalesce(stored.completed_at, now()) ELSE stored.completed_at END,
        crashes = CASE WHEN marks.clears_crashes THEN 0 ELSE stored.crashes END
    FROM marks
    WHERE stored.subscription = marks.subscription
        AND stored.shards = marks.shards
        AND stored.shard = marks.shard
        AND stored.epoch = marks.epoch
        AND stored.owner = (SELECT worker FROM given)
        AND stored.position <= marks.position
        AND (SELECT id FROM {schema}.life) = (SELECT incarnation FROM given)
    RETURNING stored.epoch, stored.subscription, stored.ctid, marks.ordered
),
to_schedule AS (
    SELECT fenced.subscription, fenced.ordered, retries.*
    FROM retries
    JOIN fenced USING (epoch)
),
to_bury AS (
    SELECT fenced.subscription, given_up.*
    FROM given_up
    JOIN fenced USING (epoch)
),
scheduled AS (
    INSERT INTO {schema}.redeliveries AS kept
        (subscription, position, key_hash, attempt, due_at, last_error, failure, started_by, history)
    SELECT due.subscription, due.position, {key_hash}, due.attempt,
        clock_timestamp() + make_interval(secs => due.delay), due.error, due.failure::json, due.started_by,
        due.history
    FROM to_schedule AS due
    JOIN {schema}.stored_events AS event ON event.position = due.position
    ON CONFLICT (subscription, position) DO UPDATE
    SET attempt = excluded.attempt,
        due_at = excluded.due_at,
        last_error = excluded.last_error,
        failure = excluded.failure,
        started_by = excluded.started_by,
        history = {schema}.join_history(kept.history, excluded.history),
        lives = CASE WHEN excluded.started_by IS NULL THEN 0 ELSE kept.lives END
),
unscheduled AS (
    DELETE FROM {schema}.redeliveries AS kept
    USING (
        SELECT fenced.subscription, finished.position
        FROM finished
        JOIN fenced USING (epoch)
        UNION ALL
        SELECT subscription, position
        FROM to_bury
    ) AS done
    WHERE kept.subscription = done.subscription
        AND kept.position = done.position
),
buried AS MATERIALIZED (
    -- A function of the log, with its owner's rights. It is called only if there are letters.
    SELECT {schema}.bury(
        jsonb_agg(
            jsonb_build_object(
                'subscription', dead.subscription,
                'epoch', dead.epoch,
                'owner', (SELECT worker FROM given),
                'position', dead.position,
                'attempts', dead.attempts,
                'error', dead.error,
                'details', dead.details,
                'history', {schema}.join_history(
                    -- As it was before this statement, which deletes it.
                    (
                        SELECT waiting.history
                        FROM {schema}.redeliveries AS waiting
                        WHERE waiting.subscription = dead.subscription
                            AND waiting.position = dead.position
                    ),
                    dead.history
                )
            )
        )
    ) AS letters
    FROM to_bury AS dead
    HAVING count(*) > 0
),
delivered_letters AS (
    DELETE FROM {schema}.dead_letters AS letter
    USING letters_delivered AS delivered
    JOIN fenced USING (epoch)
    WHERE letter.letter_id = delivered.letter
        AND letter.subscription = fenced.subscription
),
failed_letters AS (
    UPDATE {schema}.dead_letters AS letter
    SET attempt = failed.attempt,
        -- Count each attempt once: it may have been counted before.
        attempts = letter.attempts + failed.attempt - letter.attempt,
        error = failed.error,
        details = failed.details::json,
        due_at = clock_timestamp() + make_interval(secs => failed.delay),
        started_by = failed.started_by,
        history = {schema}.join_history(letter.history, failed.history),
        lives = CASE WHEN failed.started_by IS NULL THEN 0 ELSE letter.lives END
    FROM letters_failed AS failed
    JOIN fenced USING (epoch)
    WHERE letter.letter_id = failed.letter
        AND letter.subscription = fenced.subscription
),
lost AS (
    SELECT failed.epoch, failed.subscription, failed.position
    FROM (
        -- In ordered modes a scheduled event stays pending, so it is not lost before its last attempt is.
        SELECT epoch, subscription, position
        FROM to_schedule
        WHERE NOT ordered
        UNION ALL
        SELECT epoch, subscription, position
        FROM to_bury
    ) AS failed
    -- One look-up for each: a join may read the whole log.
    WHERE (SELECT event.position FROM {schema}.stored_events AS event WHERE event.position = failed.position) IS NULL
),
skipped AS (
    INSERT INTO {schema}.skipped (subscription, positions)
    SELECT gone.subscription, fresh
    FROM (
        SELECT subscription, range_agg(positions) AS positions
        FROM (
            SELECT fenced.subscription, int8range(gaps.lower, gaps.upper) AS positions
            FROM gaps
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
    (SELECT letters FROM buried) AS letters,  -- nothing is buried unless this is read
    ARRAY (SELECT lost.position FROM lost WHERE lost.epoch = fenced.epoch) AS lost,
    (
        SELECT range_agg(skipped.positions)::text
        FROM skipped
        WHERE skipped.subscription = fenced.subscription
    ) AS skipped
FROM fenced;

-- name: read_clock
-- In seconds since 1970. As text, because a dispatcher may have set a codec on the connection of its transaction.
SELECT extract(epoch FROM clock_timestamp())::text AS seconds;

-- name: bound_transactions
-- For transactions in which dispatchers work. Their appends in plain SQL are checked, as any others are.
SELECT
    set_config('statement_timeout', $1, $3),
    set_config('idle_in_transaction_session_timeout', $2, $3),
    set_config('pgbackend.checked', 'off', $3);
