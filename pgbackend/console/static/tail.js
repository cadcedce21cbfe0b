// What the live tail holds: the newest rows in log order, at most MOST, with a mark where events were passed over.
// Pure. Positions are decimal strings without leading zeros, because a bigint does not fit a number.

const MOST = 500;
export const OVERLAP = 1_000; // positions that are asked for again: a transaction that commits late shows up in its place

export const EMPTY = {rows: [], head: null, downTo: null, more: false, missed: 0n, paged: false};

/** Orders positions. */
export const compare = (a, b) => a.length - b.length || (a < b ? -1 : a > b ? 1 : 0);

/** The position behind which the next request reads, or null for the first one. `overlap`: how far it looks back. */
export function after(held, overlap) {
  if (held.head === null) return null;
  const from = BigInt(held.head) - BigInt(overlap);
  return String(from < 0n ? 0n : from);
}

/** With an answer that is newer. */
export function withNewer(held, answer) {
  if (held.head === null) return {...EMPTY, rows: answer.events, head: answer.head, downTo: answer.read_down_to, more: answer.more};
  const known = new Set(held.rows.map(row => row.position));
  const fresh = answer.events.filter(row => !known.has(row.position));
  const between = BigInt(answer.read_down_to) - BigInt(held.head) - 1n; // positions that nobody looked at
  const missed = answer.more && between > 0n ? between : 0n;
  if (missed > 0n) fresh.push({position: answer.read_down_to, missed: String(missed)});
  const rows = fresh.length ? [...fresh, ...held.rows].sort((a, b) => compare(b.position, a.position)) : held.rows;
  const all = {...held, rows, head: compare(answer.head, held.head) > 0 ? answer.head : held.head, missed: held.missed + missed};
  return rows.length > MOST ? {...all, rows: rows.slice(0, MOST), downTo: rows[MOST - 1].position, more: true} : all;
}

/** With an answer that is older than all rows. The newest rows make room. */
export function withOlder(held, answer) {
  const rows = [...held.rows, ...answer.events];
  return {...held, rows: rows.slice(-MOST), downTo: answer.read_down_to, more: answer.more, paged: true};
}
