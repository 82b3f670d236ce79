// The slice viewer: one canvas a plane, with slices, zoom and pan. Window and overlay apply to all cases.
// Mouse: wheel zooms (or changes the slice), drag pans, Shift + drag changes the window. Touch: pinch, drag.

const MAX_ZOOM = 16;
const section = document.getElementById("pictures");
const palette = section ? JSON.parse(section.dataset.palette) : null;
const display = { level: 40, width: 400, overlay: true };
const viewers = [];

class PlaneViewer {
  constructor(figure, plane, volume, caseName) {
    this.plane = plane;
    this.volume = volume;
    this.canvas = figure.querySelector("canvas");
    this.slider = figure.querySelector("input");
    this.output = figure.querySelector("output");
    this.name = figure.dataset.plane + " slice of " + caseName;
    const [rowAxis, columnAxis] = PLANE_AXES[plane];
    [this.rows, this.columns] = [volume.shape[rowAxis], volume.shape[columnAxis]];
    [this.rowMm, this.columnMm] = [volume.spacing[rowAxis], volume.spacing[columnAxis]];
    this.stored = (axis, place) => (place * volume.shape[axis]) / volume.storedOf[axis];
    this.box = [rowAxis, columnAxis].map((axis) => volume.focus[axis].map((place) => this.stored(axis, place)));
    this.index = Math.min(volume.shape[plane] - 1, Math.floor(this.stored(plane, volume.start[plane])));
    this.slider.max = volume.shape[plane] - 1;
    this.pointers = new Map();
    this.resetView();
    this.listen(figure);
    this.showSlice(this.index);
  }

  resetView() {
    this.zoom = 1;
    this.centre = this.box.map(([first, stop]) => (first + stop) / 2);
    this.canvas.style.touchAction = "pan-y";
  }

  showSlice(index) {
    this.index = Math.max(0, Math.min(this.volume.shape[this.plane] - 1, index));
    this.slider.value = this.index;
    const perSlice = this.volume.storedOf[this.plane] / this.volume.shape[this.plane];
    const number = this.volume.first[this.plane] + Math.floor((this.index + 0.5) * perSlice);
    this.output.textContent = number;
    this.canvas.setAttribute("aria-label", `${this.name}: number ${number}`);
    this.cut = null;
    this.requestDraw();
  }

  zoomBy(factor, at = null) {
    const before = at && this.voxelAt(at);
    this.zoom = Math.max(0.25, Math.min(MAX_ZOOM, this.zoom * factor));
    if (before) {               // the voxel under the pointer stays in place
      const after = this.voxelAt(at);
      this.centre = this.centre.map((value, i) => value + before[i] - after[i]);
    }
    this.canvas.style.touchAction = this.zoom > 1 ? "none" : "pan-y";
    this.requestDraw();
  }

  panBy(dx, dy) {
    const scale = this.scale();
    const moved = [this.centre[0] - dy / (scale * this.rowMm), this.centre[1] - dx / (scale * this.columnMm)];
    this.centre = [Math.max(0, Math.min(this.rows, moved[0])), Math.max(0, Math.min(this.columns, moved[1]))];
    this.requestDraw();
  }

  // Pixels of the page per millimetre.
  scale() {
    const [[top, bottom], [left, right]] = this.box;
    const { clientWidth, clientHeight } = this.canvas;
    return this.zoom * Math.min(clientWidth / ((right - left) * this.columnMm), clientHeight / ((bottom - top) * this.rowMm));
  }

  // Voxel (row, column) at a position on the canvas.
  voxelAt([x, y]) {
    const scale = this.scale();
    return [
      this.centre[0] + (y - this.canvas.clientHeight / 2) / (scale * this.rowMm),
      this.centre[1] + (x - this.canvas.clientWidth / 2) / (scale * this.columnMm),
    ];
  }

  requestDraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  // Prepares the parts of a slice; they are kept until another slice is shown.
  prepare() {
    if (this.cut) return;
    const { shape, labels, ct } = this.volume;
    const { rows, columns } = this;
    const codes = cutPlane(labels, shape, this.plane, this.index);
    const { codes: count, compared, outlines, hasLesions } = this.volume;
    const truth = codes.map((code) => code % count), prediction = codes.map((code) => Math.floor(code / count));
    const colours = palette.overlay;
    const background = ct ? colours.nothing : colours.organ;
    const colourOf = Uint32Array.from({ length: count * count }, (_, code) => {
      const [trueCode, predictedCode] = [code % count, Math.floor(code / count)];
      const isTrue = compared.has(trueCode), isPredicted = compared.has(predictedCode);
      // Fills of right voxels would hide the image where all structures are compared.
      if (isTrue && trueCode === predictedCode) return pixel(hasLesions ? colours.true_positive : background);
      if (isTrue) return pixel(colours.false_negative);
      if (isPredicted) return pixel(colours.false_positive);
      return code ? pixel(background) : 0;
    });
    const outline = (mask, members) => outlinePath(mask.map((code) => (members.includes(code) ? 1 : 0)), rows, columns);
    this.cut = {
      fills: planeImage(codes, rows, columns, colourOf),
      ct: ct && cutPlane(ct, shape, this.plane, this.index),
      lines: [["truth_line", truth], ["prediction_line", prediction]].flatMap(([name, mask]) =>
        outlines.map((members) => [`rgb(${colours[name].slice(0, 3)})`, outline(mask, members)])),
    };
  }

  draw() {
    this.prepare();
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    const context = canvas.getContext("2d");
    context.fillStyle = "#14181d";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const scale = this.scale() * ratio;
    const [sx, sy] = [scale * this.columnMm, scale * this.rowMm];
    const place = new DOMMatrix([
      sx, 0, 0, sy, canvas.width / 2 - this.centre[1] * sx, canvas.height / 2 - this.centre[0] * sy,
    ]);
    context.setTransform(place);
    if (this.cut.ct) {
      const greys = greyTable(this.volume.hu, display.level, display.width);
      const colourOf = Uint32Array.from(greys, (grey) => pixel([grey, grey, grey]));
      context.drawImage(planeImage(this.cut.ct, this.rows, this.columns, colourOf), 0, 0);
    }
    if (!display.overlay) return;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cut.fills, 0, 0);
    context.resetTransform();
    context.lineWidth = 1.2 * ratio;
    for (const [colour, path] of this.cut.lines) {
      const placed = new Path2D();
      placed.addPath(path, place);
      context.strokeStyle = colour;
      context.stroke(placed);
    }
  }

  listen(figure) {
    this.slider.addEventListener("input", () => this.showSlice(Number(this.slider.value)));
    const actions = { in: () => this.zoomBy(1.5), out: () => this.zoomBy(1 / 1.5), reset: () => this.reset() };
    figure.querySelectorAll("button").forEach((button) => {
      button.addEventListener("click", actions[button.dataset.zoom]);
    });
    this.canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    this.canvas.addEventListener("dblclick", () => this.reset());
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    this.canvas.addEventListener("pointermove", (event) => this.onMove(event));
    for (const name of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    new ResizeObserver(() => this.requestDraw()).observe(this.canvas);
  }

  reset() {
    this.resetView();
    this.requestDraw();
  }

  onWheel(event) {
    event.preventDefault();
    const away = Math.sign(event.deltaY || event.deltaX);
    const zooms = document.getElementById("wheel").value === "zoom";
    if (zooms !== event.shiftKey || event.ctrlKey) this.zoomBy(away < 0 ? 1.2 : 1 / 1.2, [event.offsetX, event.offsetY]);
    else this.showSlice(this.index + away);
  }

  onKey(event) {
    const step = 30;
    const actions = {
      ArrowUp: () => this.showSlice(this.index - 1), ArrowDown: () => this.showSlice(this.index + 1),
      PageUp: () => this.showSlice(this.index - 10), PageDown: () => this.showSlice(this.index + 10),
      Home: () => this.showSlice(0), End: () => this.showSlice(Infinity),
      "+": () => this.zoomBy(1.25), "=": () => this.zoomBy(1.25), "-": () => this.zoomBy(0.8), 0: () => this.reset(),
    };
    const pans = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    const pan = pans[event.key];
    if (pan && (event.shiftKey || !actions[event.key])) this.panBy(...pan);
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
  }

  onDown(event) {
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.canvas.setPointerCapture(event.pointerId);
  }

  onMove(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.offsetX, event.offsetY];
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const distance = (place) => Math.max(1, Math.hypot(place[0] - other[0], place[1] - other[1]));
      this.zoomBy(distance(now) / distance(before), other);
    } else if (event.shiftKey) {
      setWindow(display.level + dy, display.width * Math.exp(dx / 200));
    } else if (event.pointerType !== "touch" || this.zoom > 1) {
      this.panBy(dx, dy);
    }
    this.pointers.set(event.pointerId, now);
  }
}

// --- window: level and width, for all slices of the page; in HU where the scans are CT ---

function setWindow(level, width) {
  display.level = Math.round(Math.max(-1000, Math.min(1000, level)));
  display.width = Math.round(Math.max(10, Math.min(3000, width)));
  for (const name of ["level", "width"]) {
    document.getElementById(name).value = display[name];
    document.getElementById(`${name}-value`).textContent = `${display[name]} ${section.dataset.unit}`;
  }
  section.querySelectorAll("[data-preset]").forEach((button) => {
    const chosen = Number(button.dataset.level) === display.level && Number(button.dataset.width) === display.width;
    button.setAttribute("aria-pressed", chosen);
  });
  viewers.forEach((viewer) => viewer.requestDraw());
}

// --- loading: small cases are in the page, large ones in files next to it ---

const waitingFor = new Map();
window.liversegSlices = (name, pictures) => { waitingFor.get(name)?.(pictures); };

function loadFile(article) {
  return new Promise((resolve, reject) => {
    waitingFor.set(article.dataset.name, resolve);
    const script = document.createElement("script");
    script.src = article.dataset.file;
    script.onerror = () => reject(new Error("keep the folder slices next to report.html"));
    document.head.append(script);
  });
}

async function loadCase(article) {
  const state = article.querySelector(".state");
  try {
    const pictures = article.dataset.pictures ? JSON.parse(article.dataset.pictures) : await loadFile(article);
    const volume = await decodeCase(pictures);
    article.querySelector(".views").hidden = false;
    article.querySelectorAll("figure.plane").forEach((figure, plane) => {
      viewers.push(new PlaneViewer(figure, plane, volume, article.dataset.case));
    });
    new SurfaceView(article.querySelector("canvas.surface"), pictures.surface);
    article.querySelector(".still")?.remove();
    state.remove();
    article.dataset.state = "ready";
  } catch (error) {
    article.dataset.state = "failed";
    state.textContent = `The slices cannot be shown: ${error.message}.`;
  }
}

if (section) {
  for (const name of ["level", "width"]) {
    document.getElementById(name).addEventListener("input", (event) => {
      setWindow(...(name === "level" ? [event.target.valueAsNumber, display.width] : [display.level, event.target.valueAsNumber]));
    });
  }
  section.querySelectorAll("[data-preset]").forEach((button) => {
    button.addEventListener("click", () => setWindow(Number(button.dataset.level), Number(button.dataset.width)));
  });
  document.getElementById("overlay").addEventListener("change", (event) => {
    display.overlay = event.target.checked;
    viewers.forEach((viewer) => viewer.requestDraw());
  });
  setWindow(Number(section.dataset.level), Number(section.dataset.width));
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      loadCase(target);
    }
  }, { rootMargin: "800px" });
  section.querySelectorAll("article.case").forEach((article) => {
    if (article.dataset.file) near.observe(article);
    else if (article.dataset.pictures) loadCase(article);
  });
}
