// Every action of the console: a dialog that says how many events it affects and what will happen, then one request.
// Nothing changes before the button that names the action is pressed; the result is announced, an error stays in the dialog.
import {html, useEffect, useRef, useState} from "./vendor/htm-preact.js";
import {pathOf, post} from "./api.js";
import {count, events, fromField, moment, toField} from "./format.js";
import {announce, focusTitle} from "./parts.js";
import {brief, Text} from "./text.js";

let openDialog = () => {};

/** Opens a dialog; `done` is called after the action has succeeded. */
const open = (dialog, props) => openDialog({dialog, props});

/** The place of the open dialog, once in the page. */
export function Dialogs() {
  const [current, setCurrent] = useState(null);
  openDialog = setCurrent;
  return current && html`<${current.dialog} ...${current.props} close=${() => setCurrent(null)}/>`;
}

/** title: children; confirm: the button's text; run(): the request; ready: whether it may be pressed. */
function Action({title, confirm, danger, run, ready = true, done, close, children}) {
  const dialog = useRef();
  const [running, setRunning] = useState(false);
  const [error, setError] = useState(null);
  useEffect(() => {
    const opener = document.activeElement;
    const shown = dialog.current;
    shown.showModal();
    return () => {
      shown.close();
      if (!opener?.isConnected) focusTitle();
    };
  }, []);
  const submit = async event => {
    event.preventDefault();
    if (running || !ready) return;
    setRunning(true);
    setError(null);
    try {
      const answer = await run();
      close();
      announce(answer.done);
      done?.();
    } catch (problem) {
      setError(problem);
      setRunning(false);
    }
  };
  return html`
    <dialog ref=${dialog} aria-labelledby="dialog-title" onCancel=${event => { event.preventDefault(); if (!running) close(); }} onClose=${() => dialog.current && close()}>
      <form method="dialog" onSubmit=${submit}>
        <h2 id="dialog-title">${title}</h2>
        ${children}
        ${error && html`<div class="notice bad" role="alert"><strong>${error.title ?? "That failed"}.</strong> <${Text} value=${error.message}/></div>`}
        <div class="buttons">
          <button type="button" disabled=${running} onClick=${close}>Cancel</button>
          <button type="submit" class=${danger ? "danger" : "primary"} disabled=${running || !ready}>${running ? "Working…" : confirm}</button>
        </div>
      </form>
    </dialog>`;
}

const Affected = ({children}) => html`<p class="affected">${children}</p>`;

/** The answer of a preview, asked again when `body` changes: {answer, error}. */
function usePreview(where, body) {
  const key = JSON.stringify(body);
  const [state, setState] = useState({});
  useEffect(() => {
    if (body === null) return undefined;
    let over = false;
    const timer = setTimeout(() => post(where, body).then(
      answer => over || setState({key, answer}),
      error => over || setState({key, error}),
    ), 250);
    return () => { over = true; clearTimeout(timer); };
  }, [key]);
  return state.key === key && body !== null ? state : {};
}

const PreviewError = ({error}) => error ? html`<p class="notice bad" role="alert"><${Text} value=${error.message}/></p>` : null;

const of = (subscription, verb) => pathOf(subscription.name, verb);

export const askPause = (subscription, done) => open(Pause, {subscription, done});

function Pause({subscription, ...rest}) {
  const [reason, setReason] = useState("");
  const name = brief(subscription.name);
  return html`
    <${Action} title=${html`Pause <${Text} value=${subscription.name}/>`} confirm="Pause ${name}" ...${rest}
        run=${() => post(of(subscription, "pause"), {reason: reason || null})}>
      <${Affected}>${events(subscription.lag)} ${subscription.lag === 1 ? "has" : "have"} not been settled and will wait${subscription.redeliveries > 0 && `, ${count(subscription.redeliveries)} of them to be tried again`}.<//>
      <p>Every worker stops dispatching to this subscription. Dispatches that run now end and are committed. No event is lost, no attempt is counted, and no restart ends the pause.</p>
      <label class="field">Reason, shown to everybody who looks here (optional)
        <input type="text" maxlength="500" autocomplete="off" value=${reason} onInput=${event => setReason(event.target.value)}/>
      </label>
    <//>`;
}

export const askResume = (subscription, done) => open(Resume, {subscription, done});

const Resume = ({subscription, ...rest}) => html`
  <${Action} title=${html`Resume <${Text} value=${subscription.name}/>`} confirm="Resume ${brief(subscription.name)}" ...${rest}
      run=${() => post(of(subscription, "resume"), {})}>
    <${Affected}>${events(subscription.lag)} ${subscription.lag === 1 ? "waits" : "wait"} to be dispatched.<//>
    ${subscription.paused && html`
      <p>Paused since ${moment(subscription.paused.at)} by ${subscription.paused.by === "operator" ? "an operator" : "its dispatcher"}${
        subscription.paused.reason && html`: <${Text} value=${subscription.paused.reason}/>`}</p>`}
    <p>Its workers dispatch again, within a second. Retries that became due meanwhile follow.</p>
  <//>`;

export const askRetry = (subscription, {position = null, total}, done) => open(Retry, {subscription, position, total, done});

const Retry = ({subscription, position, total, ...rest}) => html`
  <${Action} title=${position ? `Retry event ${position} now` : html`Retry all of <${Text} value=${subscription.name}/> now`}
      confirm=${position ? `Retry event ${position}` : `Retry ${events(total)}`} ...${rest}
      run=${() => post(of(subscription, "retry"), {position})}>
    <${Affected}>${position ? "1 failed event" : events(total, "failed event")} that ${position || total === 1 ? "waits" : "wait"} to be tried again will be due at once.<//>
    <p>Attempts count on: an event that fails its last attempt is given up. ${subscription.state === "paused" && "The subscription is paused, so nothing is tried before it is resumed."}</p>
  <//>`;

export const askSkip = (subscription, position, done) => open(Skip, {subscription, position, done});

const Skip = ({subscription, position, ...rest}) => html`
  <${Action} title="Skip event ${position}" confirm="Skip event ${position}" danger ...${rest}
      run=${() => post(of(subscription, "skip"), {position})}>
    <${Affected}>1 event is not dispatched to <${Text} value=${subscription.name}/> any more.<//>
    <p>It becomes a dead letter, on record with who skipped it. Redelivering that dead letter takes the skip back, out of order. The subscription is drained first, which takes as long as its slowest dispatch: up to 30 s.</p>
  <//>`;

export const askSeek = (subscription, head, done) => open(Seek, {subscription, head, done});

function Seek({subscription, head, ...rest}) {
  const [kind, setKind] = useState(null);
  const [position, setPosition] = useState("");
  const [time, setTime] = useState(toField(new Date(Date.now() - 3_600_000)));
  const place = {earliest: "earliest", latest: "latest", position: /^\d{1,19}$/.test(position) ? position : null, time: fromField(time)}[kind] ?? null;
  const {answer, error} = usePreview("preview/seek", place === null ? null : {subscription: subscription.name, place});
  const option = (id, label, field) => html`
    <div class="option">
      <label><input type="radio" name="place" value=${id} checked=${kind === id} onChange=${() => setKind(id)}/> ${label}</label>
      ${field}
    </div>`;
  return html`
    <${Action} title=${html`Seek <${Text} value=${subscription.name}/>`} confirm="Seek ${brief(subscription.name)}" danger ready=${Boolean(answer)} ...${rest}
        run=${() => post(of(subscription, "seek"), {place})}>
      <fieldset>
        <legend>Its next event is the first behind</legend>
        ${option("earliest", "the start of the log: everything that is kept comes again")}
        ${option("latest", "the head of the log: everything so far is passed over")}
        ${option("position", "a position", html`<input type="text" inputmode="numeric" aria-label="Position" placeholder=${`0 to ${head}`} value=${position}
          onFocus=${() => setKind("position")} onInput=${event => setPosition(event.target.value.trim())}/>`)}
        ${option("time", "a time in this device’s zone", html`<input type="datetime-local" step="1" aria-label="Time" value=${time}
          onFocus=${() => setKind("time")} onInput=${event => setTime(event.target.value)}/>`)}
      </fieldset>
      <div aria-live="polite">
        ${answer
          ? html`<${Affected}><strong>${count(answer.again)}</strong> ${answer.again === 1 ? "event comes" : "events come"} again, <strong>${count(answer.skipped)}</strong> ${answer.skipped === 1 ? "is" : "are"} skipped. It goes on behind position ${answer.position}.<//>`
          : error ? html`<${PreviewError} error=${error}/>`
          : html`<${Affected}>${place === null ? kind === null ? "Choose where it goes on." : "Enter where it goes on." : "Counting…"}<//>`}
      </div>
      <p>${subscription.redeliveries > 0 && `${events(subscription.redeliveries, "failed event")} that ${subscription.redeliveries === 1 ? "waits" : "wait"} to be tried again ${subscription.redeliveries === 1 ? "is" : "are"} dropped. `}Dead letters stay. Dispatches that run now are not cancelled.</p>
    <//>`;
}

/** `choice`: the body that chooses dead letters; `noun`: a text such as "3 selected letters". */
export const askRedeliver = (choice, noun, done) => open(Redeliver, {choice, noun, done});

function Redeliver({choice, noun, ...rest}) {
  const {answer, error} = usePreview("preview/dead-letters", choice);
  const waiting = answer && answer.letters - answer.due;
  return html`
    <${Action} title=${html`Redeliver ${noun}`} confirm=${answer ? `Redeliver ${events(waiting, "dead letter")}` : "Redeliver"} ready=${Boolean(answer)} ...${rest}
        run=${() => post("dead-letters/redeliver", choice)}>
      <div aria-live="polite">
        ${answer ? html`<${Affected}>${events(waiting, "dead letter")} will be dispatched again, from the first attempt on.${
          answer.due > 0 && ` ${count(answer.due)} more ${answer.due === 1 ? "is" : "are"} on the way already.`}<//>`
          : error ? html`<${PreviewError} error=${error}/>` : html`<${Affected}>Counting…<//>`}
      </div>
      <p>A letter whose event is handled is deleted; one that fails again stays. They come out of order.</p>
    <//>`;
}

export const askPurge = (choice, noun, done) => open(Purge, {choice, noun, done});

function Purge({choice, noun, ...rest}) {
  const {answer, error} = usePreview("preview/dead-letters", choice);
  return html`
    <${Action} title=${html`Purge ${noun}`} confirm=${answer ? `Purge ${events(answer.letters, "dead letter")}` : "Purge"} danger ready=${Boolean(answer)} ...${rest}
        run=${() => post("dead-letters/purge", choice)}>
      <div aria-live="polite">
        ${answer ? html`<${Affected}>${events(answer.letters, "dead letter")} will be deleted for good.${
          answer.due > 0 && ` ${count(answer.due)} of them ${answer.due === 1 ? "is" : "are"} on the way again; those at work at that moment stay.`}<//>`
          : error ? html`<${PreviewError} error=${error}/>` : html`<${Affected}>Counting…<//>`}
      </div>
      <p><strong>Nothing brings them back.</strong> The log keeps the events themselves for as long as its retention says.</p>
    <//>`;
}
