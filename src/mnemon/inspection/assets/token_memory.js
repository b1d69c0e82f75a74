// RMT and its associative memories: norms and changes of what is handed from segment to segment, and its reads.

/** Return the smallest and the largest number of a grid. */
function rangeOf(grid) {
  const values = grid.values.filter(Number.isFinite);
  return [values.reduce((least, value) => Math.min(least, value), Infinity), values.reduce((most, value) => Math.max(most, value), -Infinity)];
}

function makeTokenMemorySection() {
  const memory = trace.token_memory;
  if (!memory) return null;
  state.unit = 0;
  const numUnits = memory.units.length;
  const short = (unit) => memory.units[unit].replace(/^memory (token|of block) /, "");
  const overTime = (id, title, help, grid) => {
    const range = rangeOf(grid);
    return new HeatMap({
      id,
      title,
      help,
      axis: "segment",
      size: () => [numUnits, timeBins()],
      value: (unit, bin) => overBin(bin, (segment) => grid.at(segment, unit)),
      range: () => range,
      power: 1,
      widest: 60,
      fitted: true,
      mostRows: numUnits,
      rowLabel: (unit) => memory.units[unit],
      columnLabel: (bin) => formatCount(firstOfBin(bin) + 1),
      weight: (unit) => (unit === state.unit ? 2 : 1 - unit / numUnits),
      hot: () => state.unit,
      band: () => [binOf(views[state.view].segment), binOf(views[state.view].segment) + 1],
      tall: 320,
      describe: (unit, bin) => {
        const [first, last] = [firstOfBin(bin), firstOfBin(bin + 1)];
        const where = last - first > 1 ? `segments ${first + 1}–${last}, mean` : `segment ${first + 1}`;
        return [`${memory.units[unit]} · ${where}`, `${title.toLowerCase()}: ${format(overBin(bin, (segment) => grid.at(segment, unit)))}`];
      },
      choose: (unit, bin) => change({ unit, view: firstViewOf(firstOfBin(bin)) }),
      start: () => [state.unit, binOf(views[state.view].segment)],
    });
  };
  const mean = (grid) => Float32Array.from({ length: numSegments }, (_, segment) => meanOf((unit) => grid.at(segment, unit), 0, numUnits));
  const means = { norm: mean(memory.norm), change: mean(memory.change) };
  const lines = (id, title, help, name) =>
    new Lines({
      id,
      title,
      help,
      series: () => [
        { name: "mean of all", value: (segment) => means[name][segment], colour: theme.colours.gain, pattern: "solid" },
        { name: memory.units[state.unit], value: (segment) => memory[name].at(segment, state.unit), colour: theme.colours.loss, pattern: "dashed" },
      ],
    });
  const figuresHere = [
    lines("norm", "Norm over time", "How large what is handed on is after every segment.", "norm"),
    lines("unit-change", "Change over time", "Norm of what the segment changed over the norm after it: 0 keeps everything.", "change"),
    overTime("norms", "Norm", "Every entry of the memory, segment by segment.", memory.norm),
    overTime("changes", "Change", "The same for what each segment changed.", memory.change),
  ];
  let reads = null;
  if (memory.read.columns) {
    const largest = largestIn(memory.read);
    reads = new HeatMap({
      id: "token-reads",
      title: "Reads",
      help: "Rows are pieces of the segment, columns memory tokens: the share of each piece's attention that fell on them.",
      axis: "memory token",
      size: () => [views[state.view].last - views[state.view].first, numUnits],
      value: (row, unit) => memory.read.at(views[state.view].first + row, unit),
      range: () => [0, largest || 1],
      mostRows: longestView,
      rowLabel: (row) => labelled(trace.text.pieces[views[state.view].first + row]),
      columnLabel: short,
      weight: (row) => strongest(memory.read, views[state.view].first + row),
      marked: () => state.unit,
      describe: (row, unit) => {
        const column = views[state.view].first + row;
        return [titleOf(column), `${memory.units[unit]}: ${formatShare(memory.read.at(column, unit))} of its attention`];
      },
      choose: (row, unit) => change({ unit, column: views[state.view].first + row }),
      start: () => [0, state.unit],
    });
    figuresHere.push(reads);
  }
  const choice = makeChoice("unit", "Entry", memory.units.map((name, unit) => [unit, name]), 0, (unit) => change({ unit }));
  onChange((changed) => {
    if (changed.has("unit")) choice.querySelector("select").value = String(state.unit);
    for (const figure of figuresHere) invalidate(figure);
  });
  return makeSection(
    "token-memory",
    "Memory handed on",
    "What one segment hands to the next: how large it is and how much each segment changes it.",
    choice,
    make("div", { class: "grid two" }, ...figuresHere.slice(0, 4).map((figure) => figure.element)),
    reads?.element,
  );
}
