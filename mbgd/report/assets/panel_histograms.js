// Histograms of the parameters and gradients of each layer: one ridge for each step, the last in front.

const RIDGE = { width: 260, height: 34, apart: 12 };

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The share of the values in each bin, from the most negative power of 2 over 0 to the most positive.
function shares(histogram, lowest, highest) {
  const bins = Array(2 * (highest - lowest) + 1).fill(0);
  const middle = highest - lowest;
  const add = (index, count) => {
    bins[index] += count / Math.max(1, histogram.size);
  };
  add(middle, histogram.zero);
  histogram.positive.forEach((count, index) => add(middle + 1 + histogram.low - lowest + index, count));
  histogram.negative.forEach((count, index) => add(middle - 1 - (histogram.low - lowest) - index, count));
  return bins;
}

function ridges(steps, number) {
  const held = steps.filter(({ histogram }) => histogram.positive.length);
  const lowest = Math.min(0, ...held.map(({ histogram }) => histogram.low));
  const highest = Math.max(lowest + 1, ...held.map(({ histogram }) => histogram.low + histogram.positive.length));
  const all = steps.map(({ histogram }) => shares(histogram, lowest, highest));
  const tallest = Math.max(...all.flat(), 1e-9);
  const { width, height, apart } = RIDGE;
  const whole = height + apart * (steps.length - 1) + 18;
  const paths = all.map((bins, index) => {
    const base = height + apart * index;
    const x = (bin) => ((bin / bins.length) * width).toFixed(1);
    const top = bins
      .map((share, bin) => `L${x(bin)},${(base - (share / tallest) * height).toFixed(1)}H${x(bin + 1)}`)
      .join("");
    const path = svg("path", {
      d: `M0,${base}${top}L${width},${base}Z`,
      "fill-opacity": (0.25 + (0.65 * (index + 1)) / all.length).toFixed(2),
    });
    path.style.fill = colourOf(number);
    return svg("g", {}, path, svg("title", {}, `step ${steps[index].step}`));
  });
  const label = (x, anchor, text) => {
    const element = svg("text", { x, y: whole - 4 }, text);
    element.style.textAnchor = anchor;
    return element;
  };
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${whole}`, role: "img", class: "ridges" },
    ...paths,
    label(0, "start", `−${short(2 ** highest)}`),
    label(width / 2, "middle", "0"),
    label(width, "end", short(2 ** highest)),
  );
}

function layersOf(run) {
  const { lines, problem } = run.extras.histograms;
  const names = lines.length ? lines.at(-1).layers.map((layer) => layer.name) : [];
  const of = (name, part) =>
    lines.flatMap(({ step, layers }) => {
      const histogram = layers.find((layer) => layer.name === name)?.[part];
      return histogram ? [{ step, histogram }] : [];
    });
  const cell = (name, part, number) => {
    const steps = of(name, part);
    return h(
      "div",
      {},
      h("span", { class: "hint" }, part),
      steps.length ? ridges(steps, number) : h("p", { class: "hint" }, "none"),
    );
  };
  return h(
    "div",
    {},
    data.runs.length > 1 && swatch(data.runs.indexOf(run), run.name),
    h(
      "p",
      { class: problem ? "failed" : "hint" },
      problem ||
        `After steps ${lines.map(({ step }) => whole(step)).join(", ")}, the last in front; each bin is a power of 2.`,
    ),
    h(
      "div",
      { class: "charts layers" },
      ...names.map((name) =>
        h(
          "figure",
          {},
          h("figcaption", {}, name),
          h("div", { class: "pair" }, cell(name, "parameters", 0), cell(name, "gradients", 1)),
        ),
      ),
    ),
  );
}

panels.push({
  name: "histograms",
  title: "histograms of the layers",
  draw: (runs) => h("div", {}, ...runs.map(layersOf)),
});
