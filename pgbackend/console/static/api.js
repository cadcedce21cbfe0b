// Talks to the server: JSON in, JSON out, errors as Problem. usePoll() keeps a page's figures fresh while its tab is
// visible, and keeps the last good ones when a request fails.
import {useEffect, useRef, useState} from "./vendor/htm-preact.js";

const BASE = new URL("api/", document.baseURI);
const RETRY = 3_000; // milliseconds to the next request after one that failed
const READ_TIMEOUT = 10_000; // milliseconds; actions have none, because a seek waits for running dispatches

/** An answer that is no success, or none at all (status 0). */
export class Problem extends Error {
  constructor(status, title, detail) {
    super(detail || title);
    this.status = status;
    this.title = title;
  }
}

/** A path whose parts may contain any character. */
export const path = (...parts) => parts.map(encodeURIComponent).join("/");

/** The path of a subscription. A URL takes `.` and `..` as directories, so such a name goes into the query. */
export const pathOf = (name, ...rest) => /^\.\.?$/.test(name)
  ? `${path("subscriptions", "-", ...rest)}?name=${name}`
  : path("subscriptions", name, ...rest);

export function get(where, {params = {}, signal} = {}) {
  const url = new URL(where, BASE);
  for (const [name, value] of Object.entries(params)) if (value !== "" && value !== null) url.searchParams.set(name, value);
  const timeout = AbortSignal.timeout(READ_TIMEOUT);
  return answer(fetch(url, {signal: signal ? AbortSignal.any([signal, timeout]) : timeout}));
}

export const post = (where, body) => answer(fetch(new URL(where, BASE), {
  method: "POST",
  headers: {"Content-Type": "application/json", "X-Pgbackend-Console": "1"},
  body: JSON.stringify(body),
}));

async function answer(request) {
  let response;
  try {
    response = await request;
    if (response.ok) return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const late = error.name === "TimeoutError";
    throw new Problem(0, "The server does not answer", late ? `It sent no answer within ${READ_TIMEOUT / 1000} s.` : "It cannot be reached.");
  }
  const {title, detail} = await response.json().catch(() => ({}));
  throw new Problem(response.status, title || `Error ${response.status}`, detail || `The server answered with status ${response.status}.`);
}

let failing = false;
const watchers = new Set();

function report(value) {
  if (failing === value) return;
  failing = value;
  for (const watcher of watchers) watcher(value);
}

/** Whether the last request of any poll failed. */
export function useFailing() {
  const [value, setValue] = useState(failing);
  useEffect(() => {
    watchers.add(setValue);
    return () => watchers.delete(setValue);
  }, []);
  return value;
}

const NOTHING = {data: null, error: null, at: null};

/**
 * The last answer of `load(signal)`, which is asked again every `every` milliseconds while the tab is visible.
 * `every`: null stops asking. `key`: another one forgets the data and starts anew. Returns {data, error, at, refresh}; `at` is the time of the data.
 */
export function usePoll(load, {every, key}) {
  const [state, setState] = useState({...NOTHING, key});
  const latest = useRef(load);
  latest.current = load;
  const refresh = useRef(() => {});
  useEffect(() => {
    if (every === null) return undefined;
    let timer;
    let running;
    const once = async () => {
      clearTimeout(timer);
      running?.abort();
      const mine = running = new AbortController();
      let failed = false;
      try {
        const data = await latest.current(mine.signal);
        if (mine.signal.aborted) return;
        report(false);
        setState({data, error: null, at: new Date(), key});
      } catch (error) {
        if (mine.signal.aborted) return;
        failed = true;
        report(error.status !== 404);
        setState(last => ({...(last.key === key ? last : NOTHING), error, key}));
      }
      if (!document.hidden) timer = setTimeout(once, failed ? Math.min(every, RETRY) : every);
    };
    const look = () => document.hidden ? clearTimeout(timer) : once();
    refresh.current = once;
    once();
    document.addEventListener("visibilitychange", look);
    return () => {
      document.removeEventListener("visibilitychange", look);
      clearTimeout(timer);
      running?.abort();
    };
  }, [every, key]);
  return {...(state.key === key ? state : NOTHING), refresh: () => refresh.current()};
}
