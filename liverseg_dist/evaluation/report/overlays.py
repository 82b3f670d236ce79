"""Pictures of a case: slices in three planes and surfaces for the report, and one still picture.

Lines are masks (truth white, prediction yellow); fills are compared voxels (true positive, false
negative, false positive; see `display_labels`). Radiological display: the patient's right is on the left of the picture,
anterior and head are up.

`picture_files` stores the pictures.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.metrics.boxes import Box, find_joint_box
from liverseg_dist.evaluation.report.display_labels import DisplayLabels
from liverseg_dist.evaluation.report.surface_points import sample_surface_points
from liverseg_dist.evaluation.slice_data import pack_slices
from liverseg_dist.labels import IGNORE, LITS_SCHEME, LabelScheme
from liverseg_dist.pages import OVERLAY
from liverseg_dist.volume import Volume

DISPLAY_ORIENTATION = "LPI"
"""Array axes from head to feet, front to back, right to left: each plane is then upright."""
PLANES = ("axial", "coronal", "sagittal")
LONGEST_SIDE_PX = 260
MARGIN_MM = 12.0
GAP_PX = 6
"""White columns between the planes of the still picture."""
WIDE_VOXELS = 6_000_000
"""A scan up to this size is stored with the slices that contain no mask."""
WINDOW_HU = (-110.0, 190.0)
"""From black to white in still pictures of CT; narrow, since a lesion differs little from its
organ."""
PERCENTILES = (0.5, 99.5)
"""From black to white in still pictures of other modalities."""
_CODE = {name: code for code, name in enumerate(OVERLAY)}
SCHEMA = 3


@dataclass(frozen=True)
class Scene:
    """One case in display orientation, cut to its masks: codes, image (or None), voxel size."""

    prediction: np.ndarray
    """Codes of `display`."""
    truth: np.ndarray
    image: np.ndarray | None
    """HU for CT, else intensities."""
    spacing_mm: tuple[float, float, float]
    first_slice: tuple[int, int, int]
    focus: tuple[tuple[int, int], ...]
    """First slice and the one after the last of the masks with a margin, along each axis."""
    display: DisplayLabels
    window: tuple[float, float]
    """Intensities that are black and white in still pictures."""


def render_case(
    prediction: Volume,
    truth: Volume,
    image: Volume | None = None,
    labels: LabelScheme = LITS_SCHEME,
    *,
    is_ct: bool = True,
) -> dict[str, Any] | None:
    """Collect what the report's viewer shows of a case.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: Scan on the same grid, if there is one: HU for CT, else any intensities.
        labels: Scheme of both masks.
        is_ct: Whether the scan is CT.

    Returns:
        A JSON-able dict: `slices` (`pack_slices`), `first_slice` (index of the first stored slice
        in the scan, in display orientation), `start` (the slice with the most wrong compared
        voxels), `focus` (range of the masks), `surface`, and `codes`, `compared`, `outlines` and
        `has_lesions` of `DisplayLabels`. None where both masks are empty.
    """
    scene = make_scene(prediction, truth, image, wide=True, labels=labels, is_ct=is_ct)
    if scene is None:
        return None
    near = tuple(slice(*span) for span in scene.focus)
    return {
        "schema": SCHEMA,
        "codes": scene.display.num_codes,
        "compared": list(scene.display.compared),
        "outlines": [list(codes) for codes in scene.display.outlines],
        "has_lesions": scene.display.has_lesions,
        "slices": pack_slices(
            scene.prediction,
            scene.truth,
            scene.image,
            scene.spacing_mm,
            num_codes=scene.display.num_codes,
            window=None if is_ct else scene.window,
        ),
        "first_slice": list(scene.first_slice),
        "start": [_worst_index(scene, plane) for plane in PLANES],
        "focus": [list(span) for span in scene.focus],
        "surface": sample_surface_points(
            scene.display.reduce_to_lesions(scene.prediction[near]),
            scene.display.reduce_to_lesions(scene.truth[near]),
            scene.spacing_mm,
        ),
    }


def make_scene(
    prediction: Volume,
    truth: Volume,
    image: Volume | None = None,
    wide: bool = False,
    labels: LabelScheme = LITS_SCHEME,
    *,
    is_ct: bool = True,
) -> Scene | None:
    """Reorient a case for display and cut it to the joint box of both masks.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: Scan on the same grid, if there is one.
        wide: Keep slices without a mask as far as `WIDE_VOXELS` allows; `Scene.focus` is the box.
        labels: Scheme of both masks.
        is_ct: Whether the scan is CT in HU.

    Returns:
        The scene, or None where both masks are empty.
    """
    display = DisplayLabels(labels)
    predicted_labels = display.encode(_prepare_labels(prediction))
    true_labels = display.encode(_prepare_labels(truth))
    # MARGIN_MM follows below, in mm and not in voxels.
    inner = find_joint_box(predicted_labels, true_labels, margin=0)
    if inner is None:
        return None
    spacing_mm = truth.reoriented(DISPLAY_ORIENTATION).spacing_mm
    near = _grow_box(inner, spacing_mm, true_labels.shape)
    box = _widen_box(near, true_labels.shape) if wide else near
    intensities, window = None, WINDOW_HU
    if image is not None:
        intensities = image.reoriented(DISPLAY_ORIENTATION).voxels[box]
        if not is_ct:
            window = choose_window(intensities)
    first_z, first_y, first_x = (axis.start for axis in box)
    focus = []
    for inside, outside in zip(near, box, strict=True):
        focus.append((inside.start - outside.start, inside.stop - outside.start))
    return Scene(
        predicted_labels[box],
        true_labels[box],
        intensities,
        spacing_mm,
        (first_z, first_y, first_x),
        tuple(focus),
        display,
        window,
    )


def choose_window(intensities: np.ndarray) -> tuple[float, float]:
    """Intensities that are black and white, for images without a unit."""
    low, high = (float(value) for value in np.percentile(intensities, PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)


def _prepare_labels(mask: Volume) -> np.ndarray:
    """Labels in display orientation; voxels without a class become background."""
    voxels = mask.reoriented(DISPLAY_ORIENTATION).voxels
    return np.where(voxels == IGNORE, 0, voxels).astype(np.uint8)


def _grow_box(box: Box, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]) -> Box:
    """The box with `MARGIN_MM` on each side, within the array."""
    grown = []
    for axis, mm, size in zip(box, spacing_mm, shape, strict=True):
        margin = round(MARGIN_MM / mm)
        grown.append(slice(max(0, axis.start - margin), min(size, axis.stop + margin)))
    z, y, x = grown
    return z, y, x


def _widen_box(near: Box, shape: tuple[int, ...]) -> Box:
    """The largest box that is small enough: the scan, its axial slices cut to the box, the box."""
    z, y, x = (slice(0, size) for size in shape)
    for box in ((z, y, x), (z, near[1], near[2])):
        if math.prod(axis.stop - axis.start for axis in box) <= WIDE_VOXELS:
            return box
    return near


def draw_overlay(
    image_yx: np.ndarray,
    truth_yx: np.ndarray,
    prediction_yx: np.ndarray,
    labels: LabelScheme = LITS_SCHEME,
    *,
    is_ct: bool = True,
) -> np.ndarray:
    """Draw one axial slice with its overlay, as validation shows it in TensorBoard.

    Args:
        image_yx: Slice of a scan in RAS orientation; HU for CT.
        truth_yx: True labels of the slice.
        prediction_yx: Predicted labels of the slice.
        labels: Scheme of both labels.
        is_ct: Whether the scan is CT in HU.

    Returns:
        RGB (height, width, 3) uint8, upright.
    """
    image, truth, prediction = (plane[::-1, ::-1] for plane in (image_yx, truth_yx, prediction_yx))
    display = DisplayLabels(labels)
    codes = _encode_overlay(
        display.encode(prediction), display.encode(truth), display, with_organ=False
    )
    window = WINDOW_HU if is_ct else choose_window(image)
    return _blend_colours(_apply_window(image, window), codes)


def draw_plane(scene: Scene, plane: str, index: int, scale: float = 1.0) -> np.ndarray:
    """Draw one slice of a scene with its overlay.

    Args:
        scene: From `make_scene`.
        plane: One of `PLANES`.
        index: Slice within the scene.
        scale: Size of the picture relative to `LONGEST_SIDE_PX`.

    Returns:
        RGB (height, width, 3) uint8.
    """
    size = _frame_size(scene, plane, scale)
    background = np.full(size, 24, np.uint8)
    if scene.image is not None:
        background = _draw_image(_cut_plane(scene.image, plane, index), size, scene.window)
    return _blend_colours(background, _draw_masks(scene, plane, index, size))


def render_contact_sheet(scene: Scene) -> bytes:
    """Draw the three planes side by side, each through its worst slice, as PNG."""
    frames = [draw_plane(scene, plane, _worst_index(scene, plane), scale=1.6) for plane in PLANES]
    height = max(frame.shape[0] for frame in frames)
    padded = []
    for frame in frames:
        margin = ((0, height - frame.shape[0]), (0, GAP_PX), (0, 0))
        padded.append(np.pad(frame, margin, constant_values=255))
    sheet = np.concatenate(padded, axis=1)[:, :-GAP_PX]
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _worst_index(scene: Scene, plane: str) -> int:
    """The slice with the most wrong compared voxels, else with most of them, else with most of
    all."""
    axes = tuple(axis for axis in range(3) if axis != PLANES.index(plane))
    truth = scene.display.is_compared(scene.truth)
    either = truth | scene.display.is_compared(scene.prediction)
    wrong = either & (scene.prediction != scene.truth)
    # The first of these masks that is not empty decides.
    for interesting in (wrong, truth, (scene.truth > 0) | (scene.prediction > 0)):
        voxels = interesting.sum(axis=axes)
        if voxels.max() > 0:
            return int(voxels.argmax())
    return 0


def _frame_size(scene: Scene, plane: str, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) in square pixels; all planes of a case share one scale."""
    # Pixels are square also where voxels are not.
    extent_mm = [n * mm for n, mm in zip(scene.truth.shape, scene.spacing_mm, strict=True)]
    px_per_mm = scale * LONGEST_SIDE_PX / max(extent_mm)
    height, width = (
        max(8, round(extent_mm[a] * px_per_mm)) for a in range(3) if a != PLANES.index(plane)
    )
    return height, width


def _cut_plane(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    return np.take(array, index, axis=PLANES.index(plane))


def _draw_image(
    intensities: np.ndarray, size: tuple[int, int], window: tuple[float, float]
) -> np.ndarray:
    """Grey values of a slice (height, width) uint8."""
    image = Image.fromarray(np.ascontiguousarray(_apply_window(intensities, window)))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _draw_masks(scene: Scene, plane: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Palette codes (height, width) uint8."""
    prediction = _resize_nearest(_cut_plane(scene.prediction, plane, index), size)
    truth = _resize_nearest(_cut_plane(scene.truth, plane, index), size)
    # Without an image organs are filled: only their outlines would be visible otherwise.
    return _encode_overlay(prediction, truth, scene.display, with_organ=scene.image is None)


def _encode_overlay(
    prediction: np.ndarray, truth: np.ndarray, display: DisplayLabels, with_organ: bool
) -> np.ndarray:
    codes = np.zeros(truth.shape, dtype=np.uint8)
    if with_organ:
        codes[(prediction > 0) | (truth > 0)] = _CODE["organ"]
    predicted, true = display.is_compared(prediction), display.is_compared(truth)
    # Fills of right voxels would hide the image where all structures are compared.
    if display.has_lesions:
        codes[predicted & true] = _CODE["true_positive"]
    # A voxel of another structure than predicted is missed by its own structure.
    codes[true & (prediction != truth)] = _CODE["false_negative"]
    codes[predicted & ~true] = _CODE["false_positive"]
    # Outlines come last, on top of the fills; the prediction covers the truth where they coincide.
    for mask, name in ((truth, "truth_line"), (prediction, "prediction_line")):
        for members in display.outlines:
            codes[_find_outline(np.isin(mask, members))] = _CODE[name]
    return codes


def _apply_window(intensities: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    share = (intensities.astype(np.float32) - low) / (high - low)
    return (np.clip(share, 0, 1) * 255).astype(np.uint8)


def _blend_colours(grey: np.ndarray, codes: np.ndarray) -> np.ndarray:
    colours = np.array(list(OVERLAY.values()), dtype=np.float32)[codes]
    alpha = colours[..., 3:] / 255.0
    return (grey[..., None] * (1 - alpha) + colours[..., :3] * alpha).round().astype(np.uint8)


def _resize_nearest(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    rows = ((np.arange(height) + 0.5) * plane.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * plane.shape[1] / width).astype(int)
    return plane[rows[:, None], columns]


def _find_outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a side neighbour outside; the picture's edge is no outline."""
    around = np.pad(mask, 1, mode="edge")
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])
