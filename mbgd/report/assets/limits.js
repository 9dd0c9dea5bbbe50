// Limits of a y axis that a few values far away do not spoil.

const LOG_FROM = 30; // ratio of the greatest to the least value from which an axis is logarithmic
const FAR = 3; // times the distance between the quartiles
const LEAST_JUDGED = 4; // fewer values have no outliers

// Values within FAR times the distance between the quartiles beyond them; all where there are few.
function withoutOutliers(values) {
  if (values.length < LEAST_JUDGED) return values;
  const sorted = Float64Array.from(values).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const [low, high] = [at(0.25), at(0.75)];
  const room = FAR * (high - low);
  if (room === 0) return values;
  return values.filter((value) => value >= low - room && value <= high + room);
}

// The limits around curves, each an array of values: { low, high, isLog, numOutside }.
function limitsOf(curves, { unit, mayBeLog, log, allValues }) {
  const all = curves.flat();
  const [least, greatest] = extremes(all);
  if (unit === "share") return { low: 0, high: Math.max(1, greatest), isLog: false, numOutside: 0 };
  const isLog = least > 0 && (log ?? (mayBeLog && greatest / least >= LOG_FROM));
  const scale = isLog ? Math.log10 : (value) => value;
  const back = isLog ? (value) => 10 ** value : (value) => value;
  const kept =
    allValues || unit === "bytes" ? all.map(scale) : curves.flatMap((values) => withoutOutliers(values.map(scale)));
  const [low, high] = extremes(kept);
  const space = 0.06 * (high - low) || (isLog ? 0.1 : Math.abs(high) * 0.1) || 1;
  const bottom = !isLog && low >= 0 && low - space < 0 ? 0 : low - space;
  return {
    low: back(bottom),
    high: back(high + space),
    isLog,
    numOutside: all.filter((value) => scale(value) < bottom || scale(value) > high + space).length,
  };
}

// Round values to label on a logarithmic axis: powers of 10, and twice and five times them where there is room.
function logTicks(low, high, most) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) powers.push(power);
  const within = (values) => values.filter((value) => value >= low && value <= high);
  const fine = within(powers.flatMap((power) => [1, 2, 5].map((factor) => Number(`${factor}e${power}`))));
  if (fine.length <= most) return fine;
  const coarse = within(powers.map((power) => Number(`1e${power}`)));
  return coarse.filter((_, index) => index % Math.ceil(coarse.length / most) === 0);
}

function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}
