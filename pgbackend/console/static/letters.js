// Dead letters: groups with the same error first, then the letters of one group by pages; send them again, or delete them.
import {html, useState} from "./vendor/htm-preact.js";
import {get, usePoll} from "./api.js";
import {askPurge, askRedeliver} from "./dialogs.js";
import {count, events} from "./format.js";
import {Empty, Failure, focusTitle, Heading, Line, Loading, Stale, Time} from "./parts.js";
import {linkTo} from "./overview.js";
import {Figure, Table} from "./table.js";
import {brief, Text, visible} from "./text.js";

const PAGE = 100;

export function Groups({params, overview}) {
  const [subscription, setSubscription] = useState(params.get("subscription") ?? "");
  const choose = name => {
    setSubscription(name);
    history.replaceState(history.state, "", name ? `#/dead-letters?subscription=${encodeURIComponent(name)}` : "#/dead-letters");
  };
  const poll = usePoll(signal => get("dead-letter-groups", {params: {subscription}, signal}), {every: 5_000, key: subscription});
  const {actions, subscriptions} = overview.data;
  const done = () => { poll.refresh(); overview.refresh(); };
  const names = subscriptions.filter(one => one.dead_letters > 0 || one.name === subscription).map(one => one.name);
  if (!poll.data && poll.error) return html`<${Failure} error=${poll.error}/>`;
  const whole = subscription && [{subscription}, html`all dead letters of <${Text} value=${subscription}/>`, done];
  return html`
    <div class="title">
      <${Heading} title="Dead letters"/>
      ${actions && whole && poll.data?.total > 0 && html`
        <div class="actions">
          <button type="button" onClick=${() => askRedeliver(...whole)}>Redeliver all ${count(poll.data.total)}…</button>
          <button type="button" class="danger" onClick=${() => askPurge(...whole)}>Purge all ${count(poll.data.total)}…</button>
        </div>`}
    </div>
    <${Stale} poll=${poll}/>
    <section class="card" aria-label="Failure groups">
      <div class="card-head">
        <label class="inline">Subscription
          <select value=${subscription} onChange=${event => choose(event.target.value)}>
            <option value="">all</option>
            ${names.map(name => html`<option key=${name} value=${name}>${brief(name)}</option>`)}
          </select>
        </label>
        ${poll.data && html`<span class="note">${events(poll.data.total, "dead letter")} in ${events(poll.data.groups.length, "group")}</span>`}
      </div>
      ${!poll.data ? html`<${Loading}/>` : html`
        <${Table} caption="Dead letters by failure group" columns=${groupColumns(actions, done)} rows=${poll.data.groups} rowKey=${one => one.name} version=${String(actions)}
          sort=${{key: "groups", by: "letters", down: true}} empty="No dead letters: no event was given up."/>`}
    </section>`;
}

const ofGroup = (one, done) => [{group: one.name, subscription: one.subscription}, html`group ${one.name} of <${Text} value=${one.subscription}/>`, done];

const groupColumns = (actions, done) => [
  {id: "error", label: "Error", head: true, value: one => one.error, style: "stretch", cell: one => html`
    <a class="two-lines light" href=${`#/dead-letters/${encodeURIComponent(one.name)}`} title=${brief(one.error, 600)}><${Text} value=${one.error.slice(0, 400)}/></a>`},
  {id: "subscription", label: "Subscription", width: "18%", value: one => one.subscription, cell: one => html`<${Line} value=${one.subscription}/>`},
  {id: "letters", label: "Letters", number: true, most: true, width: "6.5rem", value: one => one.letters, cell: one => count(one.letters)},
  {id: "due", label: "Due again", number: true, most: true, width: "7rem", value: one => one.due, cell: one => html`<${Figure} value=${one.due} text=${count(one.due)}/>`},
  {id: "first", label: "First", width: "9.5rem", value: one => one.first_at, cell: one => html`<${Time} at=${one.first_at}/>`},
  {id: "last", label: "Last", width: "9.5rem", value: one => one.last_at, most: true, cell: one => html`<${Time} at=${one.last_at}/>`},
  actions && {id: "actions", label: "Actions", header: html`<span class="off-screen">Actions</span>`, width: "15rem", style: "row-actions", cell: one => html`
    <button type="button" class="small" aria-label=${`Redeliver group ${one.name}`} onClick=${() => askRedeliver(...ofGroup(one, done))}>Redeliver…</button>
    <button type="button" class="small" aria-label=${`Purge group ${one.name}`} onClick=${() => askPurge(...ofGroup(one, done))}>Purge…</button>`},
].filter(Boolean);

export function Letters({group, overview}) {
  const [starts, setStarts] = useState([""]); // the ids behind which each page so far begins
  const [selected, setSelected] = useState(new Set());
  const after = starts.at(-1);
  const poll = usePoll(async signal => {
    const [letters, groups] = await Promise.all([
      get("dead-letters", {params: {group, after, limit: PAGE}, signal}),
      get("dead-letter-groups", {signal}),
    ]);
    return {...letters, group: groups.groups.find(one => one.name === group) ?? null};
  }, {every: 10_000, key: `${group} ${after}`});
  if (!poll.data) return poll.error ? html`<${Failure} error=${poll.error}/>` : html`<${Heading} title="Dead letters of a group"/><${Loading}/>`;
  const {letters, more, group: facts} = poll.data;
  const {actions} = overview.data;
  const ids = letters.map(one => one.id).filter(id => selected.has(id));
  const done = () => { setSelected(new Set()); poll.refresh(); overview.refresh(); };
  const chosen = [{ids}, events(ids.length, "selected dead letter"), done];
  const go = to => { setStarts(to); setSelected(new Set()); focusTitle(); };
  const toggle = id => {
    const next = new Set(selected);
    if (!next.delete(id)) next.add(id);
    setSelected(next);
  };
  const first = (starts.length - 1) * PAGE + 1;
  return html`
    <p class="crumb"><a href="#/dead-letters">Dead letters</a></p>
    <div class="title">
      <${Heading} title=${`Group ${group}`}/>
      ${actions && facts && html`
        <div class="actions">
          <button type="button" onClick=${() => askRedeliver(...ofGroup(facts, done))}>Redeliver all ${count(facts.letters)}…</button>
          <button type="button" class="danger" onClick=${() => askPurge(...ofGroup(facts, done))}>Purge all ${count(facts.letters)}…</button>
        </div>`}
    </div>
    <${Stale} poll=${poll}/>
    ${facts && html`
      <p class="lead">Dead letters of <a href=${linkTo(facts.subscription)}><${Text} value=${facts.subscription}/></a> with the same error, given up from <${Time} at=${facts.first_at}/> to <${Time} at=${facts.last_at}/>.</p>
      <div class="notice bad"><pre dir="ltr" class="error"><bdi>${visible(facts.error, {lines: true})}</bdi></pre></div>`}
    <section class="card" aria-label="Letters">
      <div class="card-head selection">
        <span class="note">${letters.length > 0 && `Letters ${count(first)} to ${count(first + letters.length - 1)}${facts ? ` of ${count(facts.letters)}` : ""}`}</span>
        ${actions && html`
          <div class="actions">
            <button type="button" class="small" disabled=${ids.length === 0} onClick=${() => askRedeliver(...chosen)}>Redeliver ${count(ids.length)} selected…</button>
            <button type="button" class="small" disabled=${ids.length === 0} onClick=${() => askPurge(...chosen)}>Purge ${count(ids.length)} selected…</button>
          </div>`}
      </div>
      ${letters.length === 0 ? html`<${Empty}>${starts.length > 1 ? "No letter is left on this page." : "No dead letter is left in this group."}<//>` : html`
        <${Table} caption="Dead letters" columns=${letterColumns({actions, selected, toggle, letters, setSelected, done})} rows=${letters} rowKey=${one => one.id}
          version=${`${actions} ${[...selected].join()}`}/>`}
      ${(more || starts.length > 1) && html`
        <div class="pager">
          <button type="button" disabled=${starts.length === 1} onClick=${() => go(starts.slice(0, -1))}>Previous</button>
          <button type="button" disabled=${!more} onClick=${() => go([...starts, letters.at(-1).id])}>Next</button>
        </div>`}
    </section>`;
}

const letterColumns = ({actions, selected, toggle, letters, setSelected, done}) => [
  actions && {id: "select", label: "Select", width: "2.75rem", style: "row-select",
    header: html`<input type="checkbox" aria-label="Select all on this page" checked=${letters.every(one => selected.has(one.id))}
      onChange=${event => setSelected(new Set(event.target.checked ? letters.map(one => one.id) : []))}/>`,
    cell: one => html`<input type="checkbox" aria-label=${`Select dead letter ${one.id}`} checked=${selected.has(one.id)} onChange=${() => toggle(one.id)}/>`},
  {id: "id", label: "Letter", head: true, number: true, width: "6rem", cell: one => html`<span class="mono">${one.id}</span>`},
  {id: "event", label: "Event", width: "26%", style: "stretch", cell: one => html`
    <span class="stack"><${Line} value=${one.type}/><span class="note"><${Line} value=${`${one.event_id} · ${one.source}`}/></span></span>`},
  {id: "position", label: "Position", number: true, width: "8rem", cell: one => one.position === null ? html`<span class="faint">unknown</span>`
    : html`<a class="mono" href=${`#/events/${one.position}`}>${one.position}</a>`},
  {id: "attempts", label: "Attempts", number: true, width: "6rem", cell: one => count(one.attempts)},
  {id: "buried", label: "Given up", width: "9.5rem", cell: one => html`<span class="stack"><${Time} at=${one.buried_at}/>${one.due_at && html`<span class="note">due again <${Time} at=${one.due_at}/></span>`}</span>`},
  {id: "error", label: "Error", style: "stretch", cell: one => html`
    <details class="more"><summary><${Line} value=${one.error}/></summary>
      <pre dir="ltr" class="error"><bdi>${visible(one.error, {lines: true})}</bdi></pre>
      ${Object.entries(one.details ?? {}).map(([name, value]) => html`
        <p class="note"><${Text} value=${name}/>: <${Text} value=${typeof value === "string" ? value : JSON.stringify(value)}/></p>`)}
    </details>`},
  actions && {id: "actions", label: "Actions", header: html`<span class="off-screen">Actions</span>`, width: "15rem", style: "row-actions", cell: one => html`
    <button type="button" class="small" aria-label=${`Redeliver dead letter ${one.id}`} onClick=${() => askRedeliver({ids: [one.id]}, `dead letter ${one.id}`, done)}>Redeliver…</button>
    <button type="button" class="small" aria-label=${`Purge dead letter ${one.id}`} onClick=${() => askPurge({ids: [one.id]}, `dead letter ${one.id}`, done)}>Purge…</button>`},
].filter(Boolean);
