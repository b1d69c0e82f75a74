// The text of what the slider stands at, as a list whose entries are columns.

/**
 * `paint(span, column)` colours an entry, `describe(column)` says what is known of it, `span()` gives the columns
 * [first, last) to show; the current segment if it is not given.
 */
class TextView {
  constructor({ id, label, paint, describe, span = null }) {
    Object.assign(this, { id, paint, describe });
    this.span = span ?? (() => [views[state.view].first, views[state.view].last]);
    this.element = make("div", {
      id,
      class: "text",
      role: "listbox",
      tabindex: "0",
      "aria-label": `${label}. Arrow keys move from one piece to the next`,
      onkeydown: (event) => this.press(event),
      onpointerover: (event) => this.point(event),
      onpointerleave: hideTip,
      onclick: (event) => this.click(event),
      onblur: hideTip,
    });
    onChange((changed) => {
      if (changed.has("view")) this.draw();
      else if (changed.has("column")) this.mark();
    });
  }

  draw() {
    const [first, last] = this.span();
    this.first = first;
    this.entries = [];
    for (let column = first; column < last; column += 1) {
      const entry = make("span", { id: `${this.id}-${column}`, role: "option", "data-column": column }, visible(trace.text.pieces[column]));
      this.paint(entry, column);
      this.entries.push(entry);
    }
    fill(this.element, ...this.entries);
    this.mark();
  }

  repaint() {
    this.entries.forEach((entry, index) => this.paint(entry, this.first + index));
  }

  mark() {
    this.marked?.setAttribute("aria-selected", "false");
    const entry = state.column === null ? undefined : this.entries[state.column - this.first];
    this.marked = entry;
    if (entry) {
      entry.setAttribute("aria-selected", "true");
      this.element.setAttribute("aria-activedescendant", entry.id);
    } else this.element.removeAttribute("aria-activedescendant");
  }

  columnOf(event) {
    const column = event.target.dataset?.column;
    return column === undefined ? null : Number(column);
  }

  point(event) {
    const column = this.columnOf(event);
    if (column === null) hideTip();
    else showTip(this.describe(column), event.clientX, event.clientY);
  }

  click(event) {
    const column = this.columnOf(event);
    if (column !== null) change({ column });
  }

  press(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return hideTip();
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    event.preventDefault();
    const last = this.entries.length - 1;
    const place = this.marked ? state.column - this.first + steps[event.key] : event.key === "End" ? last : 0;
    const column = this.first + Math.max(0, Math.min(last, place));
    change({ column });
    this.marked.scrollIntoView({ block: "nearest", behavior: "instant" });
    const box = this.marked.getBoundingClientRect();
    const lines = this.describe(column);
    showTip(lines, box.left, box.bottom - 12, true);
    return speak(lines);
  }
}

/** Colour an entry by a signed number, of which `largest` is the strongest: blue and a line above 0, orange and dots below. */
function paintSigned(entry, value, largest) {
  const share = Math.max(-1, Math.min(1, value / (largest || 1)));
  const strong = Math.sqrt(Math.abs(share));
  entry.className = Number.isNaN(share) ? "" : share > 0.02 ? "for" : share < -0.02 ? "against" : "";
  entry.style.backgroundColor = entry.className ? transparent(share > 0 ? theme.colours.gain : theme.colours.loss, 0.5 * strong) : "";
}

/** Colour an entry by an amount between 0 and 1. */
function paintShare(entry, share) {
  entry.style.backgroundColor = share > 0 ? transparent(theme.colours.accent, 0.62 * Math.sqrt(Math.min(1, share))) : "";
}
