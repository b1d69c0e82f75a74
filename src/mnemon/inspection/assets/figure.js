// What all figures share: a canvas that fits its box, a cell under the pointer or the arrow keys, and its numbers.

const tip = document.getElementById("tip");
const spoken = document.getElementById("spoken");
const figures = new Set();
const pending = new Set();
let drawing = false;

/** Show lines of text at a place of the window, and keep them inside of it; `steady` ones stay when the page scrolls. */
function showTip(lines, left, top, steady = false) {
  tip.classList.toggle("steady", steady);
  fill(tip, ...lines.map((line, index) => make(index ? "span" : "strong", {}, line)));
  tip.hidden = false;
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const [right, bottom] = [document.documentElement.clientWidth, window.innerHeight];
  tip.style.left = `${Math.max(4, Math.min(left + 14, right - width - 4))}px`;
  tip.style.top = `${top + 18 + height > bottom ? Math.max(4, top - height - 12) : top + 18}px`;
}

function hideTip() {
  tip.hidden = true;
}

/** Let a screen reader say lines of text. */
function speak(lines) {
  spoken.textContent = lines.join(". ");
}

function drawNow() {
  drawing = false;
  for (const figure of pending) figure.redraw();
  pending.clear();
}

function invalidate(figure) {
  pending.add(figure);
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(drawNow);
  }
}

function redrawAll() {
  for (const figure of figures) invalidate(figure);
}

const sizes = new ResizeObserver((entries) => {
  for (const entry of entries) invalidate(entry.target.figure);
});

/** Return as much of a text as fits into a width. */
function fitText(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const characters = Array.from(text);
  let [low, high] = [0, characters.length];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (context.measureText(`${characters.slice(0, middle).join("")}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return `${characters.slice(0, low).join("")}…`;
}

const FONT = '11px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/**
 * A figure with a grid of cells. Subclasses say how it is drawn (`draw`), where cells lie (`cellAt`, `boxOf`), what is
 * said of one (`describe`), and what choosing one does (`choose`); `size()` is its number of [rows, columns].
 */
class Figure {
  constructor({ id, title, help, label, describe, choose = null, start = null }) {
    Object.assign(this, { describe, choose, start, cell: null });
    this.title = make("span", { class: "title" }, title);
    this.canvas = make("canvas", {
      id,
      tabindex: "0",
      role: "application",
      "aria-roledescription": "figure",
      "aria-label": `${label ?? title}. Arrow keys move over the cells${choose ? ", Enter chooses one" : ""}.`,
      onpointermove: (event) => this.point(event),
      onpointerdown: (event) => this.point(event),
      onpointerleave: (event) => event.pointerType !== "touch" && this.leave(),
      onclick: (event) => this.click(event),
      onkeydown: (event) => this.press(event),
      onblur: () => this.leave(),
    });
    this.box = make("div", { class: "canvas" }, this.canvas);
    this.box.figure = this;
    this.element = make("figure", {}, make("figcaption", {}, this.title, help && make("small", {}, help)), this.box);
    this.context = this.canvas.getContext("2d");
    figures.add(this);
    sizes.observe(this.box);
  }

  redraw() {
    const width = this.box.clientWidth;
    if (!width) return;
    const height = this.measure(width);
    const ratio = window.devicePixelRatio || 1;
    this.ratio = ratio;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.font = FONT;
    this.context.clearRect(0, 0, width, height);
    this.draw(this.context, width, height);
    const [rows, columns] = this.size();
    if (this.cell && (this.cell[0] >= rows || this.cell[1] >= columns)) this.cell = null;
    if (this.cell) this.drawCell(this.context, this.boxOf(this.cell));
  }

  drawCell(context, [left, top, width, height]) {
    context.strokeStyle = theme.colours.paper;
    context.lineWidth = 4;
    context.strokeRect(left - 1, top - 1, width + 2, height + 2);
    context.strokeStyle = theme.colours.ink;
    context.lineWidth = 2;
    context.strokeRect(left - 1, top - 1, width + 2, height + 2);
  }

  point(event) {
    const cell = this.cellAt(event.offsetX, event.offsetY);
    if (!cell) return this.leave();
    this.put(cell);
    return showTip(this.describe(...cell), event.clientX, event.clientY);
  }

  click(event) {
    const cell = this.cellAt(event.offsetX, event.offsetY);
    if (cell && this.choose) this.choose(...cell);
  }

  put(cell) {
    this.cell = cell;
    invalidate(this);
  }

  leave() {
    hideTip();
    if (this.cell) this.put(null);
  }

  press(event) {
    const [rows, columns] = this.size();
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
    if (event.key === "Escape") return this.leave();
    if ((event.key === "Enter" || event.key === " ") && this.cell && this.choose) {
      event.preventDefault();
      return this.choose(...this.cell);
    }
    const step = steps[event.key];
    if (!step || !rows || !columns || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    event.preventDefault();
    const far = event.shiftKey ? 10 : 1;
    const limit = (value, most) => Math.max(0, Math.min(most - 1, value));
    const [row, column] = this.cell ?? this.start?.() ?? [0, 0];
    const moved = this.cell ? [row + step[0] * far, column + step[1] * far] : [row, column];
    const cell = [limit(moved[0], rows), limit(moved[1], columns)];
    this.put(cell);
    const lines = this.describe(...cell);
    const [left, top, width, height] = this.boxOf(cell);
    const place = this.canvas.getBoundingClientRect();
    showTip(lines, place.left + left + width / 2, place.top + Math.max(0, top + height / 2), true);
    return speak(lines);
  }
}

/** Return round numbers between 0 (or `low`) and `high`, about as many as asked for. */
function ticksOf(low, high, wanted) {
  const range = high - low;
  if (!(range > 0)) return [low];
  const raw = range / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.999);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}
