// The first page: how fast the log grows, and how each subscription keeps up.
import {html} from "./vendor/htm-preact.js";
import {get, usePoll} from "./api.js";
import {Chart} from "./chart.js";
import {bytes, clock, count, duration, rate} from "./format.js";
import {Choice, Heading, Line, Stale, State} from "./parts.js";
import {ratePoints, seconds} from "./samples.js";
import {Figure, Table, useMemory} from "./table.js";
import {brief, Text} from "./text.js";

const LONG_OPEN = 5; // seconds; younger transactions are everyday work

export function Overview({overview}) {
  const history = usePoll(signal => get("history", {signal}), {every: 15_000, key: "rate"});
  const {log, subscriptions, now} = overview.data;
  const open = log.open_appenders.filter(one => one.age_seconds === null || one.age_seconds > LONG_OPEN);
  return html`
    <${Heading} title="Overview"/>
    <${Stale} poll=${overview}/>
    ${open.length > 0 && html`<${OpenAppenders} open=${open}/>`}
    <dl class="tiles">
      <div class="tile"><dt>Events a second</dt><dd>${rate(log.events_per_second)}</dd><dd class="note">over the last minute</dd></div>
      <div class="tile"><dt>Head</dt><dd>${count(log.head)}</dd><dd class="note">the newest position</dd></div>
      <div class="tile"><dt>On disk</dt><dd>${bytes(log.bytes_on_disk)}</dd><dd class="note">${count(log.segments)} segments</dd></div>
      <div class="tile wide"><dt>Retention</dt><dd class="words">${log.retention}</dd></div>
    </dl>
    <${Rate} history=${history.data} now=${seconds(now)}/>
    <${Subscriptions} subscriptions=${subscriptions}/>`;
}

const OpenAppenders = ({open}) => html`
  <div class="notice warn">
    <p><strong>${open.length === 1 ? "A transaction has" : `${open.length} transactions have`} appended and not ended.</strong>${" "}
      Readers wait for it once, then deliver what others append; its own events are not visible before it ends.</p>
    <ul>${open.map(one => html`
      <li key=${one.pid ?? one.gid}>${one.pid ? `Process ${one.pid}` : html`Prepared transaction <${Text} value=${one.gid}/>`}, <${Text} value=${one.application || "no application name"}/>, ${
        one.age_seconds === null ? "since an unknown time" : `for ${duration(one.age_seconds)}`}</li>`)}</ul>
  </div>`;

function Rate({history, now}) {
  const points = ratePoints(history);
  const past = history?.minutes ?? [];
  const total = past.reduce((sum, one) => sum + one.events, 0);
  const top = points.reduce((best, one) => one[1] > best[1] ? one : best, [0, 0]);
  const last = points.at(-1)?.[1] ?? 0;
  const summary = `${rate(last)} events a second now. ` +
    (top[1] > 0 ? `At most ${rate(top[1])} in the last hour, at ${clock(new Date(top[0] * 1000)).slice(0, 5)}. ${count(total)} events in that hour.` : "No events in the last hour.");
  return html`<${Chart} title="Events a second" summary=${summary} now=${now} format=${value => `${rate(value)} events/s`}
    series=${[{label: "Events a second", colour: "--line-1", points}]}/>`;
}

const isFailing = one => one.last_error !== null || one.dead_letters > 0;
const GROUPS = [
  ["all", "All", () => true],
  ["running", "Running", one => one.state === "running"],
  ["paused", "Paused", one => one.state === "paused"],
  ["stopped", "Stopped", one => one.state === "stopped"],
  ["complete", "Complete", one => one.state === "complete"],
  ["failing", "With failures", isFailing],
];

export const linkTo = name => `#/subscriptions/${encodeURIComponent(name)}`;

const COLUMNS = [
  {id: "name", label: "Subscription", head: true, width: "20%", value: one => one.name,
    cell: one => html`<a class="line" href=${linkTo(one.name)} title=${brief(one.name, 600)}><${Text} value=${one.name}/></a>`},
  {id: "state", label: "State", width: "6.5rem", value: one => one.state, cell: one => html`<${State} value=${one.state}/>`},
  {id: "lag", label: "Lag", number: true, most: true, width: "6.5rem", value: one => one.lag, cell: one => html`<${Figure} value=${one.lag} text=${count(one.lag)}/>`},
  {id: "behind", label: "Behind", number: true, most: true, width: "8rem", value: one => one.lag_seconds,
    cell: one => html`<${Figure} value=${one.lag_seconds} text=${duration(one.lag_seconds)}/>`},
  {id: "in-flight", label: "In flight", number: true, most: true, width: "5.5rem", value: one => one.in_flight,
    cell: one => html`<${Figure} value=${one.in_flight} text=${count(one.in_flight)}/>`},
  {id: "redeliveries", label: "Waiting", number: true, most: true, width: "5.5rem", value: one => one.redeliveries,
    cell: one => html`<${Figure} value=${one.redeliveries} text=${count(one.redeliveries)} tone="warn-text"/>`},
  {id: "dead-letters", label: "Dead letters", number: true, most: true, width: "7.6rem", value: one => one.dead_letters,
    cell: one => html`<${Figure} value=${one.dead_letters} text=${count(one.dead_letters)} tone="bad-text"/>`},
  {id: "skipped", label: "Skipped", number: true, most: true, width: "6rem", value: one => one.skipped,
    cell: one => html`<${Figure} value=${one.skipped} text=${count(one.skipped)} tone="bad-text"/>`},
  {id: "owners", label: "Owners", width: "12%", style: "stretch", value: one => one.owners[0] ?? null, cell: one => one.owners.length === 0 ? "" : html`
    <span class="owners" title=${one.owners.map(owner => brief(owner, 200)).join("\n")}><span class="line"><${Text} value=${one.owners[0]}/></span>${one.owners.length > 1 && html`<span class="note">+${one.owners.length - 1}</span>`}</span>`},
  {id: "error", label: "Last error", style: "stretch", value: one => one.last_error, cell: one => one.last_error && html`<${Line} value=${one.last_error}/>`},
];

function Subscriptions({subscriptions}) {
  const [group, setGroup] = useMemory("state filter", "all");
  const [words, setWords] = useMemory("name filter", "");
  const inGroup = GROUPS.find(([id]) => id === group)[2];
  const wanted = words.trim().toLowerCase();
  const rows = subscriptions.filter(one => inGroup(one) && one.name.toLowerCase().includes(wanted));
  const options = GROUPS.map(([id, label, test]) => ({id, label, count: subscriptions.filter(test).length})).filter(one => one.count > 0 || one.id === "all" || one.id === group);
  return html`
    <section class="card" aria-labelledby="subscriptions">
      <div class="card-head">
        <h2 id="subscriptions">Subscriptions</h2>
        ${subscriptions.length > 1 && html`
          <input type="search" class="filter" aria-label="Filter by name" placeholder="Filter by name" value=${words} onInput=${event => setWords(event.target.value)}/>
          <${Choice} label="Filter by state" options=${options} value=${group} onChoose=${setGroup}/>`}
      </div>
      <${Table} caption="Subscriptions" columns=${COLUMNS} rows=${rows} rowKey=${one => one.name} sort=${{key: "subscriptions", by: "lag", down: true}}
        empty=${subscriptions.length === 0
          ? "No subscription yet. One appears here when a program subscribes, or a trigger is configured."
          : html`No subscription matches. <button type="button" class="small" onClick=${() => { setGroup("all"); setWords(""); }}>Show all ${count(subscriptions.length)}</button>`}/>
    </section>`;
}
