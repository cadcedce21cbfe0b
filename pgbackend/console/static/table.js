// A table that sorts by its headers, becomes cards on a phone, and redraws only the rows that have changed.
// While the pointer or the focus is in its rows their order stands still, so nobody clicks the wrong one.
import {Component, html, useRef, useState} from "./vendor/htm-preact.js";

const memory = new Map(); // what the reader chose, while the page is open: it survives navigation

/** State that is still there when the reader comes back to the page. */
export function useMemory(key, initial) {
  const [, redraw] = useState(0);
  const set = value => { memory.set(key, value); redraw(n => n + 1); };
  return [memory.has(key) ? memory.get(key) : initial, set];
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return -1;
  if (b === null || b === undefined) return 1;
  return typeof a === "string" && typeof b === "string" ? a.localeCompare(b, "en", {numeric: true}) : a < b ? -1 : 1;
}

/**
 * columns: {id, label, cell(row), value(row) to sort by, number, width, head (names the row), most (largest first)}.
 * `sort` names the memory of the order and its first value: {key, by, down}. `version`: another one redraws all rows.
 */
export function Table({caption, columns, rows, rowKey, sort, version, empty}) {
  const [order, setOrder] = useMemory(sort ? `sort ${sort.key}` : "", sort);
  const held = useRef(false);
  const ranks = useRef({order: null, keys: new Map()});
  const sorted = sort ? arranged(rows, {columns, rowKey, order, ranks: ranks.current, held: held.current}) : rows;
  const choose = id => {
    const column = columns.find(one => one.id === id);
    setOrder({by: id, down: order.by === id ? !order.down : Boolean(column.most)});
  };
  const hold = value => () => { held.current = value; };
  return html`
    <div class="table">
      ${sort && rows.length > 1 && html`
        <label class="sort-phone">Sort by
          <select value=${`${order.by} ${order.down}`} onChange=${event => {
            const [by, down] = event.target.value.split(" ");
            setOrder({by, down: down === "true"});
          }}>
            ${columns.filter(one => one.value).map(one => [one.most, !one.most].map(down => html`
              <option value=${`${one.id} ${Boolean(down)}`}>${one.label}, ${down ? "descending" : "ascending"}</option>`))}
          </select>
        </label>`}
      <div class="table-region" role="group" aria-label=${caption} tabindex="0">
        <table role="table">
          <caption class="off-screen">${caption}</caption>
          <colgroup>${columns.map(one => html`<col key=${one.id} style=${{width: one.width ?? "auto"}}/>`)}</colgroup>
          <thead role="rowgroup">
            <tr role="row">
              ${columns.map(one => html`
                <th key=${one.id} role="columnheader" scope="col" class=${one.number ? "number" : ""}
                    aria-sort=${sort && order.by === one.id ? order.down ? "descending" : "ascending" : null}>
                  ${sort && one.value
                    ? html`<button type="button" class="plain" onClick=${() => choose(one.id)}>${one.label}</button>`
                    : one.header ?? one.label}
                </th>`)}
            </tr>
          </thead>
          <tbody role="rowgroup" onMouseEnter=${hold(true)} onMouseLeave=${hold(false)} onfocusin=${hold(true)} onfocusout=${hold(false)}>
            ${sorted.map(row => html`<${Row} key=${rowKey(row)} row=${row} columns=${columns} version=${version}/>`)}
          </tbody>
        </table>
        ${rows.length === 0 && html`<p class="empty">${empty ?? "Nothing here."}</p>`}
      </div>
    </div>`;
}

function arranged(rows, {columns, rowKey, order, ranks, held}) {
  const value = columns.find(one => one.id === order.by).value;
  const sign = order.down ? -1 : 1;
  const stands = held && ranks.order === order;
  const place = row => ranks.keys.get(rowKey(row)) ?? rows.length;
  const sorted = [...rows].sort((a, b) => stands
    ? place(a) - place(b)
    : sign * compare(value(a), value(b)) || compare(rowKey(a), rowKey(b)));
  ranks.order = order;
  if (!stands) ranks.keys = new Map(sorted.map((row, rank) => [rowKey(row), rank]));
  return sorted;
}

class Row extends Component {
  shouldComponentUpdate(next) {
    if (next.version === this.props.version && (next.row === this.props.row || JSON.stringify(next.row) === JSON.stringify(this.props.row))) return false;
    return true;
  }

  render({row, columns}) {
    return html`
      <tr role="row">
        ${columns.map(one => {
          const content = one.cell(row);
          const name = `${one.number ? "number" : ""} ${content === null || content === "" ? "blank" : ""} ${one.style ?? ""}`;
          return one.head
            ? html`<th key=${one.id} role="rowheader" scope="row" class=${name} data-label=${one.label}>${content}</th>`
            : html`<td key=${one.id} role="cell" class=${name} data-label=${one.label}>${content}</td>`;
        })}
      </tr>`;
  }
}

/** A number in a table; zeros are faint, so that the others stand out. */
export const Figure = ({value, text, tone}) => html`<span class=${value ? tone ?? "" : "faint"}>${text}</span>`;
