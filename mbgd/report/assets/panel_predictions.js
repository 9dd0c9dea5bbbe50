// Predictions of a few evaluation examples: images or texts, at a step that the reader chooses.

const predictionSteps = new Map(); // by run and evaluation set: the index of the step that is shown

function percent(probability) {
  return probability === undefined || probability === null ? "" : `${Math.round(100 * probability)} %`;
}

function exampleCard(example, at) {
  const guesses = example.predicted[at] || [];
  const tokens = example.tokens[at] || [];
  if (tokens.length) return h("div", { class: "example text" }, h("code", {}, example.text, ...tokens.map(tokenMark)));
  const right = guesses.length > 0 && guesses[0].label === example.target;
  return h(
    "div",
    { class: `example ${right ? "right" : "wrong"}` },
    example.png ? h("img", { src: example.png, alt: `an example of ${example.target}` }) : null,
    example.text ? h("code", {}, example.text) : null,
    h("span", {}, right ? "✓ " : "✗ ", h("b", {}, example.target)),
    ...guesses.map((guess) =>
      h(
        "div",
        { class: "guess" },
        h("i", { style: { width: `${100 * (guess.probability ?? 0)}%` } }),
        h("span", {}, guess.label),
        h("span", {}, percent(guess.probability)),
      ),
    ),
  );
}

// A true token, the darker the more probable it was to the model; what it would have said instead beside the pointer.
function tokenMark({ target, predicted, probability }) {
  const shade = `color-mix(in srgb, var(--c0) ${Math.round(60 * (probability ?? 0))}%, transparent)`;
  const wrong = target === predicted ? "" : "wrong";
  return h(
    "span",
    {
      class: `token ${wrong}`,
      style: { background: shade },
      title: `${percent(probability)}${wrong && `; most probable: ${predicted}`}`,
    },
    target,
  );
}

function setOf(run, name, { steps, examples }) {
  const key = `${run.name}\n${name}`;
  const at = Math.min(predictionSteps.get(key) ?? steps.length - 1, steps.length - 1);
  const choice = h(
    "select",
    {
      id: `step of ${key}`,
      "aria-label": "step of the predictions",
      onchange: (event) => {
        predictionSteps.set(key, Number(event.target.value));
        changed("panels");
      },
    },
    ...steps.map((step, index) => h("option", { value: index, selected: index === at }, `step ${whole(step)}`)),
  );
  const head = h(
    "div",
    { class: "of-set" },
    data.runs.length > 1 ? swatch(data.runs.indexOf(run), run.name) : null,
    name ? h("b", {}, name) : null,
    choice,
  );
  return h("div", {}, head, h("div", { class: "examples" }, ...examples.map((example) => exampleCard(example, at))));
}

panels.push({
  name: "predictions",
  title: "predictions of evaluation examples",
  draw: (runs) =>
    h(
      "div",
      {},
      ...runs.flatMap((run) => {
        const { sets, problem } = run.extras.predictions;
        return [
          problem ? h("p", { class: "failed" }, problem) : null,
          ...Object.entries(sets).map(([name, one]) => setOf(run, name, one)),
        ].filter(Boolean);
      }),
    ),
});
