// One subscription: how far it is, what holds it up, and every action that steers it.
import {html, useEffect} from "./vendor/htm-preact.js";
import {get, pathOf, usePoll} from "./api.js";
import {Chart} from "./chart.js";
import {askPause, askResume, askRetry, askSeek, askSkip} from "./dialogs.js";
import {count, duration, events} from "./format.js";
import {Empty, Failure, Heading, Line, Loading, Stale, State, Time} from "./parts.js";
import {backlogPoints, lagPoints, recordLag, seconds} from "./samples.js";
import {Figure, Table} from "./table.js";
import {Text} from "./text.js";

const ORDERS = {none: "in any order", key: "in order for each key", strict: "in strict order"};

export function Subscription({name, overview}) {
  const poll = usePoll(signal => get(pathOf(name), {signal}), {every: 2_000, key: name});
  const history = usePoll(signal => get("history", {params: {subscription: name}, signal}), {every: 15_000, key: name});
  const now = seconds(overview.data.now) + Math.round((poll.at - overview.at) / 1000); // by the server's clock
  useEffect(() => {
    if (poll.data) recordLag(poll.data.subscription, now);
  }, [poll.data]);
  if (!poll.data) return poll.error ? html`<${Failure} error=${poll.error}/>` : html`<${Heading} title=${name}/><${Loading}/>`;
  const {subscription, shards, waiting, waiting_total: total} = poll.data;
  const {actions, log} = overview.data;
  const done = () => { poll.refresh(); overview.refresh(); };
  return html`
    <p class="crumb"><a href="#/">Overview</a></p>
    <div class="title">
      <${Heading} title=${name}/>
      <${State} value=${subscription.state}/>
      ${actions && html`
        <div class="actions">
          ${subscription.paused
            ? html`<button type="button" class="primary" onClick=${() => askResume(subscription, done)}>Resume…</button>`
            : html`<button type="button" onClick=${() => askPause(subscription, done)}>Pause…</button>`}
          ${total > 0 && html`<button type="button" onClick=${() => askRetry(subscription, {total}, done)}>Retry all…</button>`}
          <button type="button" onClick=${() => askSeek(subscription, log.head, done)}>Seek…</button>
        </div>`}
    </div>
    <${Stale} poll=${poll}/>
    ${subscription.paused && html`<${Paused} paused=${subscription.paused}/>`}
    ${subscription.state === "stopped" && html`
      <p class="notice warn"><strong>No worker runs it.</strong> Its events stay in the log until one does.</p>`}
    ${subscription.last_error && html`
      <div class="notice bad"><strong>Last error of an event that will be tried again</strong><pre dir="ltr" class="error"><${Text} value=${subscription.last_error}/></pre></div>`}
    <${Figures} subscription=${subscription}/>
    <${Lag} name=${name} subscription=${subscription} history=${history.data} now=${now}/>
    <${Shards} shards=${shards}/>
    <${Waiting} ...${{subscription, waiting, total, actions, done}}/>`;
}

const Paused = ({paused}) => html`
  <div class="notice warn">
    <p><strong>Paused by ${paused.by === "operator" ? "an operator" : "its dispatcher"} since <${Time} at=${paused.at}/>.</strong> It dispatches nothing before it is resumed.</p>
    ${paused.reason && html`<p><${Text} value=${paused.reason}/></p>`}
  </div>`;

const Figures = ({subscription: one}) => html`
  <dl class="tiles">
    <div class="tile"><dt>Lag</dt><dd>${count(one.lag)}</dd><dd class="note">${one.lag_seconds === null ? "events" : `${duration(one.lag_seconds)} behind`}</dd></div>
    <div class="tile"><dt>In flight</dt><dd>${count(one.in_flight)}</dd><dd class="note">being handled</dd></div>
    <div class="tile"><dt>Waiting</dt><dd class=${one.redeliveries > 0 ? "warn-text" : ""}>${count(one.redeliveries)}</dd><dd class="note">to be tried again</dd></div>
    <div class="tile"><dt>Dead letters</dt><dd class=${one.dead_letters > 0 ? "bad-text" : ""}>${count(one.dead_letters)}</dd>
      <dd class="note">${one.dead_letters > 0 ? html`<a href=${`#/dead-letters?subscription=${encodeURIComponent(one.name)}`}>show them</a>` : "events given up"}</dd></div>
    <div class="tile"><dt>Skipped</dt><dd class=${one.skipped > 0 ? "bad-text" : ""}>${count(one.skipped)}</dd><dd class="note">gone unsettled</dd></div>
    <div class="tile wide"><dt>Order and owners</dt><dd class="words">${ORDERS[one.order] ?? one.order}; ${events(one.shards, "shard")}</dd>
      <dd class="note wrap">${one.owners.length === 0 ? "no owner" : one.owners.map((owner, at) => html`${at > 0 && ", "}<${Text} value=${owner}/>`)}</dd></div>
  </dl>`;

function Lag({name, subscription, history, now}) {
  const left = backlogPoints(history, now);
  const seen = lagPoints(name);
  const summary = subscription.lag === 0
    ? "Everything is settled."
    : `${events(subscription.lag)} not settled now${subscription.lag_seconds === null ? "" : `; the oldest is ${duration(subscription.lag_seconds)} old`}.`;
  return html`<${Chart} title="Lag" summary=${summary} now=${now} whole format=${value => events(value)} series=${[
    {label: "Recorded until then and still not settled", colour: "--line-1", points: left},
    {label: "Lag while this page was open", colour: "--line-2", points: seen},
  ]}/>`;
}

const SHARDS = [
  {id: "shard", label: "Shard", head: true, width: "7rem", value: one => one.shard, cell: one => `${one.shard + 1} of ${one.shards}`},
  {id: "position", label: "Offset", number: true, width: "9rem", value: one => BigInt(one.position), cell: one => html`<span class="mono">${one.position}</span>`},
  {id: "lag", label: "Lag", number: true, most: true, width: "7rem", value: one => one.lag, cell: one => html`<${Figure} value=${one.lag} text=${count(one.lag)}/>`},
  {id: "behind", label: "Behind", number: true, most: true, width: "8rem", value: one => one.lag_seconds, cell: one => html`<${Figure} value=${one.lag_seconds} text=${duration(one.lag_seconds)}/>`},
  {id: "pending", label: "Pending", number: true, most: true, width: "6rem", value: one => one.pending, cell: one => html`<${Figure} value=${one.pending} text=${count(one.pending)}/>`},
  {id: "in-flight", label: "In flight", number: true, most: true, width: "6rem", value: one => one.in_flight, cell: one => html`<${Figure} value=${one.in_flight} text=${count(one.in_flight)}/>`},
  {id: "epoch", label: "Epoch", number: true, width: "6rem", value: one => BigInt(one.epoch), cell: one => count(one.epoch)},
  {id: "owner", label: "Owner", value: one => one.owner_name, cell: one => html`<span class="stack">${one.owner_name ? html`<${Line} value=${one.owner_name}/>` : html`<span class="faint">no owner</span>`}${
    one.until !== null && html`<span class="note">until position ${one.until}</span>`}</span>`},
];

const Shards = ({shards}) => html`
  <section class="card" aria-labelledby="shards">
    <div class="card-head"><h2 id="shards">Shards</h2></div>
    <${Table} caption="Shards" columns=${SHARDS} rows=${shards} rowKey=${one => `${one.shards}/${String(one.shard).padStart(6, "0")}`} sort=${{key: "shards", by: "shard", down: false}}/>
  </section>`;

function Waiting({subscription, waiting, total, actions, done}) {
  const columns = [
    {id: "position", label: "Position", head: true, number: true, width: "8rem", cell: one => html`<a class="mono" href=${`#/events/${one.position}`}>${one.position}</a>`},
    {id: "event", label: "Event", width: "24%", style: "stretch", cell: one => one.type === null ? html`<span class="faint">gone from the log</span>` : html`
      <span class="stack"><${Line} value=${one.type}/><span class="note"><${Line} value=${`${one.id} · ${one.source}`}/></span></span>`},
    {id: "attempts", label: "Attempts", number: true, width: "6rem", cell: one => count(one.attempts)},
    {id: "due", label: "Due", width: "12rem", cell: one => html`<span class="stack"><${Time} at=${one.due_at}/>${one.given_up && html`<span class="note">to the dead-letter target</span>`}</span>`},
    {id: "error", label: "Error", style: "stretch", cell: one => html`<${Line} value=${one.error}/>`},
    actions && {id: "actions", label: "Actions", header: html`<span class="off-screen">Actions</span>`, width: "11.5rem", style: "row-actions", cell: one => html`
      <button type="button" class="small" aria-label=${`Retry event ${one.position}`} onClick=${() => askRetry(subscription, {position: one.position, total: 1}, done)}>Retry…</button>
      <button type="button" class="small" aria-label=${`Skip event ${one.position}`} onClick=${() => askSkip(subscription, one.position, done)}>Skip…</button>`},
  ].filter(Boolean);
  return html`
    <section class="card" aria-labelledby="waiting">
      <div class="card-head"><h2 id="waiting">Waiting to be tried again</h2>${total > 0 && html`<span class="count">${count(total)}</span>`}</div>
      ${total === 0 ? html`<${Empty}>No failed event waits.<//>` : html`
        <${Table} caption="Failed events that wait to be tried again" columns=${columns} rows=${waiting} rowKey=${one => one.position} version=${`${actions} ${subscription.state}`}/>`}
      ${total > waiting.length && html`<p class="empty">The first ${count(waiting.length)} of ${count(total)}, in log order.</p>`}
    </section>`;
}
