// All charts: which lines each has, under a heading for each group.

const charts = new Map(); // by title
const chartsPlace = h("section", { "aria-label": "curves" });
const TIME_UNITS = [
  { name: "h", seconds: 3600 },
  { name: "min", seconds: 60 },
  { name: "s", seconds: 1 },
];

// The unit of the x axis where it is time.
function timeUnit() {
  const longest = Math.max(0, ...data.runs.map((run) => (run.axes.time ? run.axes.time[1].at(-1) : 0)));
  return TIME_UNITS.find((unit) => longest >= 2 * unit.seconds) || TIME_UNITS[2];
}

// Of one run, training and evaluation have colours; of several, each run has, and evaluation is dashed.
function linesOf(picture, range) {
  const isOne = data.runs.length === 1;
  const lines = [];
  const divisor = view.axis === "time" ? timeUnit().seconds : 1;
  const labels = Object.values(picture.curves);
  for (const run of shownRuns()) {
    const number = data.runs.indexOf(run);
    Object.entries(picture.curves).forEach(([name, label], index) => {
      const points = pointsOf(run, name, view.axis);
      if (!points) return;
      const line = {
        run: run.name,
        number: isOne ? colourOfLabel(label, index) : number,
        label: isOne ? label : labels.length > 1 ? `${run.name} ${label}` : run.name,
        dashed: !isOne && label !== labels[0],
      };
      const add = ([xs, ys], more) =>
        lines.push({ ...line, ...more, xs: divisor === 1 ? xs : xs.map((x) => x / divisor), ys });
      if (view.smoothing > 0) {
        add(points, { faint: true });
        add(
          smoothed(
            run,
            name,
            view.axis,
            view.smoothing,
            range.map((x) => x * divisor),
          ),
          {},
        );
      } else add(points, {});
    });
    if (picture.shows_minibatch && run.minibatch && lines.some((line) => line.run === run.name)) {
      lines.push({
        run: run.name,
        number: isOne ? 1 : number,
        label: isOne ? "minibatch in use" : `${run.name} minibatch in use`,
        dashed: true,
        isConstant: true,
        xs: range,
        ys: [run.minibatch, run.minibatch],
      });
    }
  }
  return lines;
}

const colourOfLabel = (label, index) => (label === "train" ? 0 : label === "eval" ? 1 : index);

// From the first to the last point of all runs that are shown, on the chosen axis.
function wholeRange() {
  const divisor = view.axis === "time" ? timeUnit().seconds : 1;
  let low = Infinity;
  let high = -Infinity;
  for (const run of shownRuns().filter((run) => hasAxis(run, view.axis))) {
    for (const { x } of Object.values(run.curves)) {
      low = Math.min(low, onAxis(run, view.axis, x[0]) / divisor);
      high = Math.max(high, onAxis(run, view.axis, x.at(-1)) / divisor);
    }
  }
  return low < high ? [low, high] : Number.isFinite(low) ? [low, low + 1] : [0, 1];
}

function drawCharts() {
  const wanted = view.charts.toLowerCase();
  const range = wholeRange();
  const pictures = data.pictures.filter((picture) => picture.title.toLowerCase().includes(wanted));
  placeCharts(pictures);
  for (const picture of pictures) chartOf(picture).element.classList.toggle("wide", view.wide.has(picture.title));
  for (const picture of pictures) {
    chartOf(picture).draw(picture, linesOf(picture, range), range);
    chartOf(picture).say.textContent = picture.shows_minibatch ? suggestion() : "";
  }
}

// Moves charts only where others are wanted: what is in view stays there while a run is followed.
function placeCharts(pictures) {
  const order = pictures.map((picture) => picture.title).join("\n");
  if (chartsPlace.dataset.order === order && chartsPlace.childElementCount) return;
  chartsPlace.dataset.order = order;
  const sections = [...Map.groupBy(pictures, (picture) => picture.group)].map(([group, members]) =>
    h(
      "div",
      {},
      h("h2", {}, group),
      h("div", { class: "charts" }, ...members.map((picture) => chartOf(picture).element)),
    ),
  );
  const nothing = data.pictures.length ? "No chart has this in its title." : "Nothing has been logged yet.";
  chartsPlace.replaceChildren(...(sections.length ? sections : [h("p", {}, nothing)]));
}

function chartOf(picture) {
  if (!charts.has(picture.title)) charts.set(picture.title, new Chart(picture.title));
  return charts.get(picture.title);
}

// The noise scale is the minibatch beyond which more examples gain little.
function suggestion() {
  const [run, more] = shownRuns();
  const scale = run && !more && run.curves["train/noise_scale"];
  if (!scale || !run.minibatch) return "";
  return `Suggested minibatch: about ${short(Math.round(scale.y.at(-1)))} examples; in use: ${whole(run.minibatch)}.`;
}
drawnBy(["axis", "smoothing", "allValues", "zoom", "charts", "hidden", "log", "wide", "size", "theme"], drawCharts);
drawnBy(["marked"], () => charts.forEach((chart) => chart.element.isConnected && chart.fade()));
