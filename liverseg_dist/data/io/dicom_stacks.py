"""Group the images of a source into stacks: sets of parallel frames of one series, one volume each.

A folder may hold several series, and one series several volumes: phases, echoes, two orientations.
`list_stacks` groups them, `choose_stack` takes the one to read:

1. Only CT and MR images count. Localizers, reports, segmentations and screen shots are ignored.
2. Stacks of fewer than `MIN_SLICES` frames are ignored if there is a larger one.
3. With several stacks, those that are derived (ImageType DERIVED: reformatted, projected) are
   ignored if there is an original one.
4. If exactly one stack is left, it is read; otherwise the error lists them, and the option
   `--series` selects one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from liverseg_dist.data.io.dicom_geometry import (
    MIN_SLICES,
    SAME_POSITION_MM,
    GeometryError,
    plane_normal,
)
from liverseg_dist.data.io.dicom_headers import SPLIT_TAGS, FileHeader, FrameHeader
from liverseg_dist.errors import UserError, printable

ORIENTATION_STEP = 1e-3
"""Direction cosines that differ by less belong to one stack."""
MIN_UID_CHARACTERS = 4
MAX_SHOWN = 12
PLANES = ("sagittal", "coronal", "axial")
"""By the largest component of the normal (x, y, z)."""
AXIAL_COSINE = 0.9


@dataclass(frozen=True)
class Slice:
    """One frame with the file that has it."""

    file: FileHeader
    frame: FrameHeader


@dataclass(frozen=True)
class Stack:
    """Parallel frames of one series.

    Attributes:
        label: `3`, or `3.2` for the second stack of series 3. The number is SeriesNumber, or the
            place in the source where that is missing or used twice.
        slices: the frames, in the order of the source.
        problem: why it cannot be read, or an empty text.
    """

    label: str
    slices: tuple[Slice, ...]
    problem: str = ""

    @property
    def first(self) -> FileHeader:
        return self.slices[0].file

    @property
    def is_derived(self) -> bool:
        return "DERIVED" in self.first.image_type

    def describe(self, with_text: bool = False) -> str:
        """One line: `series 3: CT, 120 slices of 512 x 512, 0.78 x 0.78 x 2.5 mm, axial`.

        Args:
            with_text: also SeriesDescription, which may contain the name of a patient.
        """
        file, frame = self.first, self.slices[0].frame
        parts = [file.modality, f"{len(self.slices)} slices of {file.columns} x {file.rows}"]
        if not self.problem and frame.orientation is not None and frame.spacing_mm is not None:
            normal = plane_normal(frame.orientation)
            distance = self._median_distance_mm(normal)
            rows_mm, columns_mm = frame.spacing_mm
            parts.append(f"{columns_mm:.3g} x {rows_mm:.3g} x {distance:.3g} mm")
            axis = int(np.argmax(np.abs(normal)))
            oblique = "" if abs(normal[axis]) > AXIAL_COSINE else "oblique "
            parts.append(oblique + PLANES[axis])
        if self.is_derived:
            parts.append("derived")
        if self.problem:
            parts.append(self.problem)
        if with_text and file.description:
            parts.append(f'"{printable(file.description)}"')
        return f"series {self.label}: {', '.join(parts)}"

    def _median_distance_mm(self, normal: np.ndarray) -> float:
        along = np.sort(np.array([one.frame.position_mm for one in self.slices]) @ normal)
        steps = np.diff(along)
        steps = steps[steps > SAME_POSITION_MM]
        return float(np.median(steps)) if len(steps) else 0.0


def list_stacks(headers: Iterable[FileHeader]) -> list[Stack]:
    """The stacks of CT and MR images, by series number. A multi-frame file that is there twice
    counts once."""
    by_series: dict[str, list[FileHeader]] = {}
    seen: set[str] = set()
    for header in headers:
        if not header.is_image or header.is_localizer:
            continue
        # Copies of classic files are found by their positions, with a finding.
        if len(header.frames) > 1:
            if header.sop_uid in seen:
                continue
            seen.add(header.sop_uid)
        by_series.setdefault(header.series_uid, []).append(header)
    ordered = sorted(by_series.values(), key=_series_key)
    numbers = [files[0].series_number for files in ordered]
    stacks = []
    for place, files in enumerate(ordered, start=1):
        number = files[0].series_number
        label = str(number) if number is not None and numbers.count(number) == 1 else f"#{place}"
        parts = _split_series(files)
        for index, slices in enumerate(parts, start=1):
            own = label if len(parts) == 1 else f"{label}.{index}"
            stacks.append(Stack(own, tuple(slices), _find_problem(slices)))
    return stacks


def _series_key(files: list[FileHeader]) -> tuple[int, str]:
    number = files[0].series_number
    return (1 << 31 if number is None else number, files[0].series_uid)


def _split_series(files: list[FileHeader]) -> list[list[Slice]]:
    """Parallel frames of one size, then by the values that distinguish volumes."""
    clusters: list[list[Slice]] = []
    for file in files:
        for frame in file.frames:
            found = Slice(file, frame)
            for cluster in clusters:
                if _fit_together(cluster[0], found):
                    cluster.append(found)
                    break
            else:
                clusters.append([found])
    parts: list[list[Slice]] = []
    for cluster in clusters:
        parts += _split_by_values(cluster)
    return parts


def _fit_together(one: Slice, other: Slice) -> bool:
    if (one.file.rows, one.file.columns) != (other.file.rows, other.file.columns):
        return False
    for a, b in (
        (one.frame.orientation, other.frame.orientation),
        (one.frame.spacing_mm, other.frame.spacing_mm),
    ):
        if a is None or b is None:
            if a is not b:
                return False
        # Rounded decimals of one plane may differ in the last digit.
        elif max(abs(x - y) for x, y in zip(a, b, strict=True)) > ORIENTATION_STEP:
            return False
    return True


def _split_by_values(slices: list[Slice]) -> list[list[Slice]]:
    """Split frames that share positions by the value that separates them."""
    if _find_problem(slices) or not count_repeated(slices):
        return [slices]
    names = sorted({name for one in slices for name, _ in one.frame.splits})
    candidates: list[tuple[str, ...]] = []
    for name in (*SPLIT_TAGS, "StackID"):
        if name in names:
            candidates.append((name,))
    # All values at once: a series with several echoes at several times.
    candidates.append(tuple(names))
    for wanted in candidates:
        groups: dict[tuple[str, ...], list[Slice]] = {}
        for one in slices:
            values = dict(one.frame.splits)
            groups.setdefault(tuple(values.get(name, "") for name in wanted), []).append(one)
        parts = [groups[key] for key in sorted(groups, key=_value_key)]
        is_clean = all(len(part) >= MIN_SLICES and not count_repeated(part) for part in parts)
        if len(parts) > 1 and is_clean:
            return parts
    return [slices]


def _value_key(values: tuple[str, ...]) -> tuple[tuple[int, float, str], ...]:
    """Numbers in their order, before texts."""
    keys = []
    for value in values:
        try:
            keys.append((0, float(value), ""))
        except ValueError:
            keys.append((1, 0.0, value))
    return tuple(keys)


def order_along_normal(slices: Sequence[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the frames by their position along the normal, and these positions."""
    orientation = slices[0].frame.orientation
    assert orientation is not None
    positions = np.array([one.frame.position_mm for one in slices])
    along = positions @ plane_normal(orientation)
    order = np.argsort(along, kind="stable")
    return order, along[order]


def count_repeated(slices: Sequence[Slice]) -> int:
    """Number of frames at the position of another one."""
    _, along = order_along_normal(slices)
    return int((np.diff(along) <= SAME_POSITION_MM).sum())


def _find_problem(slices: Sequence[Slice]) -> str:
    frames = [one.frame for one in slices]
    if any(frame.position_mm is None for frame in frames):
        return "ImagePositionPatient is missing"
    if any(frame.orientation is None for frame in frames):
        return "ImageOrientationPatient is missing"
    if any(frame.spacing_mm is None for frame in frames):
        return "PixelSpacing is missing"
    try:
        plane_normal(frames[0].orientation or ())
    except (GeometryError, ValueError):
        return "ImageOrientationPatient is not two unit vectors at right angles"
    return ""


class AmbiguousSeries(UserError):
    """Several stacks fit; the message lists them."""


def choose_stack(stacks: Sequence[Stack], selection: str = "") -> Stack:
    """The stack to read, by the rule of the module or by `--series`.

    Args:
        stacks: of the source; at least one.
        selection: label, series number, end of SeriesInstanceUID, or a part of SeriesDescription.

    Raises:
        UserError: none or several fit.
    """
    if selection:
        return _select(stacks, selection)
    left = [stack for stack in stacks if len(stack.slices) >= MIN_SLICES] or list(stacks)
    left = [stack for stack in left if not stack.problem] or left
    left = [stack for stack in left if not stack.is_derived] or left
    if len(left) > 1:
        raise AmbiguousSeries(f"{len(left)} series; select one with --series: {_list(left)}")
    return left[0]


def _select(stacks: Sequence[Stack], selection: str) -> Stack:
    wanted = selection.strip()
    for fits in (
        lambda stack: wanted == stack.label,
        lambda stack: wanted == str(stack.first.series_number),
        lambda stack: len(wanted) >= MIN_UID_CHARACTERS and stack.first.series_uid.endswith(wanted),
        lambda stack: wanted.casefold() in stack.first.description.casefold(),
    ):
        found = [stack for stack in stacks if fits(stack)]
        if len(found) == 1:
            return found[0]
        if found:
            raise AmbiguousSeries(f"--series fits {len(found)} series: {_list(found)}")
    raise UserError(f"--series fits none of the {len(stacks)} series: {_list(stacks)}")


def _list(stacks: Sequence[Stack]) -> str:
    lines = [stack.describe() for stack in stacks[:MAX_SHOWN]]
    rest = f"; and {len(stacks) - MAX_SHOWN} more" if len(stacks) > MAX_SHOWN else ""
    return "; ".join(lines) + rest


def keep_slices(stack: Stack, kept: Iterable[int]) -> Stack:
    """The stack with the frames of these indices."""
    return replace(stack, slices=tuple(stack.slices[index] for index in kept))
