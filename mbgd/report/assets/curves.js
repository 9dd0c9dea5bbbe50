// From what the page holds of a curve to the points of a line: x axes and smoothing.

const AXES = ["step", "epoch", "examples", "time"];

function interpolated([xs, ys], x) {
  // Linear between the points, through the origin before the first, and with the last slope after the last.
  let low = 0;
  let high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  if (low < xs.length && xs[low] === x) return ys[low];
  const last = Math.min(low, xs.length - 1);
  const [x1, y1] = last ? [xs[last - 1], ys[last - 1]] : [0, 0];
  return xs[last] === x1 ? ys[last] : y1 + ((x - x1) / (xs[last] - x1)) * (ys[last] - y1);
}

function hasAxis(run, axis) {
  if (axis === "examples") return Boolean(run.axes.epoch && run.examples_per_epoch);
  return axis === "step" || Boolean(run.axes[axis]);
}

function onAxis(run, axis, step) {
  if (axis === "step") return step;
  if (axis === "examples") return Math.round(interpolated(run.axes.epoch, step) * run.examples_per_epoch);
  return interpolated(run.axes[axis], step);
}

// The points of a curve on an axis, as [xs, ys]; nothing where the run does not know the axis.
function pointsOf(run, name, axis) {
  const curve = run.curves[name];
  if (!curve || !hasAxis(run, axis)) return null;
  curve.onAxis ??= {};
  curve.onAxis[axis] ??=
    axis === "step"
      ? [curve.x, curve.y]
      : increasing(
          curve.x.map((s) => onAxis(run, axis, s)),
          curve.y,
        );
  return curve.onAxis[axis];
}

function increasing(xs, ys) {
  const kept = [];
  xs.forEach((x, index) => {
    if (!kept.length || x > xs[kept.at(-1)]) kept.push(index);
  });
  return kept.length === xs.length ? [xs, ys] : [kept.map((index) => xs[index]), kept.map((index) => ys[index])];
}

// An exponential moving average without the bias of its start. Its weights fall with the distance on the x axis, in
// thousandths of the whole axis, so that runs that log more or less often are smoothed alike.
function smoothed(run, name, axis, smoothing, [from, to]) {
  const curve = run.curves[name];
  const steps = curve.mx || curve.x;
  const ys = curve.my || curve.y;
  const xs = steps.map((step) => onAxis(run, axis, step));
  let average = 0;
  let weight = 0;
  return [
    xs,
    ys.map((y, index) => {
      const distance = index ? ((xs[index] - xs[index - 1]) / (to - from || 1)) * 1000 : 1;
      const kept = smoothing ** distance;
      average = kept * average + (1 - kept) * y;
      weight = kept * weight + (1 - kept);
      return weight ? average / weight : y;
    }),
  ];
}
