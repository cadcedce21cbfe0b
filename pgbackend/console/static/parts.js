// Small parts that every page uses: headings, times, states, messages.
import {html, useEffect, useLayoutEffect, useRef, useState} from "./vendor/htm-preact.js";
import {clock, exact, moment} from "./format.js";
import {brief, Text} from "./text.js";

let navigated = false;

/** Moves the focus to the page's title; titles that replace it get the focus too. */
export function focusTitle() {
  navigated = true;
  document.querySelector("h1")?.focus({preventScroll: true});
}

export function Heading({title}) {
  const heading = useRef();
  useLayoutEffect(() => {
    if (navigated && document.activeElement === document.body) heading.current.focus({preventScroll: true});
  }, []);
  return html`<h1 tabindex="-1" class=${title.length > 60 ? "long" : ""} ref=${heading}><${Text} value=${title}/></h1>`;
}

export const Time = ({at}) => at ? html`<time datetime=${at} title=${exact(at)}>${moment(at)}</time>` : "–";

const TONES = {
  running: "good", settled: "good", alive: "good",
  paused: "warn", waiting: "warn", open: "warn",
  stopped: "bad", "dead letter": "bad", gone: "bad", skipped: "bad",
  "in flight": "busy", complete: "calm", "not read yet": "calm",
};

/** A state as a word in a colour; the word says it all. */
export const State = ({value}) => html`<span class="state ${TONES[value] ?? "calm"}">${value}</span>`;

export const Empty = ({children}) => html`<p class="empty">${children}</p>`;

/** What a page shows instead of its content. */
export function Failure({error}) {
  const titles = {0: "The server does not answer", 401: "Sign in", 403: "No access", 404: "Not found", 503: "The log cannot be read"};
  return html`
    <div class="failure" role="alert">
      <${Heading} title=${titles[error.status] ?? error.title ?? "Something went wrong"}/>
      <p><${Text} value=${error.message}/></p>
      ${error.status !== 404 && html`<p class="muted">This page tries again by itself.</p>`}
    </div>`;
}

/** Says that what the page shows has become old. Silent while all is well. */
export const Stale = ({poll}) => html`
  <div role="status">
    ${poll.error && poll.data && html`
      <p class="notice warn"><strong>Not updated since ${clock(poll.at)}.</strong> <${Text} value=${poll.error.message}/></p>`}
  </div>`;

export const Loading = () => html`<p class="empty">Loading…</p>`;

let tell = () => {};

/** Shows and speaks the result of an action. */
export const announce = text => tell(text);

/** The place where results of actions appear, for all pages. */
export function Announcements() {
  const [message, setMessage] = useState(null);
  tell = text => setMessage({text});
  useEffect(() => {
    const timer = message && setTimeout(() => setMessage(null), 12_000);
    return () => clearTimeout(timer);
  }, [message]);
  return html`
    <div class="announcements" role="status">
      ${message && html`
        <p>
          <${Text} value=${message.text}/>
          <button type="button" class="plain" aria-label="Dismiss" onClick=${() => setMessage(null)}>✕</button>
        </p>`}
    </div>`;
}

/** Several values, one of which is chosen. */
export const Choice = ({label, options, value, onChoose}) => html`
  <div class="choice" role="group" aria-label=${label}>
    ${options.map(option => html`
      <button type="button" key=${option.id} aria-pressed=${String(option.id === value)} onClick=${() => onChoose(option.id)}>
        ${option.label}${option.count !== undefined && html` <span class="count">${option.count}</span>`}
      </button>`)}
  </div>`;

/** Text in one line, whole in its title. */
export const Line = ({value}) => value ? html`<span class="line" title=${brief(value, 600)}><${Text} value=${value.slice(0, 400)}/></span>` : null;

/** Copies text exactly, also where the browser has no clipboard (pages that do not come over https). */
export async function copy(text, noun) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "off-screen";
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    if (!done) return announce("The browser refuses to copy. Select the text instead.");
  }
  return announce(`${noun} copied.`);
}
