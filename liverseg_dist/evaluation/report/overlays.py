"""Pictures of a case: slices in three planes and surfaces for the report, and one still picture.

Lines are masks (truth white, prediction yellow); fills are tumour voxels (true positive, false
negative, false positive). Radiological display: the patient's right is on the left of the picture,
anterior and head are up.

The pictures of a case are one JSON file, from which the report takes its slices, and one PNG for
slides and TensorBoard. Both are written atomically.
"""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.metrics.boxes import Box, find_joint_box
from liverseg_dist.evaluation.report.surface_points import sample_surface_points
from liverseg_dist.evaluation.slice_data import check_slices, pack_slices
from liverseg_dist.files import write_bytes, write_json
from liverseg_dist.labels import IGNORE, TUMOUR
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
"""From black to white in still pictures; narrow, since a tumour differs little from its liver."""
_CODE = {name: code for code, name in enumerate(OVERLAY)}
SCHEMA = 2
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True)
class Scene:
    """One case in display orientation, cut to the liver: labels, CT in HU (or None), voxel size."""

    prediction: np.ndarray
    truth: np.ndarray
    image: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    first_slice: tuple[int, int, int]
    focus: tuple[tuple[int, int], ...]
    """First slice and the one after the last of the masks with a margin, along each axis."""


def render_case(
    prediction: Volume, truth: Volume, image: Volume | None = None
) -> dict[str, Any] | None:
    """Collect what the report's viewer shows of a case.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: CT in HU on the same grid, if there is one.

    Returns:
        A JSON-able dict: `slices` (`pack_slices`), `first_slice` (index of the first stored slice
        in the scan, in display orientation), `start` (the slice with the most wrong tumour voxels),
        `focus` (range of the masks) and `surface`. None where both masks are empty.
    """
    scene = make_scene(prediction, truth, image, wide=True)
    if scene is None:
        return None
    near = tuple(slice(*span) for span in scene.focus)
    return {
        "schema": SCHEMA,
        "slices": pack_slices(scene.prediction, scene.truth, scene.image, scene.spacing_mm),
        "first_slice": list(scene.first_slice),
        "start": [_worst_index(scene, plane) for plane in PLANES],
        "focus": [list(span) for span in scene.focus],
        "surface": sample_surface_points(
            scene.prediction[near], scene.truth[near], scene.spacing_mm
        ),
    }


def make_scene(
    prediction: Volume, truth: Volume, image: Volume | None = None, wide: bool = False
) -> Scene | None:
    """Reorient a case for display and cut it to the joint box of both masks.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: CT in HU on the same grid, if there is one.
        wide: Keep slices without a mask as far as `WIDE_VOXELS` allows; `Scene.focus` is the box.

    Returns:
        The scene, or None where both masks are empty.
    """
    predicted_labels, true_labels = _prepare_labels(prediction), _prepare_labels(truth)
    # MARGIN_MM follows below, in mm and not in voxels.
    inner = find_joint_box(predicted_labels, true_labels, margin=0)
    if inner is None:
        return None
    spacing_mm = truth.reoriented(DISPLAY_ORIENTATION).spacing_mm
    near = _grow_box(inner, spacing_mm, true_labels.shape)
    box = _widen_box(near, true_labels.shape) if wide else near
    hu = None
    if image is not None:
        hu = image.reoriented(DISPLAY_ORIENTATION).voxels[box]
    first_z, first_y, first_x = (axis.start for axis in box)
    focus = []
    for inside, outside in zip(near, box, strict=True):
        focus.append((inside.start - outside.start, inside.stop - outside.start))
    return Scene(
        predicted_labels[box],
        true_labels[box],
        hu,
        spacing_mm,
        (first_z, first_y, first_x),
        tuple(focus),
    )


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
    image_yx: np.ndarray, truth_yx: np.ndarray, prediction_yx: np.ndarray
) -> np.ndarray:
    """Draw one axial slice with its overlay, as validation shows it in TensorBoard.

    Args:
        image_yx: Slice of a CT in RAS orientation, HU.
        truth_yx: True labels of the slice.
        prediction_yx: Predicted labels of the slice.

    Returns:
        RGB (height, width, 3) uint8, upright.
    """
    image, truth, prediction = (plane[::-1, ::-1] for plane in (image_yx, truth_yx, prediction_yx))
    return _blend_colours(_window_hu(image), _encode_overlay(prediction, truth, with_liver=False))


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
        background = _draw_ct(_cut_plane(scene.image, plane, index), size)
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


def save_pictures(
    folder: Path, case_id: str, prediction: Volume, truth: Volume, image: Volume | None = None
) -> None:
    """Write `folder/<case>.json` and `.png`; remove them where both masks are empty."""
    scene = make_scene(prediction, truth, image)
    stem = folder / encode_file_name(case_id)
    if scene is None:
        for suffix in (".json", ".png"):
            Path(f"{stem}{suffix}").unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(f"{stem}.png"), render_contact_sheet(scene))
    write_json(Path(f"{stem}.json"), render_case(prediction, truth, image))


def load_pictures(folder: Path | None, case_id: str) -> dict[str, Any] | None:
    """Read the pictures of a case; None where it has none or the file is damaged."""
    if folder is None:
        return None
    try:
        pictures = json.loads(
            (folder / f"{encode_file_name(case_id)}.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError, RecursionError):
        return None
    return pictures if _is_valid(pictures) else None


def _is_valid(pictures: object) -> bool:
    """Whether a value is a result of `render_case`.

    It becomes part of a web page, so nothing else may pass.
    """
    try:
        surface = pictures["surface"]  # type: ignore[index]
        numbers = [*pictures["first_slice"], *pictures["start"], surface["count"]]  # type: ignore[index]
        for first, stop in pictures["focus"]:  # type: ignore[index]
            numbers += [first, stop]
        return (
            pictures["schema"] == SCHEMA  # type: ignore[index]
            and len(numbers) == 13
            and all(type(number) is int and number >= 0 for number in numbers)
            and isinstance(surface["spacing"], float)
            and _BASE64.fullmatch(surface["data"]) is not None
            and check_slices(pictures["slices"])  # type: ignore[index]
        )
    except (TypeError, KeyError, ValueError):
        return False


def _worst_index(scene: Scene, plane: str) -> int:
    """The slice with the most wrong tumour voxels, else with most tumour, else with most liver."""
    axes = tuple(axis for axis in range(3) if axis != PLANES.index(plane))
    prediction, truth = scene.prediction == TUMOUR, scene.truth == TUMOUR
    # The first of these masks that is not empty decides.
    for interesting in (prediction != truth, truth, (scene.truth > 0) | (scene.prediction > 0)):
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


def _draw_ct(hu: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Grey values of a slice (height, width) uint8."""
    image = Image.fromarray(np.ascontiguousarray(_window_hu(hu)))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _draw_masks(scene: Scene, plane: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Palette codes (height, width) uint8."""
    prediction = _resize_nearest(_cut_plane(scene.prediction, plane, index), size)
    truth = _resize_nearest(_cut_plane(scene.truth, plane, index), size)
    # Without a CT the liver is filled: only its outline would be visible otherwise.
    return _encode_overlay(prediction, truth, with_liver=scene.image is None)


def _encode_overlay(prediction: np.ndarray, truth: np.ndarray, with_liver: bool) -> np.ndarray:
    codes = np.zeros(truth.shape, dtype=np.uint8)
    if with_liver:
        codes[(prediction > 0) | (truth > 0)] = _CODE["liver"]
    predicted, true = prediction == TUMOUR, truth == TUMOUR
    codes[predicted & true] = _CODE["true_positive"]
    codes[~predicted & true] = _CODE["false_negative"]
    codes[predicted & ~true] = _CODE["false_positive"]
    # Outlines come last, on top of the fills; the prediction covers the truth where they coincide.
    for mask, name in ((truth, "truth_line"), (prediction, "prediction_line")):
        for structure in (mask > 0, mask == TUMOUR):
            codes[_find_outline(structure)] = _CODE[name]
    return codes


def _window_hu(hu: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    return (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


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
