// Shows text that others wrote: names, attributes, errors, data. A character that a reader cannot see, or that moves
// others around, becomes a marker such as ⟨U+202E⟩; the text around it cannot change the page's direction.
import {html} from "./vendor/htm-preact.js";

const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u115F\u1160\u3164\uFFA0\u034F]+/gu;
const HIDDEN_IN_LINES = /(?:(?![\n\t]|\r\n)[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u115F\u1160\u3164\uFFA0\u034F])+/gu;
const MARKERS = 2_000; // more of them would make a page of 256 KiB slow

const named = run => Array.from(run, one => `⟨U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`).join("");

/** The text with markers in the place of hidden characters, for titles, labels and buttons. */
export const plain = text => text.replace(HIDDEN, named);

/** The same, at most `length` characters long. */
export function brief(text, length = 40) {
  const whole = plain(text);
  return whole.length > length ? `${whole.slice(0, length - 1)}…` : whole;
}

/** The text as children of an element; each run of hidden characters is an element of its own. `lines`: keep line ends and tabs. */
export function visible(text, {lines = false} = {}) {
  const pattern = lines ? HIDDEN_IN_LINES : HIDDEN;
  const parts = [];
  let from = 0;
  for (const found of text.matchAll(pattern)) {
    if (parts.length > 2 * MARKERS) return [...parts, text.slice(from).replace(pattern, named)];
    parts.push(text.slice(from, found.index), html`<span class="hidden-char">${named(found[0])}</span>`);
    from = found.index + found[0].length;
  }
  parts.push(text.slice(from));
  return parts;
}

/** One value that somebody else wrote, isolated from the text around it. */
export const Text = ({value}) => html`<bdi>${visible(value)}</bdi>`;
