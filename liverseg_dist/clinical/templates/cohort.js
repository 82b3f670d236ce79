"use strict";
// Filters of the cohort's page: rows, bars and lines of one patient share `data-row`.
const LEFT = 88, RIGHT = 752;
const rows = [...document.querySelectorAll("#patients tbody tr")];
const bars = [...document.querySelectorAll("svg.chart rect[data-row]")];
const lines = [...document.querySelectorAll("svg.chart polyline[data-row]")];
const boxes = [...document.querySelectorAll("input[data-filter]")];
const form = document.getElementById("filters");
const byRow = new Map(rows.map((row) => [row.dataset.row, row]));

function isWanted(row, off, wanted, volumetric, newOnly) {
  const { category, volumetric: byVolume } = row.dataset;
  if (off.has(category)) return false;
  if (volumetric === "differs" ? byVolume === category : volumetric && byVolume !== volumetric) return false;
  if (newOnly && row.dataset.new === "0") return false;
  return row.cells[0].textContent.toLowerCase().includes(wanted);
}

function update() {
  const off = new Set(boxes.filter((box) => !box.checked).map((box) => box.dataset.filter));
  const wanted = document.getElementById("search").value.trim().toLowerCase();
  const volumetric = document.getElementById("volumetric").value;
  const newOnly = document.getElementById("new-only").checked;
  const shown = new Set();
  rows.forEach((row) => {
    row.hidden = !isWanted(row, off, wanted, volumetric, newOnly);
    if (!row.hidden) shown.add(row.dataset.row);
  });
  document.getElementById("shown").textContent = shown.size;
  // The bars that remain share the width.
  const left = bars.filter((bar) => shown.has(bar.dataset.row));
  const step = (RIGHT - LEFT) / Math.max(left.length, 8);
  bars.forEach((bar) => { bar.style.display = shown.has(bar.dataset.row) ? "" : "none"; });
  left.forEach((bar, number) => {
    bar.setAttribute("x", LEFT + number * step);
    bar.setAttribute("width", step > 4 ? 0.85 * step : step);
  });
  let drawn = 0;
  lines.forEach((line) => {
    const visible = shown.has(line.dataset.row);
    line.style.display = visible ? "" : "none";
    drawn += visible;
  });
  // Many lines are thin and transparent, so that dense regions show as such.
  const chart = lines.length ? lines[0].ownerSVGElement : null;
  if (chart) {
    chart.style.setProperty("--line-opacity", Math.min(1, Math.max(0.12, 6 / Math.sqrt(drawn + 1))));
    chart.style.setProperty("--line-width", drawn > 200 ? 0.9 : 1.8);
  }
}

[...bars, ...lines].forEach((mark) => mark.addEventListener("click", () => {
  byRow.get(mark.dataset.row).querySelector("a").click();
}));
// The table's row and both marks of a patient light up together.
document.addEventListener("mouseover", (event) => {
  document.querySelectorAll(".picked").forEach((mark) => mark.classList.remove("picked"));
  const found = event.target.closest("[data-row]");
  if (!found) return;
  document.querySelectorAll(`[data-row="${found.dataset.row}"]`).forEach((mark) => {
    mark.classList.add("picked");
    if (mark.tagName === "polyline") mark.parentNode.append(mark);
  });
});
form.addEventListener("input", update);
form.addEventListener("reset", () => setTimeout(update));
form.addEventListener("submit", (event) => event.preventDefault());
update();
