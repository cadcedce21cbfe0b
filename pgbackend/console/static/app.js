// The console's frame: asks for the overview, shows the page that the address names, and moves title and focus with it.
// Everything it shows comes from api/ beside it; it asks no other host for anything.
import {html, render, useEffect, useLayoutEffect, useRef, useState} from "./vendor/htm-preact.js";
import {get, useFailing, usePoll} from "./api.js";
import {Dialogs} from "./dialogs.js";
import {clock, count, short} from "./format.js";
import {Event} from "./event.js";
import {Groups, Letters} from "./letters.js";
import {Events} from "./log.js";
import {Overview} from "./overview.js";
import {Announcements, Failure, focusTitle, Heading, Loading} from "./parts.js";
import {recordOverview} from "./samples.js";
import {Subscription} from "./subscription.js";
import {brief, Text} from "./text.js";
import {Workers} from "./workers.js";

const OFTEN = 2_000; // pages that show the overview's figures
const SELDOM = 10_000; // others show only the counts beside the navigation

const heights = new Map(); // how far the reader had scrolled when they left an address

/** The page that an address names: {nav, title, page(overview), every}. */
function routed(hash) {
  const [where, query = ""] = hash.replace(/^#?\/?/, "").split(/\?(.*)/s);
  const params = new URLSearchParams(query);
  let parts;
  try {
    parts = where.split("/").map(decodeURIComponent);
  } catch {
    parts = ["unreadable"];
  }
  const [first, second] = [parts[0], parts.slice(1).join("/")];
  if (first === "") return {nav: "overview", title: "Overview", every: OFTEN, page: overview => html`<${Overview} overview=${overview}/>`};
  if (first === "subscriptions" && second) return {nav: "overview", title: second, page: overview => html`<${Subscription} name=${second} overview=${overview}/>`};
  if (first === "events" && second) return {nav: "events", title: `Event ${second}`, page: overview => html`<${Event} position=${second} overview=${overview}/>`};
  if (first === "events") return {nav: "events", title: "Events", page: () => html`<${Events} params=${params}/>`};
  if (first === "dead-letters" && second) return {nav: "dead-letters", title: `Group ${second}`, page: overview => html`<${Letters} group=${second} overview=${overview}/>`};
  if (first === "dead-letters") return {nav: "dead-letters", title: "Dead letters", page: overview => html`<${Groups} params=${params} overview=${overview}/>`};
  if (first === "workers") return {nav: "workers", title: "Workers", every: OFTEN, page: overview => html`<${Workers} overview=${overview}/>`};
  return {nav: "", title: "Not found", page: () => html`<${Heading} title="Not found"/><p>This console has no such page. <a href="#/">Overview</a></p>`};
}

function App() {
  const [{hash, turn}, setPlace] = useState({hash: location.hash, turn: 0});
  const route = routed(hash);
  const overview = usePoll(signal => get("overview", {signal}), {every: route.every ?? SELDOM, key: "overview"});
  const recorded = useRef(null);
  if (overview.data && recorded.current !== overview.data) recordOverview(recorded.current = overview.data);
  const navigated = useRef(false);
  useEffect(() => {
    const change = event => {
      navigated.current = true;
      heights.set(new URL(event.oldURL).hash, scrollY);
      setPlace(last => ({hash: location.hash, turn: last.turn + 1}));
    };
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  useLayoutEffect(() => {
    document.title = `${brief(route.title, 80)} · pgbackend console`;
    if (!navigated.current) {
      history.scrollRestoration = "manual";
      history.replaceState({seen: true}, "");
      return;
    }
    // An entry of the history that has a state was here before: the reader went back to it.
    scrollTo(0, history.state?.seen ? heights.get(hash) ?? 0 : 0);
    history.replaceState({seen: true}, "");
    focusTitle();
  }, [turn]);
  return html`
    <a class="skip-link" href="#main" onClick=${event => { event.preventDefault(); document.querySelector("main").focus(); }}>Skip to content</a>
    <${Banner} overview=${overview} nav=${route.nav}/>
    <main id="main" tabindex="-1">
      ${overview.data ? html`<div class="page" key=${turn}>${route.page(overview)}</div>` : overview.error ? html`<${Failure} error=${overview.error}/>` : html`<${Loading}/>`}
    </main>
    <${Announcements}/>
    <${Dialogs}/>`;
}

function Banner({overview, nav}) {
  const {data, at} = overview;
  const failing = useFailing();
  const letters = data?.subscriptions.reduce((sum, one) => sum + one.dead_letters, 0) ?? 0;
  const gone = data?.workers.filter(one => !one.is_alive).length ?? 0;
  const links = [
    ["overview", "#/", "Overview"],
    ["events", "#/events", "Events"],
    ["dead-letters", "#/dead-letters", "Dead letters", letters > 0 && html`<span class="count">${short(letters)}</span>`],
    ["workers", "#/workers", "Workers", gone > 0 && html`<span class="count">${count(gone)}<span class="more-words"> gone</span></span>`],
  ];
  return html`
    <header class="banner">
      <a class="brand" href="#/">pgbackend</a>
      ${data && html`<span class="where" title=${`pgbackend ${data.version}`}><${Text} value=${data.schema}/> <span class="faint">at</span> <${Text} value=${data.server}/></span>`}
      <nav aria-label="Pages">
        ${links.map(([id, href, label, extra]) => html`<a key=${id} href=${href} aria-current=${id === nav ? "page" : null}>${label}${extra && html` ${extra}`}</a>`)}
      </nav>
      ${data && html`<span class="pulse ${failing ? "old" : ""}" title=${`Last updated ${clock(at)}`}>${failing ? "not updated" : "live"}</span>`}
    </header>`;
}

render(html`<${App}/>`, document.getElementById("app"));
