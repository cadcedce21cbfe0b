// A line chart of the last hour: uPlot draws it, a sentence and a table say the same. Its colours come from the style
// sheet, and follow the reader's scheme.
import {html, useEffect, useLayoutEffect, useRef, useState} from "./vendor/htm-preact.js";
import {clock, short} from "./format.js";

const HOUR = 3_600;
const HEIGHT = 190;
const WHOLE = Array.from({length: 16}, (_, power) => [1, 2, 5].map(digit => digit * 10 ** power)).flat();
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const scheme = matchMedia("(prefers-color-scheme: dark)");

/**
 * title, summary: text. now: seconds. format(value): text. whole: the values are counts. series: {label, colour (a CSS variable), points: [[seconds, value]]}, oldest
 * first; the first one is filled. `children` stand beside the title.
 */
export function Chart({title, summary, now, format, whole, series}) {
  const [asTable, setAsTable] = useState(false);
  const [pointed, setPointed] = useState(null);
  const [times, ...values] = joined(series);
  return html`
    <figure class="chart card" aria-label=${title}>
      <div class="chart-head">
        <h2>${title}</h2>
        <p class="readout" aria-hidden="true">${pointed}</p>
        <button type="button" class="small" aria-pressed=${String(asTable)} onClick=${() => setAsTable(!asTable)}>Show as table</button>
      </div>
      ${asTable
        ? html`<${Numbers} ...${{title, series, times, values, format}}/>`
        : html`<${Plot} ...${{times, values, series, now, format, whole, summary, setPointed}}/>`}
      <figcaption>
        ${series.length > 1 && html`
          <ul class="legend">${series.map(one => html`<li key=${one.label}><span class="swatch" style=${{background: `var(${one.colour})`}}/>${one.label}</li>`)}</ul>`}
        <p>${summary}</p>
      </figcaption>
    </figure>`;
}

/** The series on one axis of times, as uPlot wants them: [times, values, …], with undefined where a series has no point. */
function joined(series) {
  const times = [...new Set(series.flatMap(one => one.points.map(([at]) => at)))].sort((a, b) => a - b);
  return [times, ...series.map(one => {
    const known = new Map(one.points);
    return times.map(at => known.get(at));
  })];
}

function Plot({times, values, series, now, format, whole, summary, setPointed}) {
  const place = useRef();
  const plot = useRef();
  const facts = useRef();
  facts.current = {now, format, series};
  useLayoutEffect(() => {
    const axis = {stroke: () => colour("--muted"), grid: {stroke: () => colour("--grid"), width: 1}, ticks: {show: false}, font: "12px system-ui, sans-serif"};
    plot.current = new window.uPlot({
      width: Math.max(place.current.clientWidth, 100),
      height: HEIGHT,
      padding: [8, 20, 0, 0],
      legend: {show: false},
      cursor: {drag: {x: false, y: false}, y: false, points: {size: 7}},
      scales: {
        x: {time: true, range: () => [facts.current.now - HOUR, facts.current.now]},
        y: {range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.1]},
      },
      axes: [
        {...axis, space: 70, size: 26, gap: 6, values: (_, ticks) => ticks.map(at => clock(new Date(at * 1000)).slice(0, 5))},
        {...axis, size: 52, space: 36, incrs: whole ? WHOLE : undefined, values: (_, ticks) => ticks.map(short)},
      ],
      series: [{}, ...series.map((one, index) => ({
        stroke: () => colour(one.colour),
        fill: () => index === 0 ? colour(`${one.colour}-fill`) : null,
        width: 2,
        spanGaps: true,
        points: {show: false},
      }))],
      hooks: {setCursor: [self => setPointed(readout(self, facts.current))]},
    }, [times, ...values], place.current);
    const watch = new ResizeObserver(() => plot.current.setSize({width: Math.max(place.current.clientWidth, 100), height: HEIGHT}));
    watch.observe(place.current);
    const redraw = () => plot.current.redraw();
    scheme.addEventListener("change", redraw);
    return () => {
      watch.disconnect();
      scheme.removeEventListener("change", redraw);
      plot.current.destroy();
    };
  }, [series.length]);
  useEffect(() => plot.current.setData([times, ...values]), [now, times.length, values.map(one => one.at(-1)).join()]);
  return html`<div class="plot" role="img" aria-label=${summary} ref=${place}/>`;
}

function readout(self, {series, format}) {
  const at = self.cursor.idx;
  if (at === null || at === undefined || self.cursor.left < 0) return null;
  const seen = series.map((one, index) => [one, self.data[index + 1][at]]).filter(([, value]) => value !== undefined && value !== null);
  return `${clock(new Date(self.data[0][at] * 1000))}  ${seen.map(([one, value]) => `${series.length > 1 ? `${one.label}: ` : ""}${format(value)}`).join(" · ")}`;
}

const Numbers = ({title, series, times, values, format}) => html`
  <div class="table-region numbers" role="group" aria-label=${title} tabindex="0">
    <table>
      <caption class="off-screen">${title}</caption>
      <thead><tr><th scope="col">Time</th>${series.map(one => html`<th scope="col" class="number">${one.label}</th>`)}</tr></thead>
      <tbody>
        ${times.map((at, row) => html`
          <tr key=${at}>
            <th scope="row">${clock(new Date(at * 1000))}</th>
            ${values.map(one => html`<td class="number">${one[row] === undefined ? "" : format(one[row])}</td>`)}
          </tr>`).reverse()}
      </tbody>
    </table>
  </div>`;
