// Puts the page together, draws it, and follows a run that is watched.

const SECONDS_BETWEEN_LOOKS = 2;
const header = h("header");
const below = h("section", { "aria-label": "what was run" });

function tile(text, name, more) {
  return h(
    "div",
    { class: "tile" },
    h("b", {}, text),
    h("span", {}, name),
    more ? h("span", { class: "best" }, more) : null,
  );
}

function drawHeader() {
  const parts = [h("h1", {}, data.title)];
  if (data.runs.length === 1) {
    const [run] = data.runs;
    const progress =
      run.outcome === "running" && run.steps
        ? `, ${Math.floor((100 * (run.facts[0]?.[1] || 0)) / run.steps)} % of ${whole(run.steps)} steps`
        : "";
    parts.push(h("p", { class: `outcome ${run.outcome}` }, run.state + progress));
    parts.push(
      h(
        "div",
        { class: "tiles" },
        ...run.results.map((one) =>
          tile(
            short(one.last),
            one.name,
            one.best === null ? "" : `best ${short(one.best)} at step ${whole(one.best_step)}`,
          ),
        ),
        ...run.facts.map(([name, value, unit]) => tile(short(value, unit), name)),
      ),
    );
  }
  const problems = data.runs.flatMap((run) =>
    run.problems.map((problem) => (data.runs.length === 1 ? problem : `${run.name}: ${problem}`)),
  );
  parts.push(
    ...problems.map((text) => h("p", { class: "failed" }, text)),
    ...data.notes.map((text) => h("p", { class: "note" }, text)),
  );
  parts.push(
    h("p", { class: "hint", id: "written" }, data.watched ? `live, ${data.written}` : `written ${data.written}`),
  );
  header.replaceChildren(...parts);
}

function drawBelow() {
  const open = below.querySelector("details[open]") !== null;
  const [plan, environment, ...others] = keyTables();
  below.replaceChildren(
    ...[
      timeBars(),
      h("div", { class: data.runs.length === 1 ? "pair" : "" }, ...[plan, environment].filter(Boolean)),
      ...others,
    ].filter(Boolean),
  );
  if (open)
    below.querySelectorAll("details").forEach((one) => {
      one.open = true;
    });
}

drawnBy([], drawHeader);
drawnBy(["hidden"], drawBelow);
document.querySelector("main").append(header, runsPlace, toolbar, chartsPlace, panelsPlace, below);
document.body.append(tip);
buildRunsTable();
draws.forEach(({ draw }) => draw());
addEventListener("resize", () => changed("size"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed("theme"));

let isPressed = false; // while the reader drags, what is dragged over stays
addEventListener("pointerdown", () => (isPressed = true));
addEventListener("pointerup", () => (isPressed = false));

async function follow() {
  let version = "";
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * SECONDS_BETWEEN_LOOKS));
    const answer = await fetch("data.json", {
      headers: version ? { "If-None-Match": version } : {},
      cache: "no-store",
    }).catch(() => null);
    document.body.classList.toggle("lost", !answer?.ok && answer?.status !== 304);
    if (!answer?.ok || isPressed) continue;
    version = answer.headers.get("ETag");
    const wasOne = data.runs.length === 1;
    Object.assign(data, await answer.json());
    if (wasOne !== (data.runs.length === 1)) buildRunsTable();
    changed("data");
  }
}
if (data.watched) follow();
