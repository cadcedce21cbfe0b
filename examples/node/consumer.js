// Ships orders, and produces an event about each, in JavaScript and plain SQL: exactly once, in the order of the log.
//
//     npm ci --prefix examples/node && PGBACKEND_DSN=postgresql://localhost/shop node examples/node/consumer.js
//
// docs/sql-consumer.md explains the statements, and lists what a consumer of this kind lacks.

import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'

const NAME = 'shipping'

// An application has migrations for this. The lock is for two processes that start at once.
const TABLES = `
  SELECT pg_advisory_xact_lock(hashtext('consumers'));
  CREATE TABLE IF NOT EXISTS consumers (name text PRIMARY KEY, position bigint NOT NULL);
  CREATE TABLE IF NOT EXISTS shipments (number bigint GENERATED ALWAYS AS IDENTITY, order_id text NOT NULL);
  INSERT INTO consumers (name, position) VALUES ('${NAME}', 0) ON CONFLICT DO NOTHING`

const EVIDENCE = `
  SELECT upto, appenders
  FROM pgbackend.appenders_in_flight('pgbackend.events', 'pgbackend.events_position_seq')`

const LOCK = `
  SELECT position
  FROM consumers
  WHERE name = $1
  FOR UPDATE`

const READ = `
  SELECT position, type, id, data
  FROM pgbackend.events
  WHERE position > $1
    AND position <= $2
  ORDER BY position
  LIMIT 100`

const MOVE = `
  UPDATE consumers
  SET position = $2
  WHERE name = $1`

const SHIP = `
  INSERT INTO shipments (order_id)
  VALUES ($1)`

const PRODUCE = `
  SELECT pgbackend.produce('order.shipped', '/shipping', jsonb_build_object('order', $1::text), subject => $1)`

// Does what the event asks for, in the transaction that also moves the consumer behind it.
async function handle (client, event) {
  if (event.type === 'order.placed') {
    await client.query(SHIP, [event.id])
    await client.query(PRODUCE, [event.id])
  }
}

// A position up to which nothing is missing: the next statement sees each event that will ever be there.
async function proven (client) {
  const { upto, appenders } = (await client.query(EVIDENCE)).rows[0]
  let open = appenders
  while (open.length > 0) {
    await sleep(10)
    const now = (await client.query(EVIDENCE)).rows[0].appenders
    // A prepared transaction ("-1/…") may be one that had another name before.
    open = now.filter(name => open.includes(name) || name.startsWith('-1/'))
  }
  return upto
}

// Handles up to 100 events. Returns how many.
async function handlePage (client, upto) {
  await client.query('BEGIN ISOLATION LEVEL READ COMMITTED')
  const { position } = (await client.query(LOCK, [NAME])).rows[0]
  const events = (await client.query(READ, [position, upto])).rows
  for (const event of events) {
    await handle(client, event)
  }
  if (events.length > 0) {
    await client.query(MOVE, [NAME, events.at(-1).position])
  }
  await client.query('COMMIT')
  return events.length
}

let running = true
process.on('SIGTERM', () => { running = false })

// An error ends the process, and PostgreSQL rolls back: start it again. It goes on where it was.
const client = new pg.Client({ connectionString: process.env.PGBACKEND_DSN })
await client.connect()
await client.query(TABLES)
console.log('Shipping orders.')
while (running) {
  const upto = await proven(client)
  while (running && await handlePage(client, upto) > 0);
  await sleep(100)
}
await client.end()
