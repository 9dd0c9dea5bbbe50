// One chart: its curves, zoom by dragging, the values under the pointer, and the keyboard.

const HEIGHT = 230;
const MOST_MARKED_POINTS = 40;
const BYTES_APART = [0, 1, 2, 3, 4].flatMap((power) =>
  [1, 2, 5, 10, 20, 50, 100, 200, 500].map((n) => n * 1024 ** power),
);
const tip = h("div", { id: "tip", role: "status" });

class Chart {
  constructor(title) {
    this.title = title;
    this.plot = null;
    this.heading = h("figcaption", { class: "heading" });
    this.place = h("div", {
      class: "plot",
      tabIndex: 0,
      role: "group",
      onkeydown: (event) => this.key(event),
      onblur: () => this.leave(),
    });
    this.say = h("p", { class: "hint" });
    this.element = h("figure", {}, this.heading, this.place, this.say);
    this.place.addEventListener("pointerleave", () => this.leave());
  }

  // lines: [{ label, number, dashed, faint, xs, ys, run }]; range: [from, to] of the x axis without zoom.
  draw(picture, lines, range) {
    const [from, to] = view.zoom || range;
    const inside = (line) => line.ys.filter((_, index) => line.xs[index] >= from && line.xs[index] <= to);
    const judged = lines
      .filter((line) => !line.faint)
      .map(inside)
      .filter((ys) => ys.length);
    const limits = limitsOf(judged.length ? judged : [[0, 1]], {
      unit: picture.unit,
      mayBeLog: picture.may_be_log,
      log: view.log.get(this.title),
      allValues: view.allValues,
    });
    Object.assign(this, { picture, lines, limits, range });
    this.describe();
    this.element.classList.toggle("wide", view.wide.has(this.title));
    const { left = -1, top = -1 } = this.plot?.cursor || {};
    this.plot?.destroy();
    const width = this.place.clientWidth || 400;
    const height = view.wide.has(this.title) ? 2 * HEIGHT : HEIGHT;
    this.plot = new uPlot(this.options(width, height, [from, to]), aligned(lines), this.place);
    if (left >= 0) this.plot.setCursor({ left, top });
  }

  describe() {
    const { isLog, numOutside } = this.limits;
    const { title } = this;
    const outside = numOutside ? `${whole(numOutside)} ${numOutside === 1 ? "value" : "values"} outside` : "";
    const button = (label, pressed, text, click) =>
      h(
        "button",
        {
          id: `${label} ${title}`,
          "aria-pressed": String(pressed),
          "aria-label": `${text}: ${title}`,
          title: text,
          onclick: click,
        },
        label,
      );
    const parts = [
      h("b", {}, title),
      this.legend(),
      outside && h("span", { class: "hint", title: "“outliers”, above, shows them" }, outside),
      h(
        "span",
        { class: "buttons" },
        button("log", isLog, "logarithmic axis", () => {
          view.log.set(title, !isLog);
          changed("log");
        }),
        button("wide", view.wide.has(title), "whole width", () => toggle("wide", title)),
        button("CSV", false, "these values as CSV", () => saveCsv(Object.keys(this.picture.curves), title)),
      ),
    ];
    keepingFocus(this.heading, () => this.heading.replaceChildren(...parts));
    this.place.setAttribute("aria-label", `${title}: arrow keys show values, plus and minus zoom, 0 shows everything`);
  }

  // What the colours mean; of several runs the table of runs tells it.
  legend() {
    const lines = this.lines.filter((line) => !line.faint);
    if (data.runs.length > 1)
      return lines.some((line) => line.dashed) ? h("span", { class: "hint" }, this.dashes()) : "";
    return h(
      "span",
      { class: "legends" },
      ...(lines.length > 1 ? lines.map((line) => swatch(line.number, line.label)) : []),
    );
  }

  dashes() {
    const labels = Object.values(this.picture.curves).slice(1);
    return `dashed: ${[...labels, ...(this.picture.shows_minibatch ? ["minibatch in use"] : [])].join(", ")}`;
  }

  options(width, height, x) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--soft"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    const { unit } = this.picture;
    const { low, high, isLog } = this.limits;
    const size = (_, texts) => Math.max(44, 14 + 7 * Math.max(0, ...(texts || []).map((text) => (text || "").length)));
    return {
      width,
      height,
      legend: { show: false },
      padding: [10, 14, 0, 0],
      scales: { x: { time: false, range: () => x }, y: { distr: isLog ? 3 : 1, range: () => [low, high] } },
      axes: [
        {
          ...axis,
          grid: { show: false },
          size: 30,
          values: (_, splits) => splits.map((x) => whole(x) + xUnit()),
          space: 70,
        },
        {
          ...axis,
          size,
          space: 36,
          ...(unit === "bytes" ? { incrs: BYTES_APART } : {}),
          ...(isLog ? { splits: () => logTicks(low, high, height / 32), filter: (_, splits) => splits } : {}),
          values: (_, splits) => splits.map((value) => (value === null ? "" : short(value, unit))),
        },
      ],
      series: [{}, ...this.lines.map((line) => seriesOf(line, colour))],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        points: { show: false },
        sync: { key: "x", setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        bind: {
          dblclick: () => () => {
            choose({ zoom: null });
            return null;
          },
        },
      },
      hooks: {
        setSelect: [
          (plot) => {
            const { left, width } = plot.select;
            if (width > 3) choose({ zoom: [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")] });
          },
        ],
        setCursor: [
          (plot) => {
            if (plot.over.matches(":hover") || this.place === document.activeElement) this.show(plot);
          },
        ],
      },
    };
  }

  // The values nearest to the cursor, beside it.
  show(plot) {
    const { left, top } = plot.cursor;
    if (left < 0) return this.leave();
    const wanted = plot.posToVal(left, "x");
    const shown = this.lines.filter((line) => !line.faint && line.xs.length);
    if (!shown.length) return;
    const found = shown.map((line) => nearest(line.xs, wanted));
    const at = found
      .map((index, number) => shown[number].xs[index])
      .reduce((a, b) => (Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b));
    const rows = shown.map((line, number) => {
      const x = line.xs[found[number]];
      const other = x === at || line.isConstant ? "" : ` (${xText(x)})`;
      return h(
        "div",
        {},
        swatch(line.number, line.label + other),
        h("b", {}, short(line.ys[found[number]], this.picture.unit)),
      );
    });
    tip.replaceChildren(h("span", { class: "hint" }, xText(at)), ...rows.slice(0, 16));
    tip.style.display = "block";
    const box = plot.over.getBoundingClientRect();
    const x = box.left + left;
    const beside = x + 16 + tip.offsetWidth > innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${Math.max(4, Math.min(box.top + Math.max(top, 0) + 12, innerHeight - tip.offsetHeight - 4))}px`;
  }

  fade() {
    this.lines.forEach((line, index) => {
      this.plot.series[index + 1].alpha = alphaOf(line);
    });
    this.plot.redraw(false);
  }

  leave() {
    tip.style.display = "none";
  }

  key(event) {
    const [from, to] = view.zoom || this.range;
    const { plot } = this;
    const at = plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : (from + to) / 2;
    const move = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
    const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (move !== undefined) {
      const x = Math.min(to, Math.max(from, at + move * (to - from)));
      plot.setCursor({ left: plot.valToPos(x, "x"), top: 20 });
    } else if (factor) {
      const ends = [at - (at - from) * factor, at + (to - at) * factor];
      const zoom = [Math.max(ends[0], this.range[0]), Math.min(ends[1], this.range[1])];
      choose({ zoom: zoom[0] === this.range[0] && zoom[1] === this.range[1] ? null : zoom });
    } else if (event.key === "0" || event.key === "Escape") choose({ zoom: null });
    else return;
    event.preventDefault();
  }
}

// The curves of the run under the pointer stand out.
const alphaOf = (line) => (line.faint || (view.marked && line.run !== view.marked) ? 0.25 : 1);

function seriesOf(line, colour) {
  const stroke = colour(`--c${line.number % NUM_COLOURS}`);
  return {
    stroke,
    alpha: alphaOf(line),
    width: line.faint ? 1 : 1.8,
    dash: line.dashed ? [5, 3] : undefined,
    spanGaps: true,
    points: { show: !line.faint && !line.isConstant && line.xs.length <= MOST_MARKED_POINTS, size: 5, fill: stroke },
  };
}

function aligned(lines) {
  return lines.length ? uPlot.join(lines.map((line) => [line.xs, line.ys])) : [[], []];
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

const xUnit = () => (view.axis === "time" ? ` ${timeUnit().name}` : "");

function xText(x) {
  if (view.axis === "time") return duration(x * timeUnit().seconds);
  if (view.axis === "epoch") return `epoch ${short(x)}`;
  return view.axis === "step" ? `step ${x.toLocaleString("en")}` : `${x.toLocaleString("en")} examples`;
}
