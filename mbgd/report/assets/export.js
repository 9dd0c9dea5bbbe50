// Curves as CSV, made in the page. A long curve has fewer points here than in metrics.jsonl.

function saveCsv(names, title) {
  const rows = [["run", "step", ...names]];
  for (const run of shownRuns()) {
    const bySteps = new Map();
    names.forEach((name, column) =>
      (run.curves[name]?.x || []).forEach((step, index) => {
        if (!bySteps.has(step)) bySteps.set(step, Array(names.length).fill(""));
        bySteps.get(step)[column] = run.curves[name].y[index];
      }),
    );
    for (const step of [...bySteps.keys()].sort((a, b) => a - b)) rows.push([run.name, step, ...bySteps.get(step)]);
  }
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const text = rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  h("a", { href: address, download: `${title.replace(/[^\w.=-]+/g, "_")}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
