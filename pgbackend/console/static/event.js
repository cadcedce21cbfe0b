// One event: its attributes, its data exactly as stored, and how far each subscription is with it.
import {html, useMemo, useState} from "./vendor/htm-preact.js";
import {get, path, usePoll} from "./api.js";
import {askPurge, askRedeliver, askRetry, askSkip} from "./dialogs.js";
import {bytes, count, events} from "./format.js";
import {copy, Empty, Failure, Heading, Loading, Stale, State, Time} from "./parts.js";
import {linkTo} from "./overview.js";
import {pretty} from "./pretty.js";
import {brief, Text, visible} from "./text.js";

export function Event({position, overview}) {
  const poll = usePoll(signal => get(path("events", position), {signal}), {every: 10_000, key: position});
  const title = `Event ${position}`;
  if (!poll.data) return poll.error ? html`<${Failure} error=${poll.error}/>` : html`<${Heading} title=${title}/><${Loading}/>`;
  const {event, subscriptions} = poll.data;
  const done = () => { poll.refresh(); overview.refresh(); };
  return html`
    <p class="crumb"><a href="#/events">Events</a></p>
    <${Heading} title=${title}/>
    <${Stale} poll=${poll}/>
    <p class="lead">Recorded <${Time} at=${event.recorded_at}/>.</p>
    ${event.redacted && html`<p class="notice warn"><strong>This event was redacted.</strong> Its data and all but its required attributes are gone.</p>`}
    <div class="columns">
      <div>
        <${Attributes} attributes=${event.attributes}/>
        <${Data} position=${position} data=${event.data}/>
      </div>
      <${Outcomes} ...${{position, subscriptions, actions: overview.data.actions, done}}/>
    </div>`;
}

const FIRST = ["id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "specversion"];

function Attributes({attributes}) {
  const rank = name => FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length;
  const names = Object.keys(attributes).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  return html`
    <section class="card" aria-labelledby="attributes">
      <div class="card-head"><h2 id="attributes">Attributes</h2></div>
      <table class="facts">
        <caption class="off-screen">Attributes</caption>
        <colgroup><col class="name"/><col/><col class="tool"/></colgroup>
        <tbody>
          ${names.map(name => html`
            <tr key=${name}>
              <th scope="row"><${Text} value=${name}/></th>
              <td><${Text} value=${String(attributes[name])}/></td>
              <td><button type="button" class="small quiet" aria-label=${`Copy ${brief(name)}`} onClick=${() => copy(String(attributes[name]), brief(name))}>Copy</button></td>
            </tr>`)}
        </tbody>
      </table>
    </section>`;
}

function Data({position, data}) {
  const [raw, setRaw] = useState(false);
  const laid = useMemo(() => data.kind === "json" ? pretty(data.text, {truncated: data.truncated}) : null, [data.text]);
  const text = data.kind === "binary" ? data.base64 : data.text;
  const shown = useMemo(() => text === null ? null : visible(raw || laid === null ? text : laid, {lines: true}), [text, raw]);
  const kinds = {json: "JSON", text: "text", binary: "binary, shown as Base64", none: "none"};
  return html`
    <section class="card" aria-labelledby="data">
      <div class="card-head">
        <h2 id="data">Data</h2>
        <span class="note">${kinds[data.kind]}${data.kind !== "none" && `, ${bytes(data.size)}`}</span>
        ${data.kind !== "none" && html`
          <div class="actions">
            ${laid !== null && html`<button type="button" class="small" aria-pressed=${String(raw)} onClick=${() => setRaw(!raw)}>Raw</button>`}
            <button type="button" class="small" onClick=${() => copy(text, data.truncated ? "The part that is shown was" : "Data")}>Copy</button>
            <a class="button small" href=${new URL(`api/${path("events", position, "data")}`, document.baseURI).href} download=${`event-${position}`}>Download</a>
          </div>`}
      </div>
      ${data.truncated && html`<p class="notice warn">The first 256 KiB of ${bytes(data.size)}. The download has all of it.</p>`}
      ${shown === null ? html`<${Empty}>This event has no data.<//>` : html`<pre dir="ltr" class="data" tabindex="0" role="group" aria-labelledby="data">${shown}</pre>`}
    </section>`;
}

const isPlain = one => one.state === "settled" && !one.timeline.some(step => step.error);
const URGENT = ["dead letter", "waiting", "in flight", "open", "skipped"];

function Outcomes({position, subscriptions, actions, done}) {
  const told = subscriptions.filter(one => !isPlain(one) && one.state !== "not read yet").sort((a, b) => URGENT.indexOf(a.state) - URGENT.indexOf(b.state));
  const unread = subscriptions.filter(one => one.state === "not read yet");
  const settled = subscriptions.filter(isPlain);
  return html`
    <section class="card" aria-labelledby="outcomes">
      <div class="card-head"><h2 id="outcomes">Subscriptions</h2></div>
      ${subscriptions.length === 0 && html`<${Empty}>No subscription.<//>`}
      ${told.map(one => html`<${Outcome} key=${one.name} ...${{one, position, actions, done}}/>`)}
      ${unread.length > 0 && html`
        <details class="unread" open=${unread.length <= 3}>
          <summary>Not read yet by ${events(unread.length, "subscription")}</summary>
          ${unread.map(one => html`<${Outcome} key=${one.name} ...${{one, position, actions, done}}/>`)}
        </details>`}
      ${settled.length > 0 && html`
        <details class="settled" open=${settled.length <= 8}>
          <summary>Settled by ${events(settled.length, "subscription")}</summary>
          <ul>${settled.map(one => html`<li key=${one.name}><a href=${linkTo(one.name)}><${Text} value=${brief(one.name, 120)}/></a></li>`)}</ul>
        </details>`}
    </section>`;
}

const stepName = step => step.what === "attempt failed" && step.attempt !== null ? `attempt ${count(step.attempt)} failed` : step.what;

function Outcome({one, position, actions, done}) {
  const subscription = {name: one.name, state: null};
  const letter = one.letter_id && [{ids: [one.letter_id]}, `dead letter ${one.letter_id}`, done];
  return html`
    <div class="outcome">
      <div class="outcome-head">
        <h3><a href=${linkTo(one.name)} title=${brief(one.name, 1_200)}><${Text} value=${brief(one.name, 120)}/></a></h3>
        <${State} value=${one.state}/>
        ${one.attempts > 0 && html`<span class="note">${events(one.attempts, "attempt")}</span>`}
        ${one.due_at && html`<span class="note">due <${Time} at=${one.due_at}/></span>`}
        ${actions && html`
          <div class="actions">
            ${one.state === "waiting" && html`<button type="button" class="small" onClick=${() => askRetry(subscription, {position, total: 1}, done)}>Retry…</button>`}
            ${["waiting", "in flight", "open", "not read yet"].includes(one.state) && html`
              <button type="button" class="small" onClick=${() => askSkip(subscription, position, done)}>Skip…</button>`}
            ${letter && html`
              <button type="button" class="small" onClick=${() => askRedeliver(...letter)}>Redeliver…</button>
              <button type="button" class="small" onClick=${() => askPurge(...letter)}>Purge…</button>`}
          </div>`}
      </div>
      ${one.timeline.length > 1 && html`
        <ol class="timeline">
          ${one.timeline.map((step, at) => html`
            <li key=${at} class=${step.error ? "failed" : ""}>
              ${step.at && html`<${Time} at=${step.at}/> `}<strong>${stepName(step)}</strong>
              ${step.error && html`<pre dir="ltr" class="error"><bdi>${visible(step.error, {lines: true})}</bdi></pre>`}
            </li>`)}
        </ol>`}
    </div>`;
}
