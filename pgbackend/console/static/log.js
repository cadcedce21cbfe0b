// The live tail of the log: the newest events as they are committed, narrowed by filters; it can be paused and paged back.
import {html, useEffect, useRef, useState} from "./vendor/htm-preact.js";
import {get, usePoll} from "./api.js";
import {bytes, count} from "./format.js";
import {Empty, Failure, Heading, Line, Loading, Stale, Time} from "./parts.js";
import {Table} from "./table.js";
import {after, EMPTY, OVERLAP, withNewer, withOlder} from "./tail.js";

const FILTERS = [["type", "Type"], ["source", "Source"], ["subject", "Subject"], ["id", "ID"]];
const PAGE = 100;
const LIVE = 200; // rows of one request a second
const FIFTH = 5; // each fifth request looks back as far as OVERLAP

export function Events({params}) {
  const [fields, setFields] = useState(() => Object.fromEntries([...FILTERS.map(([id]) => id), "search"].map(id => [id, params.get(id) ?? ""])));
  const filters = useSettled(fields);
  const key = JSON.stringify(filters);
  const [folded, setFolded] = useState(true); // on a phone, the filters hide what they filter
  const [paused, setPaused] = useState(false);
  const [held, setHeld] = useState({...EMPTY, key});
  const [problem, setProblem] = useState(null);
  const current = useRef(held);
  const turns = useRef(0);
  const keep = next => { current.current = {...next, key}; setHeld(current.current); };
  const view = held.key === key ? held : {...EMPTY, key};

  useEffect(() => {
    const query = new URLSearchParams(Object.entries(filters).filter(([, value]) => value)).toString();
    history.replaceState(history.state, "", `#/events${query && `?${query}`}`);
    setProblem(null);
  }, [key]);

  const poll = usePoll(async signal => {
    const before = current.current.key === key ? current.current : {...EMPTY, key};
    const asked = after(before, turns.current++ % FIFTH === 0 ? OVERLAP : 0n);
    const answer = await get("events", {params: {...filters, limit: asked === null ? PAGE : LIVE, after: asked}, signal});
    if (!signal.aborted) keep(withNewer(before, answer, asked));
    return true;
  }, {every: paused ? null : 1_000, key});

  const toggle = () => {
    if (paused && view.paged) keep(EMPTY);
    setPaused(!paused);
  };
  const older = async () => {
    setPaused(true);
    try {
      keep(withOlder(view, await get("events", {params: {...filters, limit: PAGE, before: view.downTo}})));
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  };
  useShortcut(toggle);
  if (!poll.data && poll.error && view.start === null) return html`<${Failure} error=${poll.error}/>`;
  const set = id => event => setFields({...fields, [id]: event.target.value});
  const filtered = Object.values(filters).some(Boolean);
  return html`
    <div class="title">
      <${Heading} title="Events"/>
      <span class="state ${paused ? "warn" : poll.error ? "bad" : "good"}">${paused ? "paused" : poll.error ? "not updated" : "live"}</span>
      <div class="actions">
        <button type="button" class=${paused ? "primary" : ""} aria-keyshortcuts="Alt+P" onClick=${toggle}>${paused ? view.paged ? "Back to live" : "Resume" : "Pause"} <kbd>Alt+P</kbd></button>
      </div>
    </div>
    <${Stale} poll=${poll}/>
    <form class=${`filters card ${folded && !filtered ? "folded" : ""}`} role="search" aria-label="Filter events" onSubmit=${event => event.preventDefault()}>
      ${folded && !filtered && html`<button type="button" class="unfold" onClick=${() => setFolded(false)}>Filter…</button>`}
      ${FILTERS.map(([id, label]) => html`
        <label key=${id}>${label}<input type="search" autocomplete="off" spellcheck=${false} value=${fields[id]} onInput=${set(id)}/></label>`)}
      <label class="wide">Contains<input type="search" autocomplete="off" spellcheck=${false} value=${fields.search} onInput=${set("search")}/></label>
      <p class="note">A filter is exact; with * at its end it is a prefix: <code>com.example.*</code>. “Contains” looks into the data and all attributes, and ignores case.</p>
    </form>
    <section class="card" aria-label="Events">
      ${view.missed > 0n && html`
        <p class="notice warn" role="note"><strong>${filtered ? "Up to " : ""}${count(String(view.missed))} events are not shown.</strong> More arrive than this page takes: at most ${count(LIVE)} a second. Filters make it fewer.</p>`}
      ${view.paged && html`<p class="empty">These are older ones. New events are not shown before you go back to live.</p>`}
      ${view.start === null ? html`<${Loading}/>`
        : view.rows.length > 0 ? html`<${Table} caption="Events, newest first" columns=${COLUMNS} rows=${view.rows} rowKey=${row => `${row.position}${row.missed ? " missed" : ""}`}/>`
        : filtered ? html`<${Empty}>No event matches${view.more ? ` among those behind position ${view.downTo}` : ""}. New ones appear here by themselves.<//>`
        : html`<${Empty}>The log is empty. Events appear here as they are produced.<//>`}
      ${problem && html`<p class="notice bad" role="alert">${problem.message}</p>`}
      ${view.more && html`
        <div class="pager"><button type="button" onClick=${older}>Older events</button>
          <span class="note">${view.rows.length > 0 && `${count(view.rows.length)} shown, `}looked down to position ${view.downTo}</span></div>`}
    </section>`;
}

const isEvent = content => row => row.missed === undefined ? content(row) : "";
const COLUMNS = [
  {id: "position", label: "Position", head: true, number: true, width: "8rem", cell: row => row.missed === undefined
    ? html`<a class="mono" href=${`#/events/${row.position}`}>${row.position}</a>` : html`<span class="gap">${count(row.missed)} events not shown</span>`},
  {id: "time", label: "Recorded", width: "7.5rem", cell: isEvent(row => html`<${Time} at=${row.recorded_at}/>`)},
  {id: "type", label: "Type", width: "17%", style: "stretch", cell: isEvent(row => html`<${Line} value=${row.type}/>`)},
  {id: "source", label: "Source", width: "15%", style: "stretch", cell: isEvent(row => html`<${Line} value=${row.source}/>`)},
  {id: "subject", label: "Subject", width: "10%", cell: isEvent(row => row.subject && html`<${Line} value=${row.subject}/>`)},
  {id: "id", label: "ID", width: "12%", cell: isEvent(row => html`<${Line} value=${row.id}/>`)},
  {id: "data", label: "Data", style: "stretch", cell: isEvent(row => row.size === "0" || row.preview === null
    ? html`<span class="faint">${row.size === "0" ? "none" : "binary"}</span>` : html`<span class="mono"><${Line} value=${row.preview}/></span>`)},
  {id: "size", label: "Size", number: true, width: "6.5rem", cell: isEvent(row => bytes(row.size))},
];

/** The value, once it has not changed for a moment. */
function useSettled(value) {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), 300);
    return () => clearTimeout(timer);
  }, [JSON.stringify(value)]);
  return settled;
}

function useShortcut(action) {
  const latest = useRef(action);
  latest.current = action;
  useEffect(() => {
    const press = event => {
      if (!event.altKey || event.code !== "KeyP" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      latest.current();
    };
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  }, []);
}
