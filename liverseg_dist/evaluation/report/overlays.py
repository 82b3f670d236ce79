"""Pictures of a case: all slices in three planes for the report's viewer, its surfaces, and one still picture.

Lines are masks (truth white, prediction yellow), fills are tumour voxels (true positive, false negative, false
positive). Radiological display: the patient's right is on the left of the picture, anterior and head are up.

A case's pictures are one JSON file (whole or absent), which the report takes its slices from, and one PNG for slides.
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
"""Array axes from head to feet, front to back, right to left: each plane is then upright as it lies."""
PLANES = ("axial", "coronal", "sagittal")
LONGEST_SIDE_PX = 260
MARGIN_MM = 12.0
WIDE_VOXELS = 6_000_000
"""Up to this size a scan is stored with the slices that hold no mask."""
WINDOW_HU = (-110.0, 190.0)
"""Shown from black to white in still pictures: narrow, because a tumour differs from its liver by little."""
_CODE = {name: code for code, name in enumerate(OVERLAY)}
SCHEMA = 2
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True)
class Scene:
    """One case in display orientation, cut to the liver: label arrays, CT in HU (or None), voxel size in mm."""

    prediction: np.ndarray
    truth: np.ndarray
    image: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    first_slice: tuple[int, int, int]
    focus: tuple[tuple[int, int], ...]
    """First slice and the one after the last along each axis, between which the masks lie with a margin."""


def render_case(
    prediction: Volume, truth: Volume, image: Volume | None = None
) -> dict[str, Any] | None:
    """What the report's viewer needs of a case.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: CT in HU on the same grid, if there is one.

    Returns:
        A JSON-able dict: `slices` (`pack_slices`), `first_slice` (index of the box's first slice in the scan, in
        display orientation), `start` (the slice with the largest disagreement on the tumour), `focus` (where the masks
        lie)
        and `surface`. None where both masks are empty.
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
    """Turn a case to display orientation and cut it to the joint box of both masks.

    Args:
        prediction: Predicted labels.
        truth: True labels on the same grid.
        image: CT in HU on the same grid, if there is one.
        wide: Keep slices without any mask, too, as far as `WIDE_VOXELS` allows; `Scene.focus` is the box then.

    Returns:
        The scene, or None where both masks are empty.
    """
    turned = [volume.reoriented(DISPLAY_ORIENTATION) for volume in (prediction, truth)]
    masks = [
        np.where(volume.voxels == IGNORE, 0, volume.voxels).astype(np.uint8) for volume in turned
    ]
    inner = find_joint_box(masks[0], masks[1], margin=0)
    if inner is None:
        return None
    spacing_mm = turned[1].spacing_mm
    margin = [round(MARGIN_MM / mm) for mm in spacing_mm]
    near: Box = tuple(  # type: ignore[assignment]
        slice(max(0, axis.start - grow), min(size, axis.stop + grow))
        for axis, grow, size in zip(inner, margin, masks[1].shape, strict=True)
    )
    box = _widen(near, masks[1].shape) if wide else near
    hu = None
    if image is not None:
        hu = image.reoriented(DISPLAY_ORIENTATION).voxels[box]
    first_z, first_y, first_x = (axis.start for axis in box)
    focus = tuple((n.start - b.start, n.stop - b.start) for n, b in zip(near, box, strict=True))
    return Scene(masks[0][box], masks[1][box], hu, spacing_mm, (first_z, first_y, first_x), focus)


def _widen(near: Box, shape: tuple[int, ...]) -> Box:
    """The largest of: the whole scan, all its axial slices cut to the box, the box; that is small enough."""
    whole = tuple(slice(0, size) for size in shape)
    for box in (whole, (whole[0], near[1], near[2])):
        if math.prod(axis.stop - axis.start for axis in box) <= WIDE_VOXELS:
            return box  # type: ignore[return-value]
    return near


def draw_overlay(
    image_yx: np.ndarray, truth_yx: np.ndarray, prediction_yx: np.ndarray
) -> np.ndarray:
    """One axial slice of RAS volumes (HU and labels) as RGB (height, width, 3) uint8, turned for display."""
    upright = [plane[::-1, ::-1] for plane in (image_yx, truth_yx, prediction_yx)]
    return _blended(_grey(upright[0]), _overlay_codes(upright[2], upright[1], with_liver=False))


def draw_plane(scene: Scene, plane: str, index: int, scale: float = 1.0) -> np.ndarray:
    """One slice with its overlay as RGB (height, width, 3) uint8; `index` counts within the scene."""
    size = _frame_size(scene, plane, scale)
    ground = _ct_frame(scene, plane, index, size)
    return _blended(
        np.full(size, 24, np.uint8) if ground is None else ground,
        _overlay_frame(scene, plane, index, size),
    )


def render_contact_sheet(scene: Scene) -> bytes:
    """The three planes side by side through the place that matters, as PNG."""
    frames = [draw_plane(scene, plane, _worst_index(scene, plane), scale=1.6) for plane in PLANES]
    height = max(frame.shape[0] for frame in frames)
    padded = [
        np.pad(frame, ((0, height - frame.shape[0]), (0, 6), (0, 0)), constant_values=255)
        for frame in frames
    ]
    return _encode(Image.fromarray(np.concatenate(padded, axis=1)[:, :-6]), "PNG", optimize=True)


def save_pictures(
    folder: Path, case_id: str, prediction: Volume, truth: Volume, image: Volume | None = None
) -> None:
    """Write `folder/<case>.json` for the report and `folder/<case>.png`; removes both where there is nothing to see."""
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
    """What `save_pictures` wrote for a case, or None where it has none or the file is damaged."""
    if folder is None:
        return None
    try:
        pictures = json.loads(
            (folder / f"{encode_file_name(case_id)}.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError, RecursionError):
        return None
    return pictures if _is_sound(pictures) else None


def _is_sound(pictures: object) -> bool:
    """Whether a picture file holds what we write: it ends up inside a web page, so nothing else may."""
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
    for interesting in (prediction != truth, truth, (scene.truth > 0) | (scene.prediction > 0)):
        voxels = interesting.sum(axis=axes)
        if voxels.max() > 0:
            return int(voxels.argmax())
    return 0


def _frame_size(scene: Scene, plane: str, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) in square pixels; all planes of a case share one scale."""
    extent_mm = [n * mm for n, mm in zip(scene.truth.shape, scene.spacing_mm, strict=True)]
    px_per_mm = scale * LONGEST_SIDE_PX / max(extent_mm)
    height, width = (
        max(8, round(extent_mm[a] * px_per_mm)) for a in range(3) if a != PLANES.index(plane)
    )
    return height, width


def _cut(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    return np.take(array, index, axis=PLANES.index(plane))


def _ct_frame(scene: Scene, plane: str, index: int, size: tuple[int, int]) -> np.ndarray | None:
    if scene.image is None:
        return None
    cut = Image.fromarray(np.ascontiguousarray(_grey(_cut(scene.image, plane, index))))
    return np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _overlay_frame(scene: Scene, plane: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Palette codes (height, width) uint8."""
    prediction, truth = (
        _nearest(_cut(mask, plane, index), size) for mask in (scene.prediction, scene.truth)
    )
    return _overlay_codes(prediction, truth, with_liver=scene.image is None)


def _overlay_codes(prediction: np.ndarray, truth: np.ndarray, with_liver: bool) -> np.ndarray:
    codes = np.zeros(truth.shape, dtype=np.uint8)
    if with_liver:
        codes[(prediction > 0) | (truth > 0)] = _CODE["liver"]
    predicted, true = prediction == TUMOUR, truth == TUMOUR
    codes[predicted & true] = _CODE["true_positive"]
    codes[~predicted & true] = _CODE["false_negative"]
    codes[predicted & ~true] = _CODE["false_positive"]
    for mask, name in ((truth, "truth_line"), (prediction, "prediction_line")):
        for structure in (mask > 0, mask == TUMOUR):
            codes[_outline(structure)] = _CODE[name]
    return codes


def _grey(hu: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    return (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _blended(grey: np.ndarray, codes: np.ndarray) -> np.ndarray:
    colours = np.array(list(OVERLAY.values()), dtype=np.float32)[codes]
    alpha = colours[..., 3:] / 255.0
    return (grey[..., None] * (1 - alpha) + colours[..., :3] * alpha).round().astype(np.uint8)


def _nearest(cut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, cut.shape, strict=True)
    )
    return cut[rows[:, None], columns]


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a face neighbour outside it; the picture's edge is no outline."""
    around = np.pad(mask, 1, mode="edge")
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
