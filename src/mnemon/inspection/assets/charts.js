// Heat maps, strips over the whole text, and lines over the segments.

/**
 * Amounts in rows and columns. Colours are on the scale of the square root, so that small shares can be told from none,
 * or even (`power` 1).
 *
 * `size()` gives [rows, columns], `value(row, column)` an amount, `range()` what the weakest and strongest colour mean,
 * `mostRows` how many rows there may ever be (so that the height never jumps), `rowLabel` and `columnLabel` texts,
 * `fitted` whether the labels get just the room they need (else one that does not change from segment to segment),
 * `weight(row)` which labels matter most where not all have room, `marked()` a column to point at, `band()` a span of
 * columns to frame, `whyEmpty` what stands in the place of a map without a single amount.
 */
class HeatMap extends Figure {
  constructor(options) {
    super(options);
    const { size, value, range, power = 0.5, mostRows, rowLabel, columnLabel, axis, weight = null } = options;
    const { fitted = false, rowHeight = [3, 18], widest = 26, tall = 620, marked = () => null, band = null, hot = () => null, whyEmpty = "nothing was recorded" } = options;
    Object.assign(this, { size, value, range, power, mostRows, rowLabel, columnLabel, axis, weight });
    Object.assign(this, { fitted, rowHeight, widest, tall, marked, band, hot, whyEmpty });
    this.image = document.createElement("canvas");
  }

  measure(width) {
    const [rows, columns] = this.size();
    const [low, high] = this.rowHeight;
    this.row = Math.max(low, Math.min(high, Math.floor(this.tall / this.mostRows)));
    const room = Math.round(Math.min(150, Math.max(58, width * (this.fitted ? 0.45 : 0.3))));
    this.left = this.fitted && rows ? Math.min(room, 10 + this.widestLabel(rows)) : room;
    const free = (width - this.left - 2) / Math.max(1, columns);
    // Whole device pixels where cells are large enough for the loss not to show.
    this.column = Math.min(this.widest, free > 5 ? Math.floor(free * devicePixelRatio) / devicePixelRatio : free);
    this.top = 12;
    return this.top + this.row * Math.max(rows, this.mostRows) + 60;
  }

  draw(context, width) {
    const [rows, columns] = this.size();
    const [low, high] = this.range();
    if (!rows || !columns) return;
    this.image.width = columns;
    this.image.height = rows;
    const pixels = new ImageData(columns, rows);
    let isEmpty = true;
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const value = this.value(row, column);
        if (Number.isNaN(value)) continue;
        isEmpty = false;
        const shade = Math.round(Math.max(0, Math.min(1, (value - low) / (high - low || 1))) ** this.power * 255);
        pixels.data.set([...theme.ramp[shade], 255], (row * columns + column) * 4);
      }
    }
    this.image.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    const [right, bottom] = [this.column * columns, this.row * rows];
    context.drawImage(this.image, this.left, this.top, right, bottom);
    context.strokeStyle = theme.colours.line;
    context.lineWidth = 1;
    context.strokeRect(this.left - 0.5, this.top - 0.5, right + 1, bottom + 1);
    this.drawRowLabels(context, rows);
    this.drawColumnLabels(context, columns, bottom);
    this.drawLegend(context, width, low, high);
    if (isEmpty) this.drawReason(context, right, bottom);
    else this.drawMarks(context, right, bottom);
  }

  drawReason(context, right, bottom) {
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = theme.colours.soft;
    context.fillText(fitText(context, this.whyEmpty, right), this.left + right / 2, this.top + bottom / 2);
  }

  widestLabel(rows) {
    this.context.font = FONT;
    const widths = Array.from({ length: rows }, (_, row) => this.context.measureText(this.rowLabel(row)).width);
    return Math.ceil(Math.max(...widths));
  }

  drawMarks(context, right, bottom) {
    const marked = this.marked();
    context.strokeStyle = theme.colours.accent;
    context.fillStyle = theme.colours.accent;
    context.lineWidth = 1.5;
    if (marked !== null) {
      const left = this.left + marked * this.column;
      context.strokeRect(left - 0.75, this.top - 0.75, this.column + 1.5, bottom + 1.5);
      context.beginPath();
      context.moveTo(left + this.column / 2, this.top - 2);
      context.lineTo(left + this.column / 2 - 5, this.top - 10);
      context.lineTo(left + this.column / 2 + 5, this.top - 10);
      context.fill();
    }
    const hot = this.hot();
    if (hot !== null) context.strokeRect(this.left - 0.75, this.top + hot * this.row - 0.75, right + 1.5, this.row + 1.5);
    const band = this.band?.();
    if (band) context.strokeRect(this.left + band[0] * this.column - 0.75, this.top - 0.75, (band[1] - band[0]) * this.column + 1.5, bottom + 1.5);
  }

  drawRowLabels(context, rows) {
    context.textAlign = "right";
    context.textBaseline = "middle";
    const taken = [];
    let order = Array.from({ length: rows }, (_, row) => row);
    if (this.row < 12 && this.weight) {
      const weights = order.map((row) => this.weight(row));
      order = order.sort((one, other) => weights[other] - weights[one] || one - other);
    }
    for (const row of order) {
      const middle = this.top + (row + 0.5) * this.row;
      if (taken.some((other) => Math.abs(other - middle) < 12)) continue;
      taken.push(middle);
      context.fillStyle = this.hot() === row || this.cell?.[0] === row ? theme.colours.ink : theme.colours.soft;
      context.fillText(fitText(context, this.rowLabel(row), this.left - 8), this.left - 5, middle);
    }
  }

  drawColumnLabels(context, columns, bottom) {
    context.textAlign = "center";
    context.textBaseline = "top";
    context.fillStyle = theme.colours.soft;
    const widest = Math.max(context.measureText(this.columnLabel(columns - 1)).width, 12) + 8;
    const step = Math.max(1, ticksOf(0, columns, Math.max(1, (this.column * columns) / widest))[1] ?? 1);
    for (let column = 0; column < columns; column += Math.ceil(step)) {
      context.fillText(this.columnLabel(column), this.left + (column + 0.5) * this.column, this.top + bottom + 4);
    }
    context.textAlign = "left";
    context.fillText(this.axis, this.left, this.top + bottom + 18);
  }

  drawLegend(context, width, low, high) {
    const [rows] = this.size();
    const top = this.top + this.row * Math.max(rows, this.mostRows) + 36;
    const length = Math.min(150, width - this.left - 24);
    for (let step = 0; step < length; step += 1) {
      context.fillStyle = rampColour(step / length);
      context.fillRect(this.left + step, top, 1.5, 7);
    }
    context.textBaseline = "top";
    context.fillStyle = theme.colours.soft;
    for (const [place, align] of [[0, "left"], [0.5, "center"], [1, "right"]]) {
      context.textAlign = align;
      context.fillText(formatTick(low + (high - low) * place ** (1 / this.power)), this.left + place * length, top + 10);
    }
  }

  cellAt(x, y) {
    const [rows, columns] = this.size();
    const [row, column] = [Math.floor((y - this.top) / this.row), Math.floor((x - this.left) / this.column)];
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  }

  boxOf([row, column]) {
    return [this.left + column * this.column, this.top + row * this.row, this.column, this.row];
  }
}

/** Room for the scale at the left of strips and lines, so that they stand below each other. */
const GUTTER = 52;

/**
 * One number for every column of the whole text, as bars. Where bars would be too thin, each stands for several
 * columns and shows the one that is farthest from 0.
 */
class Strip extends Figure {
  constructor({ value, range, colour = () => theme.colours.accent, tall = 64, label, ...options }) {
    super({ label: label ?? options.title, choose: (_, bin) => goTo(this.farthest(bin)), ...options });
    Object.assign(this, { value, range, colour, tall, lines: this.describe });
    this.describe = (_, bin) => this.said(bin);
    this.start = () => [0, Math.floor((views[state.view].first * this.bins) / numColumns)];
  }

  said(bin) {
    const [first, last] = this.columnsOf(bin);
    const lines = this.lines(this.farthest(bin));
    return last - first > 1 ? [...lines, `the farthest from 0 of ${last - first} columns here`] : lines;
  }

  size() {
    return [1, this.bins];
  }

  measure(width) {
    this.left = GUTTER;
    this.width = width - this.left - 12;
    this.bins = Math.max(1, Math.min(numColumns, Math.floor(this.width / 2)));
    return this.tall + 20;
  }

  columnsOf(bin) {
    const first = Math.floor((bin * numColumns) / this.bins);
    return [first, Math.max(first + 1, Math.floor(((bin + 1) * numColumns) / this.bins))];
  }

  farthest(bin) {
    const [first, last] = this.columnsOf(bin);
    let best = first;
    for (let column = first; column < last; column += 1) {
      if (Math.abs(this.value(column)) > Math.abs(this.value(best)) || Number.isNaN(this.value(best))) best = column;
    }
    return best;
  }

  draw(context) {
    const [low, high] = this.range();
    const span = high - low || 1;
    const zero = this.tall * (high / span);
    const { first, last } = views[state.view];
    const at = (column) => this.left + (column / numColumns) * this.width;
    context.fillStyle = theme.colours.panel;
    context.fillRect(this.left, 0, this.width, this.tall);
    context.fillStyle = transparent(theme.colours.accent, 0.22);
    context.fillRect(at(first), 0, Math.max(2, at(last) - at(first)), this.tall);
    const bar = this.width / this.bins;
    for (let bin = 0; bin < this.bins; bin += 1) {
      const column = this.farthest(bin);
      const value = this.value(column);
      if (Number.isNaN(value)) continue;
      context.fillStyle = this.colour(column, value);
      const height = (Math.max(low, Math.min(high, value)) / span) * this.tall;
      // Whole pixels: bars that overlap by parts of one would look like a pattern.
      const [left, right] = [bin, bin + 1].map((end) => Math.round(this.left + end * bar));
      context.fillRect(left, zero - Math.max(0, height), Math.max(1, right - left - (bar > 3 ? 1 : 0)), Math.max(0.5, Math.abs(height)));
    }
    context.fillStyle = theme.colours.line;
    context.fillRect(this.left, zero - 0.5, this.width, 1);
    this.drawScale(context, low, high);
  }

  drawScale(context, low, high) {
    context.textBaseline = "top";
    context.textAlign = "left";
    context.fillStyle = theme.colours.soft;
    const ticks = ticksOf(0, numTokens, this.width / 110).filter((tick) => tick < numTokens);
    for (const tick of ticks) {
      const left = this.left + (tick / numTokens) * this.width;
      context.fillRect(left, this.tall, 1, 4);
      const label = tick ? formatCount(tick) : "token 0";
      const isCut = left + 3 + context.measureText(label).width > this.left + this.width;
      context.textAlign = isCut ? "right" : "left";
      context.fillText(label, isCut ? left - 3 : left + 3, this.tall + 5);
    }
    context.textAlign = "right";
    for (const [value, top] of [[high, 0], [low, this.tall - 11]]) {
      context.fillText(low < 0 ? formatSigned(value) : formatTick(value), this.left - 5, top);
    }
  }

  cellAt(x, y) {
    const bin = Math.floor(((x - this.left) / this.width) * this.bins);
    return y >= 0 && y <= this.tall && bin >= 0 && bin < this.bins ? [0, bin] : null;
  }

  boxOf([, bin]) {
    const bar = this.width / this.bins;
    return [this.left + bin * bar, 0, bar, this.tall];
  }
}

/**
 * Lines over the segments; of more segments than there is room for, the means of a few. `series()` gives {name, value(segment), colour, pattern, width}; choosing a place goes there.
 * `range` fixes the vertical axis, else it runs from 0 to the largest number.
 */
class Lines extends Figure {
  constructor({ series, range = null, tall = 150, choose, ...options }) {
    super({
      ...options,
      describe: (_, segment) => [`segment ${segment + 1}`, ...series().map(({ name, value }) => `${name}: ${format(value(segment))}`)],
      choose: choose ?? ((_, segment) => change({ view: firstViewOf(segment) })),
      start: () => [0, views[state.view].segment],
    });
    Object.assign(this, { series, range, tall });
    this.keys = make("div", { class: "keys" });
    this.element.append(this.keys);
  }

  size() {
    return [1, numSegments];
  }

  measure(width) {
    this.left = GUTTER;
    this.width = width - this.left - 12;
    return this.tall + 34;
  }

  across(segment) {
    return numSegments > 1 ? this.left + (segment / (numSegments - 1)) * this.width : this.left + this.width / 2;
  }

  draw(context) {
    const series = this.series();
    let [low, high] = this.range ?? [0, 0];
    if (!this.range) {
      for (const { value } of series) {
        for (let segment = 0; segment < numSegments; segment += 1) {
          const one = value(segment);
          if (Number.isFinite(one)) high = Math.max(high, 1.06 * one);
        }
      }
    }
    const up = (value) => 8 + (1 - (value - low) / (high - low || 1)) * (this.tall - 8);
    this.drawAxes(context, low, high, up);
    for (const one of series) this.drawLine(context, one, up);
    const now = this.across(views[state.view].segment);
    context.fillStyle = transparent(theme.colours.accent, 0.6);
    context.fillRect(now - 0.75, 4, 1.5, this.tall - 4);
    this.drawKeys(series);
  }

  drawAxes(context, low, high, up) {
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const tick of ticksOf(low, high, 4)) {
      context.fillStyle = theme.colours.line;
      context.fillRect(this.left, Math.round(up(tick)), this.width, 1);
      context.fillStyle = theme.colours.soft;
      context.fillText(formatTick(tick), this.left - 5, up(tick));
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    const ticks = ticksOf(1, numSegments, Math.min(numSegments, this.width / 60)).filter(Number.isInteger);
    for (const tick of ticks.length ? ticks : [1]) context.fillText(formatCount(tick), this.across(tick - 1), this.tall + 5);
    context.textAlign = "left";
    context.fillText("segment", this.left, this.tall + 19);
  }

  drawLine(context, { value, colour, pattern = "solid", width = 1.8 }, up) {
    context.strokeStyle = colour;
    context.fillStyle = colour;
    context.lineWidth = width;
    context.setLineDash(DASHES[pattern]);
    context.beginPath();
    let drawing = false;
    const points = Math.min(numSegments, Math.max(2, Math.floor(this.width)));
    const start = (point) => Math.floor((point * numSegments) / points);
    for (let point = 0; point < points; point += 1) {
      const [first, last] = [start(point), start(point + 1)];
      const one = last - first > 1 ? meanOf(value, first, last) : value(first);
      if (!Number.isFinite(one)) drawing = false;
      else if (drawing) context.lineTo(this.across(first), up(one));
      else {
        context.moveTo(this.across(first), up(one));
        drawing = true;
      }
    }
    context.stroke();
    context.setLineDash([]);
    if (numSegments <= 24) {
      for (let segment = 0; segment < numSegments; segment += 1) {
        if (Number.isFinite(value(segment))) context.fillRect(this.across(segment) - 2, up(value(segment)) - 2, 4, 4);
      }
    }
  }

  drawKeys(series) {
    const signature = JSON.stringify([theme.name, series.map(({ name, colour, pattern }) => [name, colour, pattern])]);
    if (this.signature === signature) return;
    this.signature = signature;
    fill(this.keys, ...series.map(({ name, colour, pattern = "solid" }) => make("span", {}, makeKey(colour, pattern), name)));
  }

  cellAt(x, y) {
    if (y < 0 || y > this.tall + 12) return null;
    const place = numSegments > 1 ? Math.round(((x - this.left) / this.width) * (numSegments - 1)) : 0;
    return place >= 0 && place < numSegments ? [0, place] : null;
  }

  boxOf([, segment]) {
    return [this.across(segment) - 1, 6, 2, this.tall - 6];
  }

  drawCell(context, [left]) {
    context.fillStyle = theme.colours.ink;
    context.fillRect(left, 4, 1.5, this.tall - 4);
  }
}

/** Return the little line of a legend. */
function makeKey(colour, pattern) {
  const canvas = make("canvas", { class: "key", "aria-hidden": "true", width: "52", height: "16" });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.strokeStyle = colour;
  context.lineWidth = 2.5;
  context.setLineDash(DASHES[pattern]);
  context.beginPath();
  context.moveTo(0, 4);
  context.lineTo(26, 4);
  context.stroke();
  return canvas;
}
