// Numbers as people read them; mbgd/text/numbers.py does the same in the terminal.

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB"];
const SECONDS = ["s", "ms", "µs", "ns"];
const withoutZeros = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

// As Python's %g: with an exponent below 1e-4, and where the digits do not reach the point.
function general(value, digits) {
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const power = Number(exponent);
  if (power >= -4 && power < digits) return withoutZeros(value.toPrecision(digits));
  return `${withoutZeros(mantissa)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

function short(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (unit === "bytes") {
    let power = 0;
    while (Math.abs(value) >= 1024 && power < BYTES.length - 1) {
      value /= 1024;
      power++;
    }
    return `${general(value, 4)} ${BYTES[power]}`;
  }
  if (unit === "seconds") {
    let power = 0;
    while (value !== 0 && Math.abs(value) < 1 && power < SECONDS.length - 1) {
      value *= 1000;
      power++;
    }
    return `${general(value, 3)} ${SECONDS[power]}`;
  }
  if (unit === "duration") return duration(value);
  if (unit === "share") return `${general(100 * value, 3)} %`;
  if (Math.abs(value) >= 1000)
    return Math.abs(value) < 1e9 ? Math.round(value).toLocaleString("en") : general(value, 3);
  return general(value, 4);
}

function duration(seconds) {
  if (seconds < 60) return short(seconds, "seconds");
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  return hours
    ? `${hours} h ${String(minutes % 60).padStart(2, "0")} min`
    : `${minutes} min ${Math.floor(seconds % 60)} s`;
}

function whole(value) {
  // A step's number: 1,500 as it is, 20,000 as 20k.
  if (Math.abs(value) >= 10_000 && value % 100 === 0) return value < 1e6 ? `${value / 1e3}k` : `${value / 1e6}M`;
  return value.toLocaleString("en", { maximumFractionDigits: 3 });
}
