// Further panels below the charts. A panel: { name, title, draw(runs) }. `runs` are the runs shown that have data under
// run.extras[name]; draw returns an element, or null. The data come from mbgd/report/extras.py.

const panels = [];
const panelsPlace = h("section", { "aria-label": "panels" });

function drawPanels() {
  keepingFocus(panelsPlace, () =>
    panelsPlace.replaceChildren(
      ...panels.flatMap((panel) => {
        const runs = shownRuns().filter((run) => run.extras[panel.name] !== undefined);
        const drawnPanel = runs.length ? panel.draw(runs) : null;
        return drawnPanel ? [h("h2", {}, panel.title), drawnPanel] : [];
      }),
    ),
  );
}
drawnBy(["hidden", "panels"], drawPanels);
