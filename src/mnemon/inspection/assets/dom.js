// Building the document. Texts of a trace are foreign: they become text nodes and attributes, never HTML.

/** Return an element: make("button", {type: "button", onclick: f}, "text", child). Missing children are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return a section with a heading, and a sentence below it that says how to read what follows. */
function makeSection(id, title, lead, ...children) {
  const heading = make("h2", { id: `${id}-title` }, title);
  return make("section", { id, "aria-labelledby": heading.id }, heading, lead && make("p", { class: "lead" }, lead), ...children);
}

/**
 * Return a row of buttons of which one is chosen. They are radio buttons, so that arrow keys work as everywhere.
 * `entries` are pairs of a value and its text.
 */
function makeSwitch(name, label, entries, chosen, choose) {
  const buttons = entries.map(([value, text]) =>
    make(
      "label",
      {},
      make("input", { type: "radio", name, value: String(value), checked: value === chosen, onchange: () => choose(value) }),
      make("span", {}, text),
    ),
  );
  return make("fieldset", { class: "switch", id: name }, make("legend", {}, label), ...buttons);
}

/** Return a labelled list to choose from; `entries` are pairs of a value (a number) and its text. */
function makeChoice(id, label, entries, chosen, choose) {
  const options = entries.map(([value, text]) => make("option", { value: String(value), selected: value === chosen }, text));
  const select = make("select", { id, onchange: (event) => choose(Number(event.target.value)) }, ...options);
  return make("label", { class: "choice" }, make("span", {}, label), select);
}

/** Return a table inside a box that scrolls on a narrow screen. Cells are texts or elements. */
function makeTable(caption, head, rows, numeric = []) {
  const cell = (tag, content, index, attributes = {}) =>
    make(tag, { ...attributes, class: numeric.includes(index) ? "number" : null }, content);
  const table = make(
    "table",
    {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...head.map((text, index) => cell("th", text, index, { scope: "col" })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((content, index) => cell("td", content, index))))),
  );
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

/** Return a bar of a table; `span` gives the [lowest, highest] number of its column, and 0 is where bars begin. */
function makeBar(value, [lowest, highest]) {
  const [low, high] = [Math.min(0, lowest), Math.max(0, highest)];
  const shown = Math.max(low, Math.min(high, value));
  const part = (length) => `${(length / (high - low || 1)) * 100}%`;
  const fill = make("i", { class: value < 0 ? "against" : null, hidden: !value });
  fill.style.marginInlineStart = part(Math.min(shown, 0) - low);
  fill.style.width = part(Math.abs(shown));
  return make("span", { class: "meter", "aria-hidden": "true" }, fill);
}

/** Return words with a number each, such as logits. */
function makeWords(words) {
  const chip = ([word, number]) => make("span", {}, make("b", {}, labelled(word)), " ", number);
  return words.length ? make("span", { class: "words" }, ...words.map(chip)) : "–";
}

/** Replace what an element holds. */
function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** Return a number with three digits that count, and a true minus. */
function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000 && size < 1e7) return formatCount(Math.round(value)).replace("-", "−");
  if (size >= 1e7 || size < 1e-4) return value.toExponential(1).replace(/-/g, "−");
  const digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
  return value.toFixed(Math.min(digits, 6)).replace("-", "−");
}

/** Return a number of an axis, without zeros that say nothing. */
function formatTick(value) {
  return format(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

/** Return a difference with its sign. */
function formatSigned(value) {
  return value > 0 ? `+${format(value)}` : format(value);
}

/** Return a count with separators. */
function formatCount(value) {
  return value.toLocaleString("en-US");
}

/** Return a share in per cent. */
function formatShare(value) {
  return Number.isNaN(value) ? "–" : `${format(value * 100)} %`;
}

const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f]/g;

/** Return a text in which white space and control characters can be seen. */
function visible(text) {
  const shown = text
    .replace(/\r?\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/\p{Cs}/gu, "\ufffd")
    .replace(CONTROLS, (character) => String.fromCharCode(0x2400 + (character.charCodeAt(0) & 0x3f)));
  return shown === "" ? "∅" : shown;
}

/** Return a text as a label, without the blanks around it. */
function labelled(text) {
  return visible(text).trim() || "␣";
}

/** Return a text in quotation marks, cut in the middle where it is long. */
function quote(text, most = 90) {
  const shown = Array.from(visible(text));
  const cut = shown.length > most ? [...shown.slice(0, most / 2), " … ", ...shown.slice(-most / 2)] : shown;
  return `“${cut.join("")}”`;
}
