"""Pictures of lesions: a slice as JPEG, and outlines and diameters as vector paths in millimetres
on top of it.

Radiological display: the patient's right is on the left of the picture, the front is up. Paths
follow the mask's pixels, so that a page shows exactly what was measured.
"""

import base64
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.clinical.quantify import LesionQuantities
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Volume

CT_WINDOW_HU = (-110.0, 190.0)
CT_AIR_HU = -150.0
"""An image with values this low is taken for a CT and shown in the liver's window; others by their
percentiles."""
PERCENTILES = (1.0, 99.0)
MARGIN_MM = 30.0
LEAST_SIDE_MM = 110.0
MAX_SIDE_PX = 360
JPEG_QUALITY = 60
_DATA_URI = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}")
_PATH = re.compile(r"[MHV0-9 .]*")


def draw_lesion(
    mask: Volume, scheme: LabelScheme, lesion: LesionQuantities, image: Volume | None = None
) -> dict[str, Any]:
    """The slice on which a lesion's axes were measured, cut to the lesion and its surroundings.

    Args:
        mask: Labels in canonical orientation (`Volume.reoriented`).
        scheme: What the labels mean.
        lesion: Measured on this mask.
        image: The scan in canonical orientation, or None.

    Returns:
        JSON-able: size in mm, `image` (data URI or None), paths `organ`, `lesion` and `others`
        (other lesions) and the ends of `long` and `short` axis as x1, y1, x2, y2, all in mm from
        the upper left corner.
    """
    index = round(lesion.axes_zyx[0][0])
    structure = scheme.structure(lesion.structure)
    labels = mask.voxels[index]
    window = _window_yx(lesion, mask)
    crop = labels[window]
    whole = scheme.mask_of(crop, structure)
    own = _own_component(lesion, whole, window)
    organ = (
        scheme.mask_of(crop, structure.inside)
        if structure.inside is not None
        else np.zeros_like(own)
    )
    to_picture = _Picture(window, crop.shape, (mask.spacing_mm[1], mask.spacing_mm[2]))
    ends = [to_picture.point(y, x) for _, y, x in lesion.axes_zyx]
    return {
        "width_mm": round(to_picture.width_mm, 2),
        "height_mm": round(to_picture.height_mm, 2),
        "image": None if image is None else _jpeg(image.voxels[index], window, to_picture),
        "organ": to_picture.outline(organ),
        "lesion": to_picture.outline(own),
        "others": to_picture.outline(whole & ~own),
        "long": [round(v, 2) for end in ends[:2] for v in end],
        "short": [round(v, 2) for end in ends[2:] for v in end],
        "slice": index,
    }


def is_picture(picture: object) -> bool:
    """Whether a stored picture holds what `draw_lesion` writes: it ends up inside a web page, so
    nothing else may."""
    if not isinstance(picture, Mapping):
        return False
    try:
        numbers = [
            picture["width_mm"],
            picture["height_mm"],
            *picture["long"],
            *picture["short"],
            picture["slice"],
        ]
        paths = [picture["organ"], picture["lesion"], picture["others"]]
        image = picture["image"]
        return (
            # 4 + 4 ends of the axes, 2 sides, 1 slice.
            len(numbers) == 11
            and all(isinstance(number, (int, float)) for number in numbers)
            and all(_PATH.fullmatch(path) for path in paths)
            and (image is None or _DATA_URI.fullmatch(image) is not None)
        )
    except (KeyError, TypeError):
        return False


class _Picture:
    """Coordinates of a picture: rows from front to back, columns from the patient's right to
    left."""

    def __init__(
        self, window: tuple[slice, slice], shape: tuple[int, ...], spacing_yx: tuple[float, float]
    ) -> None:
        self.window, self.shape, self.spacing_yx = window, shape, spacing_yx
        self.height_mm, self.width_mm = shape[0] * spacing_yx[0], shape[1] * spacing_yx[1]

    def point(self, y: float, x: float) -> tuple[float, float]:
        """(x, y) in mm of a position in voxel indices of the scan's slice."""
        from_right = self.window[1].stop - 0.5 - x
        from_front = self.window[0].stop - 0.5 - y
        return from_right * self.spacing_yx[1], from_front * self.spacing_yx[0]

    def outline(self, mask_yx: np.ndarray) -> str:
        """SVG path of the borders between pixels of the mask and others; the picture's edge is no
        border."""
        # Radiological view: the right side of the patient is on the left.
        shown = mask_yx[::-1, ::-1]
        dy, dx = self.spacing_yx
        parts = []
        for row, first, last in _border_runs(shown):
            parts.append(f"M{first * dx:.2f} {row * dy:.2f}H{last * dx:.2f}")
        for column, first, last in _border_runs(shown.T):
            parts.append(f"M{column * dx:.2f} {first * dy:.2f}V{last * dy:.2f}")
        return "".join(parts)


def _border_runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(border, first, last): runs of adjoining pixel edges between each row and the next."""
    runs = []
    borders = mask[1:] != mask[:-1]
    for row in np.flatnonzero(borders.any(axis=1)):
        # Padded, so that a run at the edge of the picture has both ends.
        steps = np.diff(np.pad(borders[row].astype(np.int8), 1))
        starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        runs += [(int(row) + 1, int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
    return runs


def _window_yx(lesion: LesionQuantities, mask: Volume) -> tuple[slice, slice]:
    """The lesion's box in its slice with a margin, at least `LEAST_SIDE_MM` wide and nearly
    square."""
    spacing = mask.spacing_mm[1:]
    sides = [
        (stop - start) * mm + 2 * MARGIN_MM
        for (start, stop), mm in zip(lesion.box[1:], spacing, strict=True)
    ]
    side_mm = max(LEAST_SIDE_MM, *sides)
    slices = []
    for (start, stop), mm, size in zip(lesion.box[1:], spacing, mask.shape[1:], strict=True):
        half, middle = side_mm / mm / 2, (start + stop) / 2
        low = max(0, round(middle - half))
        slices.append(slice(low, max(low + 1, min(size, round(middle + half)))))
    return slices[0], slices[1]


def _own_component(
    lesion: LesionQuantities, whole: np.ndarray, window: tuple[slice, slice]
) -> np.ndarray:
    """Pixels of the structure inside the lesion's box; of a neighbour within that box, too, a part
    may be shown."""
    own = np.zeros_like(whole)
    rows, columns = (
        slice(max(0, start - axis.start), max(0, stop - axis.start))
        for (start, stop), axis in zip(lesion.box[1:], window, strict=True)
    )
    own[rows, columns] = whole[rows, columns]
    return own


def _jpeg(whole_slice: np.ndarray, window: tuple[slice, slice], picture: _Picture) -> str:
    # Of the whole slice: a crop without air would not be recognised as CT, and the pictures of two
    # dates would have different windows.
    low, high = grey_window(whole_slice)
    pixels = whole_slice[window]
    scaled = np.clip((pixels.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    # NaN has no grey value; without the replacement the cast is undefined.
    grey = Image.fromarray((np.nan_to_num(scaled) * 255).astype(np.uint8)[::-1, ::-1])
    # At most 4 pixels per mm: more shows no detail and makes the page large.
    scale = min(MAX_SIDE_PX / max(picture.width_mm, picture.height_mm), 4.0)
    size = max(1, round(picture.width_mm * scale)), max(1, round(picture.height_mm * scale))
    stream = io.BytesIO()
    grey.resize(size, Image.Resampling.BICUBIC).save(
        stream, "JPEG", quality=JPEG_QUALITY, optimize=True
    )
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def grey_window(pixels: np.ndarray) -> tuple[float, float]:
    """Values shown black and white."""
    if pixels.size and np.nanmin(pixels) <= CT_AIR_HU:
        return CT_WINDOW_HU
    low, high = np.nanpercentile(pixels, PERCENTILES) if pixels.size else (0.0, 1.0)
    return float(low), float(high)


def draw_position(
    mask: Volume,
    scheme: LabelScheme,
    structure_name: str,
    centre_mm: np.ndarray,
    side_mm: float,
    image: Volume | None = None,
    lesion: LesionQuantities | None = None,
) -> dict[str, Any] | None:
    """A square of an axial slice around a position, such as the place where a lesion was at another
    date.

    Args:
        mask: Labels in canonical orientation.
        scheme: What they mean.
        structure_name: The lesion structure to outline.
        centre_mm: Position (3,) in the scan's world, RAS+.
        side_mm: Length of the square's sides.
        image: The scan, or None.
        lesion: The lesion there: its slice is shown, with its axes.

    Returns:
        As `draw_lesion`; None where the position lies outside the scan.
    """
    z, y, x = mask.grid.index_of(centre_mm)
    if lesion is not None:
        z = lesion.axes_zyx[0][0]
        # The box ends behind the last voxel, so the middle is half a voxel lower.
        y, x = np.mean(lesion.box[1:], axis=1) - 0.5
    index = round(float(z))
    slices = []
    for middle, mm, size in zip((y, x), mask.spacing_mm[1:], mask.shape[1:], strict=True):
        low, high = round(middle - side_mm / mm / 2), round(middle + side_mm / mm / 2)
        slices.append(slice(max(0, low), min(size, high)))
    if not 0 <= index < mask.shape[0] or any(axis.stop - axis.start < 2 for axis in slices):
        return None
    window = slices[0], slices[1]
    structure = scheme.structure(structure_name)
    crop = mask.voxels[index][window]
    whole = scheme.mask_of(crop, structure)
    own = np.zeros_like(whole) if lesion is None else _own_component(lesion, whole, window)
    organ = (
        scheme.mask_of(crop, structure.inside)
        if structure.inside is not None
        else np.zeros_like(own)
    )
    picture = _Picture(window, crop.shape, (mask.spacing_mm[1], mask.spacing_mm[2]))
    ends = (
        [] if lesion is None else [picture.point(row, column) for _, row, column in lesion.axes_zyx]
    )
    return {
        "width_mm": round(picture.width_mm, 2),
        "height_mm": round(picture.height_mm, 2),
        "image": None if image is None else _jpeg(image.voxels[index], window, picture),
        "organ": picture.outline(organ),
        "lesion": picture.outline(own),
        "others": picture.outline(whole & ~own),
        "long": [round(v, 2) for end in ends[:2] for v in end],
        "short": [round(v, 2) for end in ends[2:] for v in end],
        "slice": index,
    }
