// Turns the API's values into text: numbers, times, durations, bytes. Pure, except that times are in the reader's zone.
// Positions and bytes arrive as strings and never become floating-point numbers.

const counts = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
const tenths = new Intl.NumberFormat("en-US", {maximumFractionDigits: 1});
const hundredths = new Intl.NumberFormat("en-US", {maximumFractionDigits: 2});
const compact = new Intl.NumberFormat("en-US", {notation: "compact", maximumFractionDigits: 1});

/** A count with separators: "12,345". Takes numbers and decimal strings of any length; "–" for null. */
export const count = value => value === null || value === undefined ? "–" : counts.format(typeof value === "string" ? BigInt(value) : value);

/** Events a second, with as many decimals as say something. */
export const rate = value => (value < 1 ? hundredths : value < 100 ? tenths : counts).format(value);

/** A number for the axis of a chart: "1.2K". */
export const short = value => value < 10_000 ? hundredths.format(value) : compact.format(value);

/** "1 event", "1,200 events". */
export const events = (value, noun = "event") => `${count(value)} ${noun}${Number(value) === 1 ? "" : "s"}`;

const UNITS = [[86_400, "d"], [3_600, "h"], [60, "min"], [1, "s"]];

/** Seconds in their two largest units, as `pgbackend status` writes them. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return seconds > 0 && seconds < 10 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
  const at = UNITS.findIndex(([size]) => seconds >= size);
  const [size, name] = UNITS[at];
  const [smaller, lesser] = UNITS[at + 1];
  const rest = Math.floor(seconds % size / smaller);
  return `${Math.floor(seconds / size)} ${name}${rest ? ` ${rest} ${lesser}` : ""}`;
}

/** Bytes in the largest unit of which there is one: "4.8 MiB". */
export function bytes(value) {
  const total = Number(value);
  for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]]) {
    if (total >= 1024 ** power) return `${(total / 1024 ** power).toFixed(1)} ${unit}`;
  }
  return `${value} B`;
}

const pad = (value, width = 2) => String(value).padStart(width, "0");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** The time of day: "16:20:31". */
export const clock = date => `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}`;

/** "16:20:31" today, "29 Nov 16:20:31" this year, "29 Nov 2025 16:20" before. */
export function moment(iso, now = new Date()) {
  const date = new Date(iso);
  if (date.toDateString() === now.toDateString()) return clock(date);
  const day = `${date.getDate()} ${MONTHS[date.getMonth()]}`;
  return date.getFullYear() === now.getFullYear() ? `${day} ${clock(date)}` : `${day} ${date.getFullYear()} ${clock(date).slice(0, 5)}`;
}

/** "2026-11-30 16:20:31.123 +01:00", in the reader's zone. */
export function exact(iso) {
  const date = new Date(iso);
  const offset = -date.getTimezoneOffset();
  const zone = `${offset < 0 ? "-" : "+"}${pad(Math.floor(Math.abs(offset) / 60))}:${pad(Math.abs(offset) % 60)}`;
  const day = `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}`;
  return `${day} ${clock(date)}.${pad(date.getMilliseconds(), 3)} ${zone}`;
}

/** The value of a date-time field as a time with an offset, or null while it is incomplete. */
export function fromField(value) {
  const date = new Date(value);
  return value && !Number.isNaN(date.getTime()) ? date.toISOString() : null;
}

/** A time as the value of a date-time field. */
export const toField = date => `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}T${clock(date)}`;
