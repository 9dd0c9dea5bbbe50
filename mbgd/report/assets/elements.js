"use strict";
// Makes elements. Texts become text nodes, so nothing from a run's folder can become a part of the page.

const data = JSON.parse(document.getElementById("data").textContent);

function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const colourOf = (number) => `var(--c${number % NUM_COLOURS})`;
const NUM_COLOURS = 8;

function swatch(number, label) {
  return h("span", { class: "legend" }, h("i", { style: { background: colourOf(number) } }), h("span", {}, label));
}

function searchField(id, placeholder, label, onText) {
  const oninput = (event) => onText(event.target.value);
  return h("input", { id, type: "search", placeholder, "aria-label": label, oninput });
}

// Runs the change, which may replace the element that has the keyboard's focus by another with its id.
function keepingFocus(place, change) {
  const { id } = place.contains(document.activeElement) ? document.activeElement : {};
  change();
  if (id) document.getElementById(id)?.focus({ preventScroll: true });
}
