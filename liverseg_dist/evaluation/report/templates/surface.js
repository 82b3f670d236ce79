// Surfaces: points with normals, drawn as small discs. Discs at the same depth are averaged, hidden ones
// are not drawn. The result does not depend on the order of the points, and no dark discs of the far
// side shine through.

const CANVAS_SIZE = 420;
const LIGHT = [-0.35, -0.8, -0.45];
const AMBIENT = 0.35;
const LIVER_OPACITY = 0.4;

class SurfaceView {
  constructor(canvas, surface) {
    this.canvas = canvas;
    this.bytes = Uint8Array.from(atob(surface.data), (c) => c.charCodeAt(0));
    this.count = this.bytes.length / 7;
    this.colours = surface.kinds.map((kind) => palette.lesions[kind]);
    let radius = 1;
    for (let i = 0; i < this.count; i++) {
      const place = [0, 1, 2].map((k) => this.bytes[7 * i + k] - 127.5);
      radius = Math.max(radius, Math.hypot(...place));
    }
    this.scale = (0.48 * CANVAS_SIZE) / radius;
    this.disc = Math.max(2.5, 1.7 * surface.spacing * this.scale);
    this.yaw = -0.35;
    this.pitch = 0.2;
    canvas.width = canvas.height = CANVAS_SIZE;
    this.listen();
    this.draw();
  }

  // x to the left of the patient, y to the back, z to the feet
  turn(x, y, z) {
    const cy = Math.cos(this.yaw), sy = Math.sin(this.yaw), cp = Math.cos(this.pitch), sp = Math.sin(this.pitch);
    const y1 = -sy * x + cy * y;
    return [cy * x + sy * y, cp * y1 - sp * z, sp * y1 + cp * z];
  }

  // Discs that face the viewer, of the liver or of the lesions: x, y and depth in pixels, brightness, kind.
  discs(ofLiver) {
    const found = [];
    for (let i = 0, b = 0; i < this.count; i++, b += 7) {
      const kind = this.bytes[b + 6];
      if ((kind === 0) !== ofLiver) continue;
      const n = this.turn(this.bytes[b + 3] - 128, this.bytes[b + 4] - 128, this.bytes[b + 5] - 128);
      if (n[1] > 10) continue;
      const p = this.turn(this.bytes[b] - 127.5, this.bytes[b + 1] - 127.5, this.bytes[b + 2] - 127.5);
      const lit = Math.max(0, (LIGHT[0] * n[0] + LIGHT[1] * n[1] + LIGHT[2] * n[2]) / 127);
      const half = CANVAS_SIZE / 2;
      found.push([half + p[0] * this.scale, half + p[2] * this.scale, p[1] * this.scale, AMBIENT + (1 - AMBIENT) * lit, kind]);
    }
    return found;
  }

  // Calls `paint(pixel, weight)` for the pixels of a disc; the weight falls to 0 at its edge.
  coverDisc([x, y], paint) {
    const radius = this.disc, square = radius * radius;
    const [top, bottom] = [Math.max(0, Math.ceil(y - radius)), Math.min(CANVAS_SIZE - 1, Math.floor(y + radius))];
    const [left, right] = [Math.max(0, Math.ceil(x - radius)), Math.min(CANVAS_SIZE - 1, Math.floor(x + radius))];
    for (let py = top; py <= bottom; py++) {
      for (let px = left; px <= right; px++) {
        const weight = 1 - ((px - x) ** 2 + (py - y) ** 2) / square;
        if (weight > 0) paint(py * CANVAS_SIZE + px, weight);
      }
    }
  }

  paintLayer(pixels, ofLiver, opacity) {
    const discs = this.discs(ofLiver);
    const nearest = new Float32Array(CANVAS_SIZE ** 2).fill(Infinity);
    for (const disc of discs) {
      this.coverDisc(disc, (at) => { nearest[at] = Math.min(nearest[at], disc[2]); });
    }
    const sums = new Float32Array(4 * CANVAS_SIZE ** 2);
    for (const disc of discs) {
      const [, , depth, brightness, kind] = disc;
      const [r, g, b] = this.colours[kind].map((channel) => channel * brightness);
      this.coverDisc(disc, (at, weight) => {
        if (depth > nearest[at] + 1.5 * this.disc) return;
        sums[4 * at] += weight * r; sums[4 * at + 1] += weight * g; sums[4 * at + 2] += weight * b; sums[4 * at + 3] += weight;
      });
    }
    for (let at = 0; at < sums.length; at += 4) {
      const total = sums[at + 3];
      if (total === 0) continue;
      const share = opacity * Math.min(1, 3 * total);    // fade out at the silhouette
      for (let k = 0; k < 3; k++) pixels[at + k] = (1 - share) * pixels[at + k] + (share * sums[at + k]) / total;
      pixels[at + 3] = 255;
    }
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(CANVAS_SIZE, CANVAS_SIZE);
    for (let at = 0; at < image.data.length; at += 4) image.data.set([20, 24, 29, 255], at);
    this.paintLayer(image.data, true, LIVER_OPACITY);
    this.paintLayer(image.data, false, 1);
    context.putImageData(image, 0, 0);
  }

  turnBy(yaw, pitch) {
    this.yaw += yaw;
    this.pitch += pitch;
    requestAnimationFrame(() => this.draw());
  }

  listen() {
    const { canvas } = this;
    let from = null;
    canvas.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { from = null; });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      this.turnBy((event.clientX - from[0]) / 120, (event.clientY - from[1]) / 120);
      from = [event.clientX, event.clientY];
    });
    const turns = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
    canvas.addEventListener("keydown", (event) => {
      if (!turns[event.key]) return;
      event.preventDefault();
      this.turnBy(...turns[event.key]);
    });
  }
}
