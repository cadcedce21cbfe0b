// The started backends that take part in delivery, and whether they live.
import {html} from "./vendor/htm-preact.js";
import {count, duration} from "./format.js";
import {Heading, Line, Stale, State, Time} from "./parts.js";
import {linkTo} from "./overview.js";
import {Table} from "./table.js";
import {brief, Text} from "./text.js";

const SHOWN = 5;

const COLUMNS = [
  {id: "name", label: "Worker", head: true, width: "22rem", value: one => one.name, cell: one => html`<span class="stack"><${Line} value=${one.name}/><span class="note mono">${one.id}</span></span>`},
  {id: "alive", label: "State", width: "6rem", value: one => one.is_alive, cell: one => html`<${State} value=${one.is_alive ? "alive" : "gone"}/>`},
  {id: "heartbeat", label: "Heartbeat", number: true, most: true, width: "9rem", value: one => one.heartbeat_seconds, cell: one => html`
    <span class=${one.is_alive ? "" : "bad-text"}>${duration(one.heartbeat_seconds)} ago</span>`},
  {id: "lease", label: "Lease", number: true, width: "6rem", value: one => one.lease_seconds, cell: one => duration(one.lease_seconds)},
  {id: "started", label: "Started", width: "10rem", value: one => one.started_at, cell: one => html`<${Time} at=${one.started_at}/>`},
  {id: "shards", label: "Shards", number: true, most: true, width: "6rem", value: one => one.shards, cell: one => count(one.shards)},
  {id: "subscriptions", label: "Subscriptions", style: "wrap", value: one => one.subscriptions.length, most: true, cell: one => one.subscriptions.length === 0 ? html`<span class="faint">none</span>` : html`
    ${one.subscriptions.slice(0, SHOWN).map((name, at) => html`${at > 0 && ", "}<a href=${linkTo(name)}><${Text} value=${brief(name, 60)}/></a>`)}${
      one.subscriptions.length > SHOWN && html`
        <details><summary>and ${count(one.subscriptions.length - SHOWN)} more</summary>
          ${one.subscriptions.slice(SHOWN).map((name, at) => html`${at > 0 && ", "}<a href=${linkTo(name)}><${Text} value=${brief(name, 60)}/></a>`)}
        </details>`}`},
];

export const Workers = ({overview}) => html`
  <${Heading} title="Workers"/>
  <${Stale} poll=${overview}/>
  <p class="lead">Each started backend that runs shards, or could. A worker whose heartbeat is older than its lease is gone; others take its shards over.</p>
  <section class="card" aria-label="Workers">
    <${Table} caption="Workers" columns=${COLUMNS} rows=${overview.data.workers} rowKey=${one => one.id} sort=${{key: "workers", by: "name", down: false}}
      empty="No worker. Events are kept, and no subscription gets any."/>
  </section>`;
