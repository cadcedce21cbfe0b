// Remembers what this tab has seen of rate and lag since it was opened, so that charts move between two minutes of the
// history that the server computes. Nothing here outlives the tab.

const HOUR = 3_600;
const rates = [];
const lags = new Map();

function add(points, at, value) {
  if (points.length && points.at(-1)[0] >= at) return;
  points.push([at, value]);
  while (points[0][0] < at - HOUR) points.shift();
}

export const seconds = iso => Math.round(new Date(iso).getTime() / 1000);

export function recordOverview(overview) {
  const at = seconds(overview.now);
  add(rates, at, overview.log.events_per_second);
  for (const one of overview.subscriptions) recordLag(one, at);
}

export function recordLag(subscription, at) {
  if (!lags.has(subscription.name)) lags.set(subscription.name, []);
  add(lags.get(subscription.name), at, subscription.lag);
}

/** Rate by minute until the last whole minute, from there on as this tab has seen it. The minute's rate stands at its end. */
export function ratePoints(history) {
  const past = (history?.minutes ?? []).slice(0, -1).map(one => [seconds(one.minute) + 60, one.events_per_second]);
  const until = past.at(-1)?.[0] ?? 0;
  return [...past, ...rates.filter(([at]) => at > until)];
}

/** What is left of each minute, by the history; the partial minute stands at `now`. */
export const backlogPoints = (history, now) => (history?.minutes ?? []).map((one, index, all) =>
  [index === all.length - 1 ? now : seconds(one.minute) + 60, one.backlog]);

export const lagPoints = name => lags.get(name) ?? [];
