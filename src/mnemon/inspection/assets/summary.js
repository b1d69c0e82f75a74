// The head of the page, the bar with the slider, and the text with what the memory does for its prediction.

/** Return the sentence that says what the memory does for the prediction of the whole text. */
function predictionSummary() {
  if (!trace.predictions) return "No prediction without the memory was recorded.";
  let [withMemory, without, better, tokens] = [0, 0, 0, 0];
  for (let column = 0; column < numColumns; column += 1) {
    const count = trace.text.starts[column + 1] - trace.text.starts[column];
    const gain = gainOf(column);
    if (Number.isNaN(gain)) continue;
    withMemory += trace.predictions.with_memory[column] * count;
    without += trace.predictions.without_memory[column] * count;
    better += gain > 0 ? count : 0;
    tokens += count;
  }
  if (!tokens) return "The text is too short to be predicted.";
  const gain = (withMemory - without) / tokens;
  return (
    `${formatSigned(gain)} nats per token: mean log-probability ${format(withMemory / tokens)} with memory, ` +
    `${format(without / tokens)} without (perplexity ${format(Math.exp(-withMemory / tokens))} against ` +
    `${format(Math.exp(-without / tokens))}); better on ${formatShare(better / tokens)} of the text`
  );
}

const FAMILIES = { lm2: "LM2: gated memory slots", mom: "MoM: linear memories", rmt: "RMT: memory tokens" };

function makeHeader() {
  const { source, text, notes } = trace;
  const kinds = { text: "file", babilong: "BABILong sample", memory: "memory file" };
  const tokens = `${formatCount(numTokens)} tokens in ${formatCount(numSegments)} segment${numSegments === 1 ? "" : "s"}`;
  const columns = numColumns < numTokens ? `, shown in ${formatCount(numColumns)} pieces` : "";
  // Linear memories are updated by every token; a segment then is but a stretch of the recording.
  const bySegment = trace.bank.length > 0 || trace.token_memory !== null;
  const incomplete = text.complete || !bySegment ? "" : "; the last segment is incomplete";
  const facts = [
    ["Model", `${trace.model} (${FAMILIES[trace.family] ?? trace.family}), fingerprint ${trace.fingerprint.slice(0, 12)}`],
    ["Read", `${source.name} (${kinds[source.kind] ?? source.kind}): ${tokens}${columns}${incomplete}`],
    source.question !== null && ["Question", source.question],
    source.answer !== null && ["Answer", source.answer],
    ["Gain", predictionSummary()],
  ];
  const all = rounding === null ? notes : [...notes, `shares are rounded to ${formatShare(rounding)} of the largest`];
  fill(
    document.getElementById("header"),
    make("div", { class: "brand" }, make("span", {}, "mnemon inspect"), makeThemeButton()),
    make("h1", {}, source.name, " ", make("small", {}, `read by ${trace.model}`)),
    make("dl", {}, ...facts.filter(Boolean).flatMap(([name, fact]) => [make("dt", {}, name), make("dd", {}, fact)])),
    all.length ? make("ul", { class: "notes", "aria-label": "Notes" }, ...all.map((note) => make("li", {}, note))) : null,
  );
}

const PLAY_STEP_MS = 700;

/** The bar that stays in sight: links, the slider over segments, and steps by button. */
function makeBarOfPlace(sections) {
  const slider = make("input", {
    type: "range",
    id: "slider",
    min: "0",
    max: String(views.length - 1),
    value: "0",
    "aria-label": "Segment",
    oninput: () => change({ view: Number(slider.value) }),
  });
  const place = make("output", { id: "place", for: "slider" });
  let timer = null;
  const step = (by) => change({ view: Math.max(0, Math.min(views.length - 1, state.view + by)) });
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  };
  const start = () => {
    if (state.view === views.length - 1) change({ view: 0 });
    timer = setInterval(() => (state.view < views.length - 1 ? step(1) : stop()), PLAY_STEP_MS);
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
  };
  const button = (id, text, label, act) => make("button", { type: "button", id, class: "plain", "aria-label": label, onclick: act }, text);
  const play = button("play", "▶", "Play", () => (timer === null ? start() : stop()));
  const back = button("back", "‹", "Segment before", () => step(-1));
  const next = button("next", "›", "Next segment", () => step(1));
  fill(
    document.getElementById("bar"),
    make("nav", { "aria-label": "Parts of the page" }, ...sections.map(({ id, firstChild }) => make("a", { href: `#${id}` }, firstChild.textContent))),
    make("div", { class: "place" }, back, play, next, slider, place),
  );
  const show = () => {
    const { segment, first, last, part, parts } = views[state.view];
    const [from, to] = [trace.text.starts[first], trace.text.starts[last] - 1];
    slider.value = String(state.view);
    place.textContent =
      `segment ${formatCount(segment + 1)} of ${formatCount(numSegments)}` +
      `${parts > 1 ? `, part ${part + 1} of ${parts}` : ""} · tokens ${formatCount(from)}–${formatCount(to)}`;
    slider.setAttribute("aria-valuetext", place.textContent);
    back.disabled = state.view === 0;
    next.disabled = state.view === views.length - 1;
  };
  onChange((changed) => changed.has("view") && show());
  show();
}

/** Return the largest gain that is not among the rarest hundredth, so that one odd word does not pale all others. */
function usualGain() {
  const sizes = [];
  for (let column = 0; column < numColumns; column += 1) {
    const size = Math.abs(gainOf(column));
    if (!Number.isNaN(size)) sizes.push(size);
  }
  sizes.sort((one, other) => one - other);
  return sizes[Math.floor(0.99 * (sizes.length - 1))] || 1;
}

/** The text, coloured by what the memory does for its prediction. */
function makeTextSection() {
  const describe = (column) => [titleOf(column), ...predictionLines(column)];
  const largest = trace.predictions ? usualGain() : 1;
  const view = new TextView({
    id: "text-view",
    label: "Text of the segment",
    describe,
    paint: (entry, column) => trace.predictions && paintSigned(entry, gainOf(column), largest),
  });
  const lead = trace.predictions
    ? "How much better each piece is predicted with the memory than without it, in nats of log-probability: blue with a line below where the memory helps, orange with dots where it misleads."
    : "No prediction without the memory was recorded.";
  const strip =
    trace.predictions &&
    new Strip({
      id: "gain-strip",
      title: "Gain over the whole text",
      help: "Bars up: the memory helps; bars down: it misleads. The band is the segment below. Choosing a place goes there.",
      describe,
      value: gainOf,
      range: () => [-largest, largest],
      colour: (_, value) => (value > 0 ? theme.colours.gain : theme.colours.loss),
    });
  const detail = make("p", { id: "piece", class: "detail" });
  const showDetail = () => {
    fill(detail, ...(state.column === null ? ["Point at a piece, or choose one, to see its numbers."] : describe(state.column).map((line) => make("span", {}, line))));
  };
  onChange(() => {
    if (strip) invalidate(strip);
    showDetail();
  });
  view.draw();
  showDetail();
  onTheme(() => view.repaint());
  return makeSection("text", "Text", lead, strip?.element, view.element, detail);
}
