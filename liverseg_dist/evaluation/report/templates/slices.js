// The voxels of a case: decode what `slice_data.py` packed, and cut planes.
// A volume is a Uint8Array in the order z, y, x. Planes: 0 axial (fixed z), 1 coronal (y), 2 sagittal (x).

async function inflateVolume(base64, rowLength) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const voxels = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let row = 0; row < voxels.length; row += rowLength) {
    for (let i = row + 1; i < row + rowLength; i++) voxels[i] += voxels[i - 1];
  }
  return voxels;
}

async function decodeCase(pictures) {
  const packed = pictures.slices;
  const columns = packed.shape[2];
  return {
    shape: packed.shape,
    storedOf: packed.stored_of,
    spacing: packed.spacing_mm,
    first: pictures.first_slice,
    start: pictures.start,
    focus: pictures.focus,
    hu: packed.hu,
    isCt: packed.is_ct,
    codes: pictures.codes,
    compared: new Set(pictures.compared),
    outlines: pictures.outlines,
    hasLesions: pictures.has_lesions,
    labels: await inflateVolume(packed.labels, columns),
    ct: packed.ct === null ? null : await inflateVolume(packed.ct, columns),
  };
}

// Axes (row, column) of the pictures of each plane.
const PLANE_AXES = [[1, 2], [0, 2], [0, 1]];

function cutPlane(volume, shape, plane, index) {
  const strides = [shape[1] * shape[2], shape[2], 1];
  const [rowAxis, columnAxis] = PLANE_AXES[plane];
  const rows = shape[rowAxis], columns = shape[columnAxis];
  const cut = new Uint8Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    let from = index * strides[plane] + r * strides[rowAxis];
    for (let c = 0; c < columns; c++, from += strides[columnAxis]) cut[r * columns + c] = volume[from];
  }
  return cut;
}

// Grey value of each code: black at level - width / 2, white at level + width / 2.
function greyTable(hu, level, width) {
  return Uint8ClampedArray.from(hu, (value) => (255 * (value - level + width / 2)) / width);
}

function planeImage(cut, rows, columns, colourOf) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < cut.length; i++) pixels[i] = colourOf[cut[i]];
  context.putImageData(image, 0, 0);
  return canvas;
}

// A canvas pixel as a 32-bit number. All machines with browsers are little-endian: red is the lowest byte.
const pixel = ([r, g, b, a = 255]) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

// Lines along the voxel edges where a mask ends; the edge of the picture is not an outline.
function outlinePath(inside, rows, columns) {
  const path = new Path2D();
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const i = r * columns + c;
      if (c + 1 < columns && inside[i] !== inside[i + 1]) { path.moveTo(c + 1, r); path.lineTo(c + 1, r + 1); }
      if (r + 1 < rows && inside[i] !== inside[i + columns]) { path.moveTo(c, r + 1); path.lineTo(c + 1, r + 1); }
    }
  }
  return path;
}
