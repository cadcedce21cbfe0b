// Lays JSON out in lines by adding white space between tokens. It parses no number and no string, so each token stays
// exactly as it was stored. Text that is not JSON comes back as null, and its reader sees it as it is.

const TOKEN = /[\t\n\r ]*(?:("[^"\\\u0000-\u001f]*(?:\\.[^"\\\u0000-\u001f]*)*")|(-?\d[\d.eE+-]*)|(true|false|null)|([{}[\],:]))/y;
const INDENT = "  ";
const DEEPEST = 40; // deeper lines are not indented further: they would be wider than any screen

/** The same tokens on lines, or null. `truncated`: the text may end anywhere. */
export function pretty(text, {truncated = false} = {}) {
  const limit = 4 * text.length + 262_144;
  const open = [];
  const parts = [];
  let size = 0;
  let at = 0;
  let before = "";
  const put = part => { parts.push(part); size += part.length; };
  const line = () => put("\n" + INDENT.repeat(Math.min(open.length, DEEPEST)));
  while (at < text.length) {
    TOKEN.lastIndex = at;
    const found = TOKEN.exec(text);
    if (found === null) {
      const rest = text.slice(at).trim();
      if (rest === "") break;
      if (!truncated) return null;
      put(rest);
      return parts.join("");
    }
    at = TOKEN.lastIndex;
    const token = found[1] ?? found[2] ?? found[3] ?? found[4];
    const closes = token === "}" || token === "]";
    if (closes) {
      if (open.pop() !== (token === "}" ? "{" : "[") || before === "," || before === ":") return null;
      if (before !== "{" && before !== "[") line();
    } else if (token === "," || token === ":") {
      if (open.length === 0 || before === "" || ",:{[".includes(before)) return null;
    } else {
      if (before === "" ? parts.length > 0 : !"{[,:".includes(before)) return null;
      if (before && before !== ":") line();
    }
    put(token === ":" ? ": " : token);
    if (token === "{" || token === "[") open.push(token);
    before = found[4] ?? "value";
    if (size > limit) return null;
  }
  const whole = open.length === 0 && before !== "" && !",:".includes(before);
  return whole || truncated ? parts.join("") : null;
}
