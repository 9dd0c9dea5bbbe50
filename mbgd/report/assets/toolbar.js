// The controls of all charts, built once: what is typed into them stays while the page follows a run.

const AXIS_NAMES = { step: "step", epoch: "epoch", examples: "examples", time: "training time" };

const axisChoice = h(
  "select",
  { id: "axis", onchange: (event) => choose({ axis: event.target.value, zoom: null }) },
  ...AXES.map((axis) => h("option", { value: axis }, AXIS_NAMES[axis])),
);
const smoothingText = h("output", { htmlFor: "smoothing" }, "0");
const smoothingChoice = h("input", {
  id: "smoothing",
  type: "range",
  min: "0",
  max: "0.99",
  step: "0.01",
  value: "0",
  oninput: (event) => {
    smoothingText.value = event.target.value;
    choose({ smoothing: Number(event.target.value) });
  },
});
const outliersChoice = h("input", {
  id: "outliers",
  type: "checkbox",
  onchange: (event) => choose({ allValues: event.target.checked }),
});
const chartsFilter = searchField("charts-filter", "find charts", "find charts", (charts) => choose({ charts }));
const zoomReset = h("button", { id: "zoom-reset", onclick: () => choose({ zoom: null }) }, "reset zoom");

const toolbar = h(
  "div",
  { class: "toolbar", role: "toolbar", "aria-label": "charts" },
  h("label", {}, "x axis ", axisChoice),
  h("label", {}, "smoothing ", smoothingChoice, smoothingText),
  h("label", {}, outliersChoice, " outliers"),
  chartsFilter,
  zoomReset,
  h(
    "button",
    {
      id: "csv",
      onclick: () =>
        saveCsv(
          data.pictures.flatMap((picture) => Object.keys(picture.curves)),
          data.title,
        ),
    },
    "curves as CSV",
  ),
);

function drawToolbar() {
  for (const option of axisChoice.options) option.disabled = !data.runs.some((run) => hasAxis(run, option.value));
  zoomReset.disabled = !view.zoom;
}
drawnBy(["zoom"], drawToolbar);
