// LM2: what is read from and written to the slots of a bank, block by block.

const MEMORY_OVER_TIME = {
  read: "reads",
  written_share: "written share",
  input_gate: "input gate",
  forget_gate: "forget gate",
  change: "change by the update",
};

function makeBankSection() {
  if (!trace.bank.length) return null;
  Object.assign(state, { block: 0, slot: 0, quantity: "read" });
  const bank = () => trace.bank[state.block];
  const numSlots = () => bank().slots.length;
  const slotName = (slot) => `slot ${bank().slots[slot]}`;

  // Numbers that several figures need, once per block.
  const facts = [];
  const factsOf = (block) => (facts[block] ??= bankFacts(trace.bank[block]));
  const fact = () => factsOf(state.block);
  state.slot = fact().mostRead;

  const heat = (id, title, help, name, largest, says) =>
    new HeatMap({
      id,
      title,
      help,
      label: `${title}, pieces of the segment by slots`,
      axis: "slot",
      size: () => [views[state.view].last - views[state.view].first, numSlots()],
      value: (row, slot) => bank()[name].at(views[state.view].first + row, slot),
      range: () => [0, largest() || 1],
      mostRows: longestView,
      rowLabel: (row) => labelled(trace.text.pieces[views[state.view].first + row]),
      columnLabel: (slot) => String(bank().slots[slot]),
      whyEmpty: "no update: the segment is incomplete",
      weight: (row) => strongest(bank()[name], views[state.view].first + row),
      marked: () => state.slot,
      hot: () => (state.column === null ? null : hotRow()),
      describe: (row, slot) => {
        const column = views[state.view].first + row;
        const share = bank()[name].at(column, slot);
        return [titleOf(column), Number.isNaN(share) ? "the segment is incomplete: there was no update" : says(formatShare(share), slot)];
      },
      choose: (row, slot) => change({ slot, column: views[state.view].first + row }),
      start: () => [0, state.slot],
    });
  const hotRow = () => {
    const row = state.column - views[state.view].first;
    return row >= 0 && row < views[state.view].last - views[state.view].first ? row : null;
  };
  const saysRead = (share, slot) => `${share} of its reads fell on ${slotName(slot)}`;
  const saysWrite = (share, slot) => `${share} of what ${slotName(slot)} was written from`;
  const maps = [
    heat("read-before", "Reads before the update", "Which slots each piece reads, from the bank as it stood.", "read", () => fact().largestRead, saysRead),
    heat("read-after", "Reads after the update", "The same pieces ask the bank that their own segment has changed.", "read_after", () => fact().largestRead, saysRead),
    heat("write", "Writes", "Which pieces of the segment each slot was written from.", "write", () => fact().largestWrite, saysWrite),
  ];

  const shown = () => (state.quantity === "read" ? { at: (segment, slot) => fact().segmentReads[segment * numSlots() + slot] } : bank()[state.quantity]);
  const overview = new HeatMap({
    id: "slots-over-time",
    title: "Slots over the whole text",
    help: "Every slot from the first segment to the last; choosing a place goes to its segment and slot.",
    axis: "segment",
    size: () => [numSlots(), timeBins()],
    value: (slot, bin) => overBin(bin, (segment) => shown().at(segment, slot)),
    range: () => [0, fact().largestOf(state.quantity) || 1],
    widest: 90,
    fitted: true,
    mostRows: Math.max(...trace.bank.map((block) => block.slots.length)),
    rowLabel: (slot) => slotName(slot),
    columnLabel: (bin) => formatCount(firstOfBin(bin) + 1),
    weight: (slot) => (slot === state.slot ? 2 : 1 - slot / numSlots()),
    hot: () => state.slot,
    band: () => [binOf(views[state.view].segment), binOf(views[state.view].segment) + 1],
    rowHeight: [3, 12],
    tall: 330,
    describe: (slot, bin) => {
      const [first, last] = [firstOfBin(bin), firstOfBin(bin + 1)];
      const where = last - first > 1 ? `segments ${first + 1}–${last}, mean` : `segment ${first + 1}`;
      return [`${slotName(slot)} · ${where}`, `${MEMORY_OVER_TIME[state.quantity]}: ${format(overBin(bin, (segment) => shown().at(segment, slot)))}`];
    },
    choose: (slot, bin) => change({ slot, view: firstViewOf(firstOfBin(bin)) }),
    start: () => [state.slot, binOf(views[state.view].segment)],
  });

  const gates = new Lines({
    id: "gates",
    title: "Gates over time",
    help: "Means over all slots. Input gate: how much is written; forget gate: how much is kept (1 keeps all); output gate: how much of what is read reaches the model.",
    range: [0, 1],
    series: () => [
      { name: "input gate", value: (segment) => fact().inputMean[segment], colour: theme.colours.gain, pattern: "solid" },
      { name: "forget gate", value: (segment) => fact().forgetMean[segment], colour: theme.colours.loss, pattern: "dashed" },
      { name: "output gate", value: (segment) => fact().outputMean[segment], colour: categoryColour(2), pattern: "dotted" },
    ],
  });
  const use = new Lines({
    id: "use",
    title: "Written content over time",
    help: "The share of the reads that fell on written content, and how much of the bank is written by now.",
    range: [0, 1],
    series: () => [
      { name: "reads on written content", value: (segment) => fact().readOnWritten[segment], colour: theme.colours.gain, pattern: "solid" },
      { name: "written share of the bank", value: (segment) => fact().writtenMean[segment], colour: theme.colours.loss, pattern: "dashed" },
    ],
  });

  const slot = makeSlotPanel(bank, fact, slotName);
  const figuresHere = [...maps, overview, gates, use, ...slot.figures];
  const blocks = makeSwitch(
    "block",
    "Block",
    trace.bank.map((block, index) => [index, String(block.block)]),
    0,
    (block) => change({ block, slot: factsOf(block).mostRead }),
  );
  const quantity = make(
    "label",
    { class: "choice" },
    make("span", {}, "Show"),
    make(
      "select",
      { id: "quantity", onchange: (event) => change({ quantity: event.target.value }) },
      ...Object.entries(MEMORY_OVER_TIME).map(([value, text]) => make("option", { value }, text)),
    ),
  );
  onChange(() => {
    for (const figure of figuresHere) invalidate(figure);
  });
  onChange((changed) => (changed.has("slot") || changed.has("block")) && slot.show());
  slot.show();
  return makeSection(
    "bank",
    "Memory bank",
    "Rows are pieces of the segment, columns are slots; the stronger the colour, the larger the share, on the same scale before and after. Choosing a cell chooses its slot.",
    blocks,
    make("div", { class: "grid three" }, ...maps.map((map) => map.element)),
    make("div", { class: "grid two" }, gates.element, use.element),
    quantity,
    overview.element,
    slot.element,
  );
}

/** Return the largest number in a row of a grid. */
function strongest(grid, row) {
  let most = 0;
  for (let column = 0; column < grid.columns; column += 1) most = Math.max(most, grid.at(row, column));
  return most;
}

function largestIn(grid) {
  let most = 0;
  for (let row = 0; row < grid.rows; row += 1) {
    for (let column = 0; column < grid.columns; column += 1) {
      const value = grid.at(row, column);
      if (value > most && Number.isFinite(value)) most = value;
    }
  }
  return most;
}

/** Return what a block's figures need beside its arrays. */
function bankFacts(block) {
  const numSlots = block.slots.length;
  const segmentReads = new Float32Array(numSegments * numSlots);
  const slotReads = new Float32Array(numSlots);
  for (let segment = 0; segment < numSegments; segment += 1) {
    const [first, last] = [trace.text.segments[segment], trace.text.segments[segment + 1]];
    for (let slot = 0; slot < numSlots; slot += 1) {
      const mean = meanOf((column) => block.read.at(column, slot), first, last);
      segmentReads[segment * numSlots + slot] = mean;
      slotReads[slot] += (mean * (last - first)) / numColumns;
    }
  }
  const overSlots = (grid) => Float32Array.from({ length: numSegments }, (_, segment) => meanOf((slot) => grid.at(segment, slot), 0, numSlots));
  const largest = { read: segmentReads.reduce((most, value) => Math.max(most, value), 0), change: largestIn(block.change) };
  return {
    segmentReads,
    slotReads,
    mostRead: slotReads.indexOf(Math.max(...slotReads)),
    largestRead: Math.max(largestIn(block.read), largestIn(block.read_after)),
    largestWrite: largestIn(block.write),
    largestOf: (quantity) => largest[quantity] ?? 1,
    inputMean: overSlots(block.input_gate),
    forgetMean: overSlots(block.forget_gate),
    writtenMean: overSlots(block.written_share),
    outputMean: segmentMeans((column) => block.output_gate[column]),
    readOnWritten: segmentMeans((column) => block.read_on_written[column]),
  };
}

// A picture of the whole text has at most this many columns; each is the mean of as many segments as needed.
const MOST_TIME_BINS = 400;
const timeBins = () => Math.min(numSegments, MOST_TIME_BINS);
const firstOfBin = (bin) => Math.floor((bin * numSegments) / timeBins());
const binOf = (segment) => Math.min(timeBins() - 1, Math.floor(((segment + 1) * timeBins() - 1) / numSegments));
const overBin = (bin, value) => meanOf(value, firstOfBin(bin), firstOfBin(bin + 1));

/** One slot over the whole text: where it was written from and read, its gates, and the words nearest to it. */
function makeSlotPanel(bank, fact, slotName) {
  const strip = (id, title, name, help) =>
    new Strip({
      id,
      title,
      help,
      value: (column) => bank()[name].at(column, state.slot),
      range: () => [0, highest(bank()[name], state.slot)],
      describe: (column) => [titleOf(column), `${slotName(state.slot)}: ${formatShare(bank()[name].at(column, state.slot))}`],
    });
  const figures = [
    strip("slot-write", "Written from", "write", "Share of the slot's write attention, within each segment."),
    strip("slot-read", "Read by", "read", "Share of the reads that fell on the slot."),
    new Lines({
      id: "slot-gates",
      title: "Its gates and what is in it",
      help: "Input gate: how much is written; forget gate: how much is kept; written share: how much of it is not as at the start.",
      range: [0, 1],
      series: () => [
        { name: "input gate", value: (segment) => bank().input_gate.at(segment, state.slot), colour: theme.colours.gain, pattern: "solid" },
        { name: "forget gate", value: (segment) => bank().forget_gate.at(segment, state.slot), colour: theme.colours.loss, pattern: "dashed" },
        { name: "written share", value: (segment) => bank().written_share.at(segment, state.slot), colour: categoryColour(2), pattern: "dotted" },
      ],
    }),
  ];
  const heading = make("h3", { id: "slot-title" });
  const summary = make("p", { id: "slot-summary", class: "detail" });
  const words = make("div", { id: "slot-words" });
  const choices = make("div", {});
  let offered = null;
  const show = () => {
    const { half_life: halfLife, word_segments: segments, words: near, word_scores: scores } = bank();
    heading.textContent = `Slot ${bank().slots[state.slot]} of block ${bank().block}`;
    fill(
      summary,
      make("span", {}, `half-life ${halfLifeText(halfLife[state.slot])}`),
      make("span", {}, `${formatShare(fact().slotReads[state.slot])} of all reads`),
    );
    const order = Array.from(bank().slots.keys()).sort((one, other) => fact().slotReads[other] - fact().slotReads[one]);
    const label = (slot) => `${bank().slots[slot]} (${formatShare(fact().slotReads[slot])} of the reads)`;
    if (offered !== state.block) {
      offered = state.block;
      fill(choices, makeChoice("slot", "Slot", order.map((slot) => [slot, label(slot)]), state.slot, (slot) => change({ slot })));
    }
    choices.querySelector("select").value = String(state.slot);
    const few = scores.shape[2];
    const rows = Array.from(segments, (segment, index) => [
      segment < 0 ? "before the text" : formatCount(segment + 1),
      near[index][state.slot]
        .map((word, place) => [word, format(scores.values[(index * near[index].length + state.slot) * few + place])]),
    ]).map(([when, list]) => [when, makeWords(list)]);
    fill(words, rows.length ? makeTable("Nearest words through the output embedding, with their logits", ["after segment", "words"], rows, [0]) : null);
  };
  const element = make("div", { class: "panel" }, heading, choices, summary, ...figures.map((figure) => figure.element), words);
  return { element, figures, show };
}

function halfLifeText(segments) {
  if (segments === Infinity) return "without end: it forgets nothing";
  return Number.isNaN(segments) ? "unknown: no segment was complete" : `${format(segments)} segments`;
}

function highest(grid, column) {
  let most = 0;
  for (let row = 0; row < grid.rows; row += 1) {
    const value = grid.at(row, column);
    if (value > most) most = value;
  }
  return most;
}
