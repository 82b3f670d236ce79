"""Pictures of a case: slices in three planes with the outlines of truth and prediction, and its surfaces as points.

Lines say whose mask it is (truth white, prediction yellow), fills of the tumour say how it went (found, missed, false).
Radiological display: the patient's right is on the left of the picture, anterior and head are up.

The CT and the overlay are two images, so that the report can switch the overlay off, lines stay sharp beside a lossy
CT, and a page of many cases stays small. A case's pictures are one JSON file (whole or absent) and one PNG for slides.
"""

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.ledger import file_name
from liverseg_dist.evaluation.metrics.boxes import Box, joint_box
from liverseg_dist.evaluation.report.surface_points import surface_points
from liverseg_dist.files import write_bytes, write_json
from liverseg_dist.labels import IGNORE, TUMOUR
from liverseg_dist.volume import Volume

DISPLAY_ORIENTATION = "LPI"
"""Array axes from head to feet, front to back, right to left: each plane is then upright as it lies."""
PLANES = ("axial", "coronal", "sagittal")
MAX_FRAMES: Mapping[str, int] = {"axial": 32, "coronal": 20, "sagittal": 20}
LONGEST_SIDE_PX = 260
MARGIN_MM = 12.0
WINDOW_HU = (-110.0, 190.0)
"""Shown from black to white: narrow, because a tumour differs from its liver by little."""
JPEG_QUALITY = 50
PALETTE: Mapping[str, tuple[int, int, int, int]] = {
    "nothing": (0, 0, 0, 0),
    "truth_line": (255, 255, 255, 255),
    "prediction_line": (255, 214, 10, 255),
    "found": (0, 170, 125, 120),
    "missed": (60, 130, 255, 150),
    "false": (255, 80, 40, 150),
    "liver": (150, 160, 172, 90),
}
"""Overlay colours RGBA, distinguishable with colour-blindness; `liver` is drawn only where no CT lies behind."""
_CODE = {name: code for code, name in enumerate(PALETTE)}
SCHEMA = 1
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_DATA_URI = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Scene:
    """One case in display orientation, cut to the liver: label arrays, CT grey values (or None), voxel size in mm."""

    prediction: np.ndarray
    truth: np.ndarray
    grey: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    first_slice: tuple[int, int, int]


def render_case(
    prediction: Volume, truth: Volume, image: Volume | None = None
) -> dict[str, Any] | None:
    """Pictures of a case as a JSON-able dict; None where both masks are empty.

    All volumes lie on one grid (`image` in HU may be left out). Strips of frames are data URIs: `ct` (JPEG, may be
    None) and `overlay` (PNG), `columns` frames a row; `start` is the frame with the largest disagreement on the tumour.
    """
    scene = make_scene(prediction, truth, image)
    if scene is None:
        return None
    planes = {plane: _strip(scene, plane) for plane in PLANES}
    return {
        "schema": SCHEMA,
        "has_ct": scene.grey is not None,
        "planes": planes,
        "surface": surface_points(scene.prediction, scene.truth, scene.spacing_mm),
    }


def make_scene(prediction: Volume, truth: Volume, image: Volume | None = None) -> Scene | None:
    """Turn to display orientation and cut to the joint bounding box with a margin; None where both are empty."""
    turned = [volume.reoriented(DISPLAY_ORIENTATION) for volume in (prediction, truth)]
    masks = [
        np.where(volume.voxels == IGNORE, 0, volume.voxels).astype(np.uint8) for volume in turned
    ]
    inner = joint_box(masks[0], masks[1], margin=0)
    if inner is None:
        return None
    spacing_mm = turned[1].spacing_mm
    margin = [round(MARGIN_MM / mm) for mm in spacing_mm]
    box: Box = tuple(  # type: ignore[assignment]
        slice(max(0, axis.start - grow), min(size, axis.stop + grow))
        for axis, grow, size in zip(inner, margin, masks[1].shape, strict=True)
    )
    grey = None
    if image is not None:
        grey = _grey(image.reoriented(DISPLAY_ORIENTATION).voxels[box])
    first_z, first_y, first_x = (axis.start for axis in box)
    return Scene(masks[0][box], masks[1][box], grey, spacing_mm, (first_z, first_y, first_x))


def overlay(image_yx: np.ndarray, truth_yx: np.ndarray, prediction_yx: np.ndarray) -> np.ndarray:
    """One axial slice of RAS volumes (HU and labels) as RGB (height, width, 3) uint8, turned for display."""
    upright = [plane[::-1, ::-1] for plane in (image_yx, truth_yx, prediction_yx)]
    return _blended(_grey(upright[0]), _overlay_codes(upright[2], upright[1], with_liver=False))


def overlay_picture(scene: Scene, plane: str, index: int, scale: float = 1.0) -> np.ndarray:
    """One slice with its overlay as RGB (height, width, 3) uint8; `index` counts within the scene."""
    size = _frame_size(scene, plane, scale)
    ground = _ct_frame(scene, plane, index, size)
    return _blended(
        np.full(size, 24, np.uint8) if ground is None else ground,
        _overlay_frame(scene, plane, index, size),
    )


def contact_sheet(scene: Scene) -> bytes:
    """The three planes side by side through the place that matters, as PNG."""
    frames = [
        overlay_picture(scene, plane, _worst_index(scene, plane), scale=1.6) for plane in PLANES
    ]
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
    stem = folder / file_name(case_id)
    if scene is None:
        for suffix in (".json", ".png"):
            Path(f"{stem}{suffix}").unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(f"{stem}.png"), contact_sheet(scene))
    write_json(Path(f"{stem}.json"), render_case(prediction, truth, image))


def load_pictures(folder: Path | None, case_id: str) -> dict[str, Any] | None:
    """What `save_pictures` wrote for a case, or None where it has none or the file is damaged."""
    if folder is None:
        return None
    try:
        pictures = json.loads((folder / f"{file_name(case_id)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return pictures if _is_sound(pictures) else None


def _is_sound(pictures: object) -> bool:
    """Whether a picture file holds what we write: it ends up inside a web page, so nothing else may."""
    try:
        planes = [pictures["planes"][plane] for plane in PLANES]  # type: ignore[index]
        numbers = [
            plane[key]
            for plane in planes
            for key in ("width", "height", "columns", "rows", "frames", "start")
        ]
        images = [
            plane[key] for plane in planes for key in ("overlay", "ct") if plane[key] is not None
        ]
        surface = pictures["surface"]  # type: ignore[index]
        return (
            pictures["schema"] == SCHEMA  # type: ignore[index]
            and all(
                isinstance(number, int) and number >= 0 for number in [*numbers, surface["count"]]
            )
            and all(_DATA_URI.fullmatch(image) for image in images)
            and _BASE64.fullmatch(surface["data"]) is not None
        )
    except (TypeError, KeyError):
        return False


def _strip(scene: Scene, plane: str) -> dict[str, Any]:
    size = _frame_size(scene, plane)
    axis = PLANES.index(plane)
    count = scene.truth.shape[axis]
    worst = _worst_index(scene, plane)
    indices = sorted(
        {
            *np.linspace(0, count - 1, min(count, MAX_FRAMES[plane])).round().astype(int).tolist(),
            worst,
        }
    )
    columns = min(8, len(indices))
    overlay = _tiled([_overlay_frame(scene, plane, i, size) for i in indices], columns)
    ct = None
    if scene.grey is not None:
        tiles = _tiled([_ct_frame(scene, plane, i, size) for i in indices], columns)
        ct = _data_uri(
            _encode(Image.fromarray(tiles), "JPEG", quality=JPEG_QUALITY, optimize=True), "jpeg"
        )
    return {
        "width": size[1],
        "height": size[0],
        "columns": columns,
        "rows": -(-len(indices) // columns),
        "frames": len(indices),
        "start": indices.index(worst),
        "slices": [scene.first_slice[axis] + i for i in indices],
        "overlay": _data_uri(
            _encode(_palette_image(overlay), "PNG", optimize=True, transparency=_alphas()), "png"
        ),
        "ct": ct,
    }


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
    if scene.grey is None:
        return None
    cut = Image.fromarray(np.ascontiguousarray(_cut(scene.grey, plane, index)))
    return np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _overlay_frame(scene: Scene, plane: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Palette codes (height, width) uint8."""
    prediction, truth = (
        _nearest(_cut(mask, plane, index), size) for mask in (scene.prediction, scene.truth)
    )
    return _overlay_codes(prediction, truth, with_liver=scene.grey is None)


def _overlay_codes(prediction: np.ndarray, truth: np.ndarray, with_liver: bool) -> np.ndarray:
    codes = np.zeros(truth.shape, dtype=np.uint8)
    if with_liver:
        codes[(prediction > 0) | (truth > 0)] = _CODE["liver"]
    predicted, true = prediction == TUMOUR, truth == TUMOUR
    codes[predicted & true] = _CODE["found"]
    codes[~predicted & true] = _CODE["missed"]
    codes[predicted & ~true] = _CODE["false"]
    for mask, name in ((truth, "truth_line"), (prediction, "prediction_line")):
        for structure in (mask > 0, mask == TUMOUR):
            codes[_outline(structure)] = _CODE[name]
    return codes


def _grey(hu: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    return (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _blended(grey: np.ndarray, codes: np.ndarray) -> np.ndarray:
    colours = np.array(list(PALETTE.values()), dtype=np.float32)[codes]
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


def _tiled(frames: list[Any], columns: int) -> np.ndarray:
    height, width = frames[0].shape
    rows = -(-len(frames) // columns)
    tiles = np.zeros((rows * height, columns * width), dtype=np.uint8)
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        tiles[row * height : (row + 1) * height, column * width : (column + 1) * width] = frame
    return tiles


def _palette_image(codes: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", codes.shape[::-1], codes.tobytes())
    image.putpalette([channel for colour in PALETTE.values() for channel in colour[:3]])
    return image


def _alphas() -> bytes:
    return bytes(colour[3] for colour in PALETTE.values())


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
