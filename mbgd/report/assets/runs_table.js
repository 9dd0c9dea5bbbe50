// The table of runs: which are drawn, sorted by any column, filtered, with columns pinned at the left.

const runsPlace = h("section", { "aria-label": "runs" });
const runsFilter = searchField("runs-filter", "filter: words, or lr>0.01", "filter runs", (filter) => choose({ filter }));
const sortChoice = h("select", {
  id: "runs-sort",
  "aria-label": "sort runs by",
  onchange: (event) => sortBy(event.target.value),
});
const numShown = h("span", { class: "hint" });
const runsHead = h("thead");
const runsBody = h("tbody");
const everyRun = h("input", {
  type: "checkbox",
  "aria-label": "draw all runs of this table",
  onchange: (event) => {
    for (const run of wantedRuns()) view.hidden[event.target.checked ? "delete" : "add"](run.name);
    changed("hidden");
  },
});

// Columns: { name, unit, value(run): number or text, best(run): text beside it, isOfConfiguration }.
function columnsOf() {
  const names = (of) => [...new Set(data.runs.flatMap((run) => of(run).map((one) => one.name ?? one[0])))];
  const result = (run, name) => run.results.find((one) => one.name === name);
  const fact = (run, name) => run.facts.find((one) => one[0] === name);
  const { differing } = data.tables.find((table) => table.title === "Configuration");
  return [
    { name: "run", value: (run) => run.name },
    { name: "state", value: (run) => run.state },
    ...names((run) => run.results).map((name) => ({
      name,
      value: (run) => result(run, name)?.last ?? null,
      best: (run) => {
        const one = result(run, name);
        return one && one.best !== null ? `best ${short(one.best)}` : "";
      },
    })),
    ...Object.keys(differing).map((key) => ({
      name: key,
      isOfConfiguration: true,
      value: (run) => asNumber(differing[key][data.runs.indexOf(run)]),
    })),
    ...names((run) => run.facts).map((name) => ({
      name,
      unit: data.runs.map((run) => fact(run, name)).find(Boolean)[2],
      value: (run) => fact(run, name)?.[1] ?? null,
    })),
    { name: "started", value: (run) => run.started.slice(0, 16) },
  ];
}

const asNumber = (text) => (text !== null && text !== "" && Number.isFinite(Number(text)) ? Number(text) : text);
const textOf = (column, run) => {
  const value = column.value(run);
  return typeof value === "number" ? short(value, column.unit) : (value ?? "");
};

// Words that must all be in a row; a word such as lr>0.01 compares a column whose name ends so.
function matches(run, columns, words) {
  return words.every((word) => {
    const [, name, sign, limit] = /^([^<>=]+)(<=|>=|<|>|=)(.+)$/.exec(word) || [];
    const column = sign && columns.find((one) => one.name.toLowerCase().endsWith(name));
    if (!column) return columns.some((one) => textOf(one, run).toLowerCase().includes(word));
    const value = column.value(run);
    const other = Number(limit);
    if (sign === "=" || typeof value !== "number") return sign === "=" && String(value).toLowerCase() === limit;
    return { "<": value < other, "<=": value <= other, ">": value > other, ">=": value >= other }[sign];
  });
}

function wantedRuns() {
  const columns = columnsOf();
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const runs = data.runs.filter((run) => matches(run, columns, words));
  const column = view.sort && columns.find((one) => one.name === view.sort[0]);
  return column ? runs.sort((a, b) => view.sort[1] * compared(column.value(a), column.value(b), view.sort[1])) : runs;
}

// Numbers before texts, and what is missing last whichever way the table is sorted.
function compared(a, b, direction) {
  const missing = (value) => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return (missing(a) - missing(b)) * direction;
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(name) {
  choose({ sort: view.sort?.[0] === name && view.sort[1] === 1 ? [name, -1] : name ? [name, 1] : null });
}

function drawRunsTable() {
  if (data.runs.length === 1) return;
  const all = columnsOf();
  const pinned = all.filter((column, index) => index === 0 || view.pinned.has(column.name));
  const columns = [...pinned, ...all.filter((column) => !pinned.includes(column))];
  const runs = wantedRuns();
  keepingFocus(runsPlace, () => {
    runsHead.replaceChildren(h("tr", {}, ...columns.map((column, index) => headOf(column, index, pinned.length))));
    runsBody.replaceChildren(...runs.map((run) => rowOf(run, columns, pinned.length)));
  });
  sortChoice.replaceChildren(
    h("option", { value: "" }, "sort by …"),
    ...all.map((column) => h("option", { value: column.name, selected: view.sort?.[0] === column.name }, column.name)),
  );
  const num = runs.filter((run) => !view.hidden.has(run.name)).length;
  everyRun.checked = num === runs.length && num > 0;
  everyRun.indeterminate = num > 0 && num < runs.length;
  numShown.textContent = `${runs.length} of ${data.runs.length} runs, ${shownRuns().length} drawn`;
  stickPinned(pinned.length);
}

function headOf(column, index, numPinned) {
  const [name, direction] = view.sort || [];
  const sorted = name === column.name ? (direction === 1 ? "ascending" : "descending") : "none";
  const arrow = { ascending: " ↑", descending: " ↓", none: "" }[sorted];
  return h(
    "th",
    { "aria-sort": sorted, scope: "col", class: index < numPinned ? "pinned" : "" },
    index === 0 && everyRun,
    h("button", { class: "sort", id: `sort ${column.name}`, onclick: () => sortBy(column.name) }, column.name + arrow),
    index > 0 &&
      h(
        "button",
        {
          class: "pin",
          id: `pin ${column.name}`,
          "aria-pressed": String(view.pinned.has(column.name)),
          "aria-label": `pin ${column.name}`,
          title: "keep this column in view",
          onclick: () => toggle("pinned", column.name),
        },
        "pin",
      ),
  );
}

function rowOf(run, columns, numPinned) {
  const number = data.runs.indexOf(run);
  const cells = columns.map((column, index) => {
    const value = column.value(run);
    const kind = index < numPinned ? "pinned" : column.isOfConfiguration ? "of-configuration" : "";
    if (index === 0) return h("td", { class: kind }, runCell(run, number));
    if (column.name === "state")
      return h("td", { class: `${kind} outcome ${run.outcome}`, "data-label": column.name }, value);
    const best = column.best?.(run);
    return h(
      "td",
      { class: `${kind} ${typeof value === "number" ? "number" : ""}`, "data-label": column.name },
      best ? h("span", {}, textOf(column, run), h("span", { class: "best" }, best)) : textOf(column, run),
    );
  });
  return h(
    "tr",
    { onpointerenter: () => choose({ marked: run.name }), onpointerleave: () => choose({ marked: null }) },
    ...cells,
  );
}

function runCell(run, number) {
  const box = h("input", {
    type: "checkbox",
    id: `run ${run.name}`,
    checked: !view.hidden.has(run.name),
    onchange: () => toggle("hidden", run.name),
    onfocus: () => choose({ marked: run.name }),
    onblur: () => choose({ marked: null }),
  });
  const name = h("label", { class: "run" }, box, swatch(number, run.name));
  return h(
    "div",
    { class: "of-run" },
    name,
    run.link ? h("a", { href: run.link, title: "this run's own report" }, "report") : null,
  );
}

// Each pinned column sticks where the one before it ends.
function stickPinned(numPinned) {
  let left = 0;
  const offsets = [...runsHead.querySelectorAll("th")].slice(0, numPinned).map((cell) => {
    const at = left;
    left += cell.offsetWidth;
    return at;
  });
  for (const row of runsPlace.querySelectorAll("tr"))
    offsets.forEach((at, index) => {
      row.children[index].style.left = `${at}px`;
    });
}

function buildRunsTable() {
  runsPlace.replaceChildren(
    ...(data.runs.length === 1
      ? []
      : [
          h("div", { class: "toolbar of-table" }, runsFilter, sortChoice, numShown),
          h("div", { class: "card scrolled" }, h("table", { class: "runs" }, runsHead, runsBody)),
        ]),
  );
}
drawnBy(["hidden", "sort", "filter", "pinned", "size"], drawRunsTable);
