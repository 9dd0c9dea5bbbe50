// What the reader has chosen. Everything on the page is a function of the data and of this.

const MOST_SHOWN_AT_FIRST = 10;

const view = {
  axis: "step", // step, epoch, examples or time
  smoothing: 0, // 0 to 0.99
  allValues: false, // whether outliers may stretch a chart's y axis
  zoom: null, // [from, to] on the x axis of every chart
  charts: "", // only charts whose title has this text
  hidden: new Set(), // names of runs that are not drawn
  marked: null, // name of the run under the pointer; the others fade
  log: new Map(), // by a chart's title: whether its y axis is logarithmic, where the reader has chosen
  wide: new Set(), // titles of charts that take the whole width
  sort: null, // [column, 1 or -1] of the table of runs
  filter: "", // of the table of runs
  pinned: new Set(), // columns of the table of runs that stay in view
};
data.runs.slice(MOST_SHOWN_AT_FIRST).forEach((run) => view.hidden.add(run.name));

const shownRuns = () => data.runs.filter((run) => !view.hidden.has(run.name));

// What is drawn, and the names of the view that it depends on; everything depends on the data.
const draws = [];
const drawnBy = (names, draw) => draws.push({ names, draw });

// Draws again what depends on these names of the view, once for all changes before the next frame.
const pending = new Set();
function changed(...names) {
  if (!pending.size)
    requestAnimationFrame(() => {
      const waiting = [...pending];
      pending.clear();
      draws
        .filter(({ names }) => waiting.includes("data") || names.some((name) => waiting.includes(name)))
        .forEach(({ draw }) => draw());
    });
  names.forEach((name) => pending.add(name));
}

function choose(change) {
  Object.assign(view, change);
  changed(...Object.keys(change));
}

function toggle(name, value) {
  if (!view[name].delete(value)) view[name].add(value);
  changed(name);
}
