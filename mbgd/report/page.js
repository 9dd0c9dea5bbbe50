// Shows the values under the pointer. The curves themselves are there without it.
const charts = JSON.parse(document.getElementById("charts").textContent);
const tip = document.getElementById("tip");

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return step - points[low][0] <= points[high][0] - step ? points[low] : points[high];
}

document.querySelectorAll(".charts svg").forEach((svg, number) => {
  const { x: [lowStep, highStep, left, right], width, series } = charts[number];
  const line = svg.querySelector(".pointer");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) / box.width * width;
    const wanted = lowStep + (pixel - left) / (right - left) * (highStep - lowStep);
    const found = series.map((one) => nearest(one.points, wanted));
    const step = found.map((point) => point[0]).reduce((a, b) => Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b);
    const at = left + (step - lowStep) / (highStep - lowStep) * (right - left);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    line.style.visibility = "visible";
    const head = document.createElement("span");
    head.className = "hint";
    head.textContent = `step ${step.toLocaleString("en")}`;
    tip.replaceChildren(head, ...series.map((one, index) => {
      const [atStep, value] = found[index];
      const row = document.createElement("div");
      const swatch = document.createElement("i");
      swatch.style.cssText = `background: var(--c${one.colour}); width: .7rem; height: .7rem; border-radius: .2rem`;
      const label = document.createElement("span");
      label.textContent = atStep === step ? one.label : `${one.label} (step ${atStep.toLocaleString("en")})`;
      const text = document.createElement("b");
      text.textContent = value;
      row.append(swatch, label, text);
      return row;
    }));
    tip.style.display = "block";
    const beside = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.style.display = "none";
    line.style.visibility = "hidden";
  });
});
