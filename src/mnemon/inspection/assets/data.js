// Reading the trace out of the page. What its parts mean stands in mnemon/inspection/trace.py; names are the same here.

/** A table of numbers, which may be stored as codes of shares. */
class Grid {
  constructor(values, shape, table) {
    this.values = values;
    this.shape = shape;
    this.table = table;
    [this.rows, this.columns = 1] = shape;
  }

  at(row, column = 0) {
    const value = this.values[row * this.columns + column];
    return this.table ? this.table[value] : value;
  }
}

function decodeBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  return bytes.buffer;
}

/** What the 65,536 numbers of half precision stand for. */
const halves = Float32Array.from({ length: 65536 }, (_, code) => {
  const [sign, exponent, fraction] = [code & 0x8000 ? -1 : 1, (code >> 10) & 31, code & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
});

const STEPS = 254;

/** Return what the codes of shares stand for that were rounded to steps; the one above the largest is a missing number. */
function stepsUpTo(largest) {
  const table = Float32Array.from({ length: STEPS + 2 }, (_, code) => largest * (code / STEPS) ** 2);
  table[STEPS + 1] = NaN;
  return table;
}

/** Return an array of the trace: typed numbers for one axis, a Grid for more. */
function decodeArray([kind, first, shape, largest], buffer) {
  const size = shape.reduce((product, length) => product * length, 1);
  const types = { f4: Float32Array, i4: Int32Array, f2: Uint16Array, u1: Uint8Array };
  const values = new types[kind](buffer, first, size);
  if (shape.length === 1) return kind === "f2" ? Float32Array.from(values, (code) => halves[code]) : values;
  return new Grid(values, shape, { f2: halves, u1: stepsUpTo(largest) }[kind] ?? null);
}

/** Return a number of the trace, which is text where it is not finite. */
function number(value) {
  if (typeof value !== "string") return value;
  return { inf: Infinity, "-inf": -Infinity }[value] ?? NaN;
}

function readPage() {
  const buffer = decodeBase64(document.getElementById("arrays").textContent);
  return JSON.parse(document.getElementById("trace").textContent, (_, value) =>
    value !== null && typeof value === "object" && Array.isArray(value.array) ? decodeArray(value.array, buffer) : value,
  );
}

const { trace, library, rounding } = readPage();
const numColumns = trace.text.pieces.length;
const numSegments = trace.text.segments.length - 1;
const numTokens = trace.text.starts[numColumns];
const segmentOf = new Int32Array(numColumns);
for (let segment = 0; segment < numSegments; segment += 1) {
  segmentOf.fill(segment, trace.text.segments[segment], trace.text.segments[segment + 1]);
}

/** Columns drawn at once at most: what is shown is a segment, or a part of a very long one. */
const MOST_COLUMNS = 256;

/** What the slider steps through: {segment, first, last, part, parts}; `last` is one past the end. */
const views = [];
for (let segment = 0; segment < numSegments; segment += 1) {
  const [start, end] = [trace.text.segments[segment], trace.text.segments[segment + 1]];
  const parts = Math.ceil((end - start) / MOST_COLUMNS);
  for (let part = 0; part < parts; part += 1) {
    const first = start + part * MOST_COLUMNS;
    views.push({ segment, first, last: Math.min(end, first + MOST_COLUMNS), part, parts });
  }
}
if (!views.length) views.push({ segment: 0, first: 0, last: 0, part: 0, parts: 1 });
const longestView = Math.max(...views.map((view) => view.last - view.first));
const viewOf = (column) => views.findIndex((view) => column < view.last);
const firstViewOf = (segment) => views.findIndex((view) => view.segment === segment);

function tokensOf(column) {
  const [first, last] = [trace.text.starts[column], trace.text.starts[column + 1] - 1];
  return first === last ? `token ${formatCount(first)}` : `tokens ${formatCount(first)}–${formatCount(last)}`;
}

/** Return the first line of everything that is said of a column. */
function titleOf(column) {
  return `${quote(trace.text.pieces[column])} · ${tokensOf(column)} · segment ${segmentOf[column] + 1}`;
}

/** Return by how much the memory raises the log-probability of a column; NaN where nothing was predicted. */
function gainOf(column) {
  return trace.predictions.with_memory[column] - trace.predictions.without_memory[column];
}

/** Return what the predictions say of a column. */
function predictionLines(column) {
  if (!trace.predictions) return [];
  const { with_memory: withMemory, without_memory: without, likeliest_with: next, likeliest_without: nextWithout } = trace.predictions;
  const gain = gainOf(column);
  const lines = [];
  if (!Number.isNaN(gain)) {
    lines.push(`log-probability ${format(withMemory[column])} with memory, ${format(without[column])} without: ${formatSigned(gain)}`);
  }
  lines.push(`likeliest next: ${quote(next[column])} with memory, ${quote(nextWithout[column])} without`);
  return lines;
}

/** Return the mean of the numbers of an array from `first` to `last`, those that are NaN left out. */
function meanOf(value, first, last) {
  let [sum, count] = [0, 0];
  for (let index = first; index < last; index += 1) {
    const one = value(index);
    if (!Number.isNaN(one)) [sum, count] = [sum + one, count + 1];
  }
  return count ? sum / count : NaN;
}

/** Return the means over every segment of a number that every column has. */
function segmentMeans(value) {
  return Float32Array.from({ length: numSegments }, (_, segment) =>
    meanOf(value, trace.text.segments[segment], trace.text.segments[segment + 1]),
  );
}

// What is looked at. Whoever draws it is told when it changes.
const state = { view: 0, column: null };
const listeners = [];

function onChange(listener) {
  listeners.push(listener);
}

/** Change what is looked at: change({view: 3, column: null}). */
function change(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if ("view" in changes && !("column" in changes) && before.view !== state.view) state.column = null;
  const changed = new Set(Object.keys(state).filter((key) => state[key] !== before[key]));
  if (changed.size) for (const listener of listeners) listener(changed);
}

/** Look at a column wherever it is. */
function goTo(column) {
  change({ view: viewOf(column), column });
}
