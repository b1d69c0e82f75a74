// MoM: which memory each token went to, how full the memories are, and where an answer came from.

const MOST_SOURCES = 12;

function makeMixtureSection() {
  if (!trace.mixture.length) return null;
  Object.assign(state, { layer: 0, contribution: 0 });
  const layer = () => trace.mixture[state.layer];
  const layers = makeSwitch(
    "layer",
    "Layer",
    trace.mixture.map((one, index) => [index, String(one.layer)]),
    0,
    (index) => change({ layer: index, contribution: 0 }),
  );
  const about = make("p", { class: "detail", id: "layer-summary" });
  const parts = [makeRouting(layer), makeStates(layer), makeContributions(layer)];
  const show = () => {
    const { rule, shared, weights } = layer();
    const routed = weights.columns;
    fill(
      about,
      make("span", {}, `update rule ${rule}`),
      make("span", {}, routed > 1 ? `${routed} routed memories` : "one memory, no router"),
      shared ? make("span", {}, "and one that all tokens share") : null,
    );
    for (const part of parts) part.show();
  };
  onChange((changed) => {
    if (changed.has("layer")) show();
    for (const part of parts) {
      for (const figure of part.figures) invalidate(figure);
    }
  });
  onTheme(show);
  show();
  return makeSection(
    "mixture",
    "Linear memories",
    "A router sends every token to a few memories; colours and lines below the text tell the memory that got the most weight.",
    layers,
    about,
    ...parts.map((part) => part.element),
  );
}

/** Return the routed memory with the most weight at a column. */
function topMemory(weights, column) {
  let best = 0;
  for (let memory = 1; memory < weights.columns; memory += 1) {
    if (weights.at(column, memory) > weights.at(column, best)) best = memory;
  }
  return best;
}

function memoryName({ shared, weights, state_norm: norms }, memory) {
  return shared && memory === norms.columns - 1 && memory >= weights.columns ? "shared memory" : `memory ${memory}`;
}

function styleMemory(element, memory) {
  const colour = categoryColour(memory);
  element.style.textDecorationLine = "underline";
  element.style.textDecorationStyle = categoryPattern(memory);
  element.style.textDecorationColor = colour;
  element.style.textDecorationThickness = "2px";
  element.style.textUnderlineOffset = "3px";
  element.style.backgroundColor = transparent(colour, 0.22);
}

/** Text by memory, load, weights over time, entropy, and special words. */
function makeRouting(layer) {
  const describe = (column) => {
    const { weights, entropy } = layer();
    const order = Array.from({ length: weights.columns }, (_, memory) => memory)
      .filter((memory) => weights.at(column, memory) > 0)
      .sort((one, other) => weights.at(column, other) - weights.at(column, one))
      .slice(0, 6);
    const shares = order.map((memory) => `memory ${memory}: ${formatShare(weights.at(column, memory))}`);
    return [titleOf(column), shares.join(", "), `entropy of the router ${format(entropy[column])}`];
  };
  const view = new TextView({
    id: "memory-text",
    label: "Text coloured by memory",
    describe,
    paint: (entry, column) => {
      const memory = topMemory(layer().weights, column);
      styleMemory(entry, memory);
      entry.dataset.memory = memory;
    },
  });
  const strip = new Strip({
    id: "memory-strip",
    title: "Memory with the most weight, over the whole text",
    help: "The colour is the memory, the height its weight. Choosing a place goes there.",
    describe,
    value: (column) => layer().weights.at(column, topMemory(layer().weights, column)),
    range: () => [0, 1],
    colour: (column) => categoryColour(topMemory(layer().weights, column)),
    tall: 48,
  });
  const perMemory = (count, value) =>
    Array.from({ length: count }, (_, memory) => ({
      name: memoryName(layer(), memory),
      value: value(memory),
      colour: categoryColour(memory),
      pattern: categoryPattern(memory),
    }));
  const means = new Map();
  const weightMeans = (memory) => {
    const key = `${state.layer}/${memory}`;
    if (!means.has(key)) means.set(key, segmentMeans((column) => layer().weights.at(column, memory)));
    return means.get(key);
  };
  const weights = new Lines({
    id: "weights",
    title: "Weight over time",
    help: "Mean router weight of every memory in each segment.",
    range: [0, 1],
    series: () => perMemory(layer().weights.columns, (memory) => (segment) => weightMeans(memory)[segment]),
  });
  const entropy = new Lines({
    id: "entropy",
    title: "Entropy of the router",
    help: "In nats: 0 is certain, the dashed line is a router that prefers none.",
    series: () => {
      const key = `${state.layer}/entropy`;
      if (!means.has(key)) means.set(key, segmentMeans((column) => layer().entropy[column]));
      const even = Math.log(layer().weights.columns);
      return [
        { name: "entropy", value: (segment) => means.get(key)[segment], colour: theme.colours.gain, pattern: "solid" },
        { name: "no preference", value: () => even, colour: theme.colours.soft, pattern: "dashed", width: 1.2 },
      ];
    },
  });
  const numbers = make("input", { type: "checkbox", id: "numbers", onchange: () => view.element.classList.toggle("numbered", numbers.checked) });
  const load = make("div", {});
  const words = make("div", { id: "special-words" });
  const element = make(
    "div",
    {},
    strip.element,
    load,
    make("label", { class: "choice" }, numbers, make("span", {}, "write the memory's number behind each piece")),
    view.element,
    make("div", { class: "grid two" }, weights.element, entropy.element),
    words,
  );
  const show = () => {
    const { load: shares, weights: table, special_words: special } = layer();
    element.hidden = table.columns < 2;
    if (element.hidden) return;
    view.draw();
    const keys = Array.from(shares, (share, memory) => {
      const name = make("b", {}, `memory ${memory}`);
      styleMemory(name, memory);
      return [name, formatShare(share), makeBar(share, [0, Math.max(...shares)])];
    });
    fill(load, makeTable(`Load: share of the choices; even would be ${formatShare(1 / shares.length)}`, ["memory", "share", ""], keys, [1]));
    const rows = special.map((list, memory) => {
      const name = make("b", {}, `memory ${memory}`);
      styleMemory(name, memory);
      return [name, makeWords(list.map((word) => [word.word, `×${format(number(word.lift))} (${formatCount(word.count)})`]))];
    });
    fill(words, rows.length ? makeTable("Special words: how much more often than others they go there, and how often they did", ["memory", "words"], rows) : null);
  };
  return { element, figures: [strip, weights, entropy], show };
}

/** Norms of the states over time. */
function makeStates(layer) {
  const norms = new Lines({
    id: "state-norm",
    title: "Norm of the states",
    help: "How much every memory holds after each segment.",
    series: () =>
      Array.from({ length: layer().state_norm.columns }, (_, memory) => ({
        name: memoryName(layer(), memory),
        value: (segment) => layer().state_norm.at(segment, memory),
        colour: categoryColour(memory),
        pattern: categoryPattern(memory),
      })),
  });
  return { element: norms.element, figures: [norms], show: () => {} };
}

/** Where the answer of a memory to one token came from. */
function makeContributions(layer) {
  const chosen = () => layer().contributions[state.contribution];
  const columnOfToken = (token) => {
    let column = 0;
    while (column < numColumns - 1 && trace.text.starts[column + 1] <= token) column += 1;
    return column;
  };
  const largest = () => chosen().shares.reduce((most, share) => Math.max(most, Math.abs(share)), 0) || 1;
  const describe = (column) => [titleOf(column), `contributed ${formatShare(chosen().shares[column])} of the answer`];
  const strip = new Strip({
    id: "contribution-strip",
    title: "Contributions over the whole text",
    help: "Parts of the answer along the answer: above the line towards it, below against it.",
    describe,
    value: (column) => (chosen() ? chosen().shares[column] : 0),
    range: () => (chosen() && chosen().shares.some((share) => share < 0) ? [-largest(), largest()] : [0, chosen() ? largest() : 1]),
    colour: (_, value) => (value > 0 ? theme.colours.gain : theme.colours.loss),
  });
  const view = new TextView({
    id: "contribution-text",
    label: "Text by its contribution to the reader",
    describe,
    paint: (entry, column) => chosen() && paintSigned(entry, chosen().shares[column], largest()),
  });
  const choices = make("div", {});
  const top = make("div", { id: "contributors" });
  const element = make(
    "div",
    { class: "panel" },
    make("h3", {}, "Where an answer came from"),
    make("p", { class: "lead" }, "A linear memory's answer is a sum over everything written before: how much of it each piece of the text contributed to what one token read."),
    choices,
    strip.element,
    view.element,
    top,
  );
  let offered = null;
  const show = () => {
    const { contributions } = layer();
    element.hidden = !contributions.length;
    if (element.hidden) return;
    if (offered !== state.layer) {
      offered = state.layer;
      const entries = contributions.map(({ reader, memory }, index) => {
        const piece = quote(trace.text.pieces[columnOfToken(reader)], 30);
        return [index, `token ${formatCount(reader)} ${piece} from ${memoryName(layer(), memory)}`];
      });
      fill(choices, makeChoice("contribution", "Reader", entries, state.contribution, (contribution) => change({ contribution })));
    }
    view.draw();
    const { shares, before, reader } = chosen();
    const order = Array.from(shares.keys())
      .filter((column) => shares[column] !== 0)
      .sort((one, other) => Math.abs(shares[other]) - Math.abs(shares[one]))
      .slice(0, MOST_SOURCES);
    const span = [Math.min(...order.map((column) => shares[column])), Math.max(...order.map((column) => shares[column]))];
    const rows = order.map((column) => [
      make("button", { type: "button", class: "link", onclick: () => goTo(column) }, quote(trace.text.pieces[column], 40)),
      tokensOf(column),
      formatShare(shares[column]),
      makeBar(shares[column], span),
    ]);
    rows.push(["before the text", "–", formatShare(number(before)), ""]);
    fill(top, makeTable(`Largest contributions to what token ${formatCount(reader)} read`, ["piece", "where", "share", ""], rows, [2]));
  };
  onChange((changed) => changed.has("contribution") && !changed.has("layer") && show());
  return { element, figures: [strip], show };
}
