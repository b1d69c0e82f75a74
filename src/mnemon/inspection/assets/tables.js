// The causal check and the explanations.

function makeKnockOutSection() {
  const check = trace.knock_outs;
  if (!check) return makeSection("knock-outs", "Causal check", "Nothing was asked that parts of the memory could be knocked out for.");
  const whole = number(check.log_probability);
  const parts = check.parts
    .map((part) => ({ ...part, after: number(part.log_probability), loss: whole - number(part.log_probability) }))
    .sort((one, other) => other.loss - one.loss);
  const losses = parts.map((part) => part.loss).filter(Number.isFinite);
  const span = [Math.min(...losses), Math.max(...losses)];
  const rows = parts.map((part) => [
    part.name,
    `${formatShare(Math.exp(whole))} → ${formatShare(Math.exp(part.after))}`,
    format(part.loss),
    makeBar(part.loss, span),
  ]);
  return makeSection(
    "knock-outs",
    "Causal check",
    `What ${quote(check.target)} loses when a part of the memory is knocked out. Probabilities are per token (the geometric mean); the loss is that of the mean log-probability, in nats, and a bar to the left is a part without which the words are likelier.`,
    parts.length ? makeTable(`With the whole memory: ${formatShare(Math.exp(whole))}`, ["without", "probability", "loss", ""], rows, [1, 2]) : make("p", {}, "No part was knocked out."),
  );
}

function makeExplanationSection() {
  if (!trace.explanations.length) {
    return makeSection("explanations", "Explanations", "No unit was explained; mnemon inspect --explain N asks an explainer about N of them.");
  }
  return makeSection(
    "explanations",
    "Explanations",
    "What a unit is about, as an explainer put it, and how well that predicts the unit on text the explanation was not made from: the score is the correlation of predicted and true activations, 1 at best and about 0 for a guess.",
    ...trace.explanations.map(makeExplanation),
  );
}

function makeExplanation(explanation) {
  const score = number(explanation.score);
  const scored = score === null || Number.isNaN(score) ? "undefined" : format(score);
  return make(
    "article",
    { class: "explanation" },
    make("h3", {}, explanation.unit),
    make("p", { class: "says" }, explanation.text === null ? "no explanation" : explanation.text),
    make(
      "p",
      { class: "detail" },
      make("span", {}, "score ", make("b", {}, scored), ` on ${formatCount(explanation.num_tokens)} held-out tokens`),
      explanation.baseline == null ? null : make("span", {}, `the same words score ${format(number(explanation.baseline))} on other units`),
      make("span", {}, `explained by ${explanation.explainer}`),
      explanation.note === null ? null : make("span", { class: "warning" }, explanation.note),
    ),
    ...explanation.excerpts.map((excerpt) => makeExcerpt(excerpt, explanation)),
  );
}

/** Tokens shaded by activation, relative to the strongest of the unit. */
function makeExcerpt(excerpt, { excerpts }) {
  const most = Math.max(...excerpts.map(({ activations }) => activations.reduce((top, value) => Math.max(top, value), 0)), 1e-12);
  const tokens = excerpt.tokens.map((token, index) =>
    make("span", { title: `activation ${format(excerpt.activations[index])}` }, visible(token)),
  );
  const paint = () => tokens.forEach((token, index) => paintShare(token, excerpt.activations[index] / most));
  onTheme(paint);
  paint();
  return make("p", { class: "excerpt" }, ...tokens);
}
