// Where the time of a step goes; plan, environment and configuration: what differs, and what all share.

function timeBars() {
  const runs = data.runs.length === 1 ? data.runs : shownRuns();
  const totals = runs.map((run) => Object.values(run.time).reduce((a, b) => a + b, 0));
  const longest = Math.max(0, ...totals);
  if (!longest) return null;
  const parts = [...new Set(runs.flatMap((run) => Object.keys(run.time)))];
  const bars = runs.map(
    (run, index) =>
      totals[index] > 0 &&
      h(
        "div",
        { class: "of-time" },
        data.runs.length > 1 &&
          h("b", {}, run.name, " ", h("span", { class: "hint" }, short(totals[index], "seconds"))),
        h(
          "div",
          { class: "bar", style: { width: `${(100 * totals[index]) / longest}%` } },
          ...Object.entries(run.time).map(([part, seconds]) =>
            h("i", {
              style: { width: `${(100 * seconds) / totals[index]}%`, background: colourOf(parts.indexOf(part)) },
            }),
          ),
        ),
        h(
          "div",
          { class: "legends" },
          ...Object.entries(run.time).map(([part, seconds]) =>
            swatch(
              parts.indexOf(part),
              `${part} ${short(seconds, "seconds")} (${Math.round((100 * seconds) / totals[index])} %)`,
            ),
          ),
        ),
      ),
  );
  const scale =
    data.runs.length > 1 ? h("span", { class: "hint" }, " mean of all logged steps, all bars to one scale") : null;
  return h("div", {}, h("h2", {}, "Where the time of a step goes", scale), h("div", { class: "card" }, ...bars));
}

function keyTable(values) {
  return h(
    "div",
    { class: Object.keys(values).length > 20 ? "columns" : "" },
    h(
      "table",
      {},
      ...Object.entries(values).map(([key, text]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, text))),
    ),
  );
}

function differingTable(differing) {
  const head = h(
    "thead",
    {},
    h("tr", {}, h("th", {}), ...data.runs.map((run, number) => h("th", { scope: "col" }, swatch(number, run.name)))),
  );
  const rows = Object.entries(differing).map(([key, texts]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, key),
      ...texts.map((text, number) =>
        h("td", {}, h("span", { class: "of" }, swatch(number, data.runs[number].name)), h("span", {}, text ?? "–")),
      ),
    ),
  );
  return h("table", { class: "differing" }, head, h("tbody", {}, ...rows));
}

function keyTables() {
  const isOne = data.runs.length === 1;
  return data.tables
    .filter((table) => Object.keys(table.shared).length + Object.keys(table.differing).length)
    .map((table) => {
      if (isOne) return h("div", {}, h("h2", {}, table.title), h("div", { class: "card" }, keyTable(table.shared)));
      const differs = Object.keys(table.differing).length > 0;
      const shares = Object.keys(table.shared).length;
      return h(
        "div",
        {},
        h("h2", {}, differs ? `${table.title}: what differs` : `${table.title}: the same in all`),
        h(
          "div",
          { class: "card scrolled" },
          differs && differingTable(table.differing),
          shares > 0 && h("details", {}, h("summary", {}, `what all share (${shares})`), keyTable(table.shared)),
        ),
      );
    });
}
