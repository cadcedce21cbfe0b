// The rows of the live tail: the newest ones in log order, at most MOST, with a mark where events were passed over.
// Pure. Positions are decimal strings without leading zeros, because a bigint does not fit a number.

const MOST = 500;
const HEADS = 5; // answers; the head counts events that are not committed yet, so what is new since the oldest is asked for again
const NEAR = 64n; // positions that are asked for again at least
const FAR = 2_000n; // and at most
export const OVERLAP = 1_000n; // now and then: a transaction that commits late shows up in its place

export const EMPTY = {rows: [], heads: [], start: null, downTo: null, more: false, missed: 0n, paged: false};

/** Orders positions. */
export const compare = (a, b) => a.length - b.length || (a < b ? -1 : a > b ? 1 : 0);

/** The position behind which the next request reads, or null for the first one. */
export function after(held, overlap = 0n) {
  if (held.start === null) return null;
  const [oldest, newest] = [BigInt(held.heads[0]), BigInt(held.heads.at(-1))];
  const least = newest - (overlap > NEAR ? overlap : NEAR);
  const from = oldest < least ? oldest : least;
  const bounded = from < newest - FAR ? newest - FAR : from;
  return String(bounded < 0n ? 0n : bounded);
}

/** With an answer that is newer, to a request for what is behind `asked`. */
export function withNewer(held, answer, asked) {
  const heads = [...held.heads, answer.head].slice(-HEADS);
  if (held.start === null) return {...EMPTY, heads, start: answer.head, rows: answer.events, downTo: answer.read_down_to, more: answer.more};
  const known = new Set(held.rows.map(row => row.position));
  const fresh = answer.events.filter(row => !known.has(row.position));
  const missed = answer.more ? BigInt(answer.read_down_to) - 1n - BigInt(newestOf(held, asked)) : 0n;
  if (missed > 0n) fresh.push({position: answer.read_down_to, missed: String(missed)});
  const rows = fresh.length ? [...fresh, ...held.rows].sort((a, b) => compare(b.position, a.position)) : held.rows;
  const all = {...held, heads, rows, missed: held.missed + (missed > 0n ? missed : 0n)};
  return rows.length > MOST ? {...all, rows: rows.slice(0, MOST), downTo: rows[MOST - 1].position, more: true} : all;
}

/** The highest position up to which rows are shown, or were asked for. */
const newestOf = (held, asked) => [asked, ...held.rows.slice(0, 1).map(row => row.position)].sort(compare).at(-1);

/** With an answer that is older than all rows. The newest rows make room. */
export function withOlder(held, answer) {
  const rows = [...held.rows, ...answer.events];
  return {...held, rows: rows.slice(-MOST), downTo: answer.read_down_to, more: answer.more, paged: true};
}
