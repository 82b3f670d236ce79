"use strict";
// Tables: a click on a heading sorts, the search box filters. Undefined values ("–") stay at the end.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  const headings = [...table.querySelectorAll("th[data-key]")];
  headings.forEach((heading) => {
    const sort = () => {
      const column = Number(heading.dataset.key);
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    };
    heading.tabIndex = 0;
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
});
const search = document.getElementById("search");
if (search) search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  document.querySelectorAll("#cases-table tbody tr").forEach((row) => {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
});

// Slices: all frames of a plane are tiles of one image; a slider (or the wheel over the picture) chooses the tile.
document.querySelectorAll("figure.plane").forEach((figure) => {
  const { columns, rows } = figure.dataset;
  const slider = figure.querySelector("input");
  const output = figure.querySelector("output");
  const layers = figure.querySelectorAll(".stack > div");
  const slices = JSON.parse(figure.dataset.slices);
  const show = () => {
    const frame = Number(slider.value);
    const column = frame % columns, row = Math.floor(frame / columns);
    const part = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0) + "%";
    layers.forEach((layer) => { layer.style.backgroundPosition = part(column, columns) + " " + part(row, rows); });
    output.textContent = slices[frame];
  };
  slider.addEventListener("input", show);
  figure.querySelector(".stack").addEventListener("wheel", (event) => {
    event.preventDefault();
    slider.value = Number(slider.value) + Math.sign(event.deltaY);
    show();
  }, { passive: false });
  show();
});
const toggle = document.getElementById("overlay");
if (toggle) toggle.addEventListener("change", () => {
  document.getElementById("pictures").classList.toggle("plain", !toggle.checked);
});

// Surfaces: points with normals on a canvas, painted from back to front; dragging turns them.
const COLOURS = [[190, 178, 168], [0, 190, 140], [80, 145, 255], [255, 92, 50]];
document.querySelectorAll("canvas.surface").forEach((canvas) => {
  const bytes = Uint8Array.from(atob(canvas.dataset.points), (c) => c.charCodeAt(0));
  const count = bytes.length / 7;
  const context = canvas.getContext("2d");
  const size = (canvas.width = canvas.height = 420);
  const order = Uint32Array.from({ length: count }, (_, i) => i);
  const depth = new Float32Array(count), px = new Float32Array(count), py = new Float32Array(count), light = new Float32Array(count);
  let radius = 1;
  for (let i = 0; i < count; i++) radius = Math.max(radius, Math.hypot(...[0, 1, 2].map((k) => bytes[7 * i + k] - 127.5)));
  const scale = 0.48 * size / radius;
  let yaw = -0.35, pitch = 0.2;
  const draw = () => {
    const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
    for (let i = 0; i < count; i++) {
      const b = 7 * i;
      const turn = (x, y, z) => {           // x to the left of the patient, y to the back, z to the feet
        const x1 = cy * x + sy * y, y1 = -sy * x + cy * y;
        return [x1, cp * y1 - sp * z, sp * y1 + cp * z];
      };
      const p = turn(bytes[b] - 127.5, bytes[b + 1] - 127.5, bytes[b + 2] - 127.5);
      const n = turn(bytes[b + 3] - 128, bytes[b + 4] - 128, bytes[b + 5] - 128);
      px[i] = size / 2 + p[0] * scale; py[i] = size / 2 + p[2] * scale; depth[i] = p[1];
      light[i] = Math.max(0, (-0.35 * n[0] - 0.8 * n[1] - 0.45 * n[2]) / 127);
    }
    order.sort((a, b) => depth[b] - depth[a]);
    context.clearRect(0, 0, size, size);
    for (const pass of [0, 1]) {            // the liver first and see-through, tumours over it
      for (const i of order) {
        const kind = bytes[7 * i + 6];
        if ((kind > 0) !== (pass > 0)) continue;
        const shade = 0.3 + 0.7 * light[i];
        const [r, g, b] = COLOURS[kind];
        context.fillStyle = `rgba(${r * shade | 0},${g * shade | 0},${b * shade | 0},${kind ? 1 : 0.2})`;
        context.beginPath();
        context.arc(px[i], py[i], kind ? 5 : 7, 0, 7);
        context.fill();
      }
    }
  };
  let from = null;
  canvas.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { from = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!from) return;
    yaw += (event.clientX - from[0]) / 120; pitch += (event.clientY - from[1]) / 120;
    from = [event.clientX, event.clientY];
    requestAnimationFrame(draw);
  });
  draw();
});
