"""Read a DICOM series as a volume: `read_dicom_scan(DicomScan(...))`.

    paths -> files -> headers -> stacks -> one stack -> order and grid -> pixels

The voxels are written into one array of the final size; beside it, memory holds the headers and
two frames.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.dicom_files import DicomFile, open_dicom_files
from liverseg_dist.data.io.dicom_geometry import (
    SAME_POSITION_MM,
    GeometryError,
    SlicePlan,
    plan_slices,
)
from liverseg_dist.data.io.dicom_headers import DicomDamaged, FileHeader, read_file_header
from liverseg_dist.data.io.dicom_pixels import check_pixels, read_frames, rescale
from liverseg_dist.data.io.dicom_stacks import (
    Slice,
    Stack,
    choose_stack,
    keep_slices,
    list_stacks,
    order_along_normal,
)
from liverseg_dist.data.io.nifti import ScanFile
from liverseg_dist.data.io.voxel_buffer import ImageBuffer
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256
from liverseg_dist.optional_packages import require_dicom
from liverseg_dist.volume import Volume


@dataclass(frozen=True)
class DicomScan:
    """A DICOM source that stands for one scan.

    Attributes:
        paths: folders, ZIPs or files.
        name: name of the scan in results and messages (`dicom_names`); never a path.
        series: selects one of several series (`dicom_stacks.choose_stack`).
        fill_gaps: interpolate missing slices instead of refusing the scan.
        patient: pseudonym of the patient, the same for all scans of one; "" if not known.
    """

    paths: tuple[Path, ...]
    name: str
    series: str = ""
    fill_gaps: bool = False
    patient: str = ""


@dataclass(frozen=True)
class ReadHeaders:
    """The headers of a source.

    Attributes:
        headers: of the files that are DICOM and readable.
        damaged: reasons of files that are not.
        other_files: number of files that are not DICOM.
    """

    headers: tuple[FileHeader, ...]
    damaged: tuple[str, ...]
    other_files: int = 0


@dataclass(frozen=True)
class OpenSeries:
    """The chosen stack of a source with its grid, while the files are open."""

    stack: Stack
    plan: SlicePlan
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ordered(self) -> list[Slice]:
        """The frames by position."""
        return [self.stack.slices[index] for index in self.plan.order]


def read_headers(files: Sequence[DicomFile]) -> ReadHeaders:
    """Read the headers of all DICOM files. Damaged files do not stop the others."""
    headers, damaged = [], []
    other = 0
    for file in files:
        if not file.is_dicom:
            other += 1
            continue
        try:
            headers.append(read_file_header(file))
        except (DicomDamaged, ScanFileError) as error:
            damaged.append(f"{file.label}: {error}")
        except OSError as error:
            damaged.append(f"{file.label}: {error.strerror or 'not readable'}")
    return ReadHeaders(tuple(headers), tuple(damaged), other)


def list_source_stacks(scan: DicomScan) -> tuple[list[Stack], ReadHeaders]:
    """All stacks of a source, and its headers. Raises `ScanFileError` if it has no image."""
    require_dicom()
    with open_dicom_files(scan.paths, scan.name) as files:
        read = read_headers(files)
        return _list_stacks(scan, read), read


def _list_stacks(scan: DicomScan, read: ReadHeaders) -> list[Stack]:
    stacks = list_stacks(read.headers)
    if stacks:
        return stacks
    if read.damaged:
        reason = f"{len(read.damaged)} damaged DICOM file(s), no readable one; {read.damaged[0]}"
        raise ScanFileError(scan.name, "dicom_damaged", reason)
    if read.headers:
        reason = (
            f"{len(read.headers)} DICOM file(s), but no CT or MR images (localizers, reports and "
            "segmentations are not scans)"
        )
        raise ScanFileError(scan.name, "dicom_no_images", reason)
    reason = f"no DICOM file among {read.other_files} file(s)"
    raise ScanFileError(scan.name, "dicom_none", reason)


@contextmanager
def open_series(scan: DicomScan) -> Iterator[OpenSeries]:
    """Choose the stack of a source and find its grid. The files are open within the block.

    Raises:
        ScanFileError: the source has no volume that can be read; one line gives the reason.
    """
    require_dicom()
    with open_dicom_files(scan.paths, scan.name) as files:
        read = read_headers(files)
        stacks = _list_stacks(scan, read)
        findings: list[Finding] = []
        try:
            stack = choose_stack(stacks, scan.series)
        except UserError as error:
            raise ScanFileError(scan.name, "dicom_ambiguous", str(error)) from None
        if stack.problem:
            raise ScanFileError(scan.name, "dicom_geometry", stack.problem)
        if read.damaged:
            message = f"{len(read.damaged)} damaged file(s) are left out: {read.damaged[0]}"
            findings.append(Finding("warning", "dicom_damaged", message))
        if len(stacks) > 1:
            message = f"one of {len(stacks)} series was read, {stack.describe()}"
            findings.append(Finding("info", "dicom_series", message))
        stack, repeated = _drop_identical(stack, scan)
        findings += repeated
        try:
            for header in {one.file.file.number: one.file for one in stack.slices}.values():
                check_pixels(header)
            plan = plan_slices(
                [one.frame for one in stack.slices],
                stack.first.rows,
                stack.first.columns,
                scan.fill_gaps,
            )
        except GeometryError as error:
            hint = ""
            if error.code == "dicom_gap" and not scan.fill_gaps:
                hint = "; export the series again, or interpolate with --fill-gaps"
            raise ScanFileError(scan.name, error.code, f"{error}{hint}") from None
        except (DicomDamaged, ValueError) as error:
            raise ScanFileError(scan.name, "dicom_pixels", str(error)) from None
        yield OpenSeries(stack, plan, (*findings, *plan.findings))


def _drop_identical(stack: Stack, scan: DicomScan) -> tuple[Stack, list[Finding]]:
    """Keep one of several frames with one position and the same pixels."""
    order, along = order_along_normal(stack.slices)
    kept = [int(order[0])]
    for before, here in zip(range(len(order)), range(1, len(order)), strict=False):
        number = int(order[here])
        if along[here] - along[before] > SAME_POSITION_MM:
            kept.append(number)
        elif not _have_same_pixels(stack.slices[kept[-1]], stack.slices[number], scan):
            reason = (
                "several different images at one position (phases or echoes in one series?); give "
                "the files of one volume"
            )
            raise ScanFileError(scan.name, "dicom_repeated", reason)
    dropped = len(order) - len(kept)
    if not dropped:
        return stack, []
    message = f"{dropped} image(s) are there twice; one of each was read"
    return keep_slices(stack, sorted(kept)), [Finding("info", "dicom_repeated", message)]


def _have_same_pixels(one: Slice, other: Slice, scan: DicomScan) -> bool:
    a, b = one.frame, other.frame
    if (a.slope, a.intercept) != (b.slope, b.intercept):
        return False
    try:
        (first,), (second,) = (list(read_frames([part])) for part in (one, other))
    except (DicomDamaged, OSError) as error:
        raise ScanFileError(scan.name, "dicom_pixels", _describe(other, error)) from None
    return bool(np.array_equal(first, second))


def read_dicom_scan(scan: DicomScan) -> ScanFile:
    """Read a DICOM source as int16 or float32 voxels (z, y, x), HU for CT.

    z ascends along the normal of the slices, y and x are rows and columns.

    Raises:
        ScanFileError: there is no volume that can be read; the message has neither paths nor
            values that identify a patient.
    """
    with open_series(scan) as series:
        grid = series.plan.grid
        try:
            buffer = ImageBuffer(int(np.prod(grid.shape, dtype=np.int64)))
            for values in _fill_slices(series, scan):
                buffer.append(values.reshape(-1))
        except MemoryError:
            reason = "does not fit into memory"
            raise ScanFileError(scan.name, "too_large", reason) from None
        volume = Volume(buffer.voxels.reshape(grid.shape), grid)
        # The type of the result: rescaling to HU is part of the format, unlike scl_slope in NIfTI.
        stored = volume.voxels.dtype.name
        return ScanFile(volume, series.findings, stored, series.stack.first.modality)


def _fill_slices(series: OpenSeries, scan: DicomScan) -> Iterator[np.ndarray]:
    """The values of each slice of the grid."""
    frames = _read_rescaled(series.ordered, scan)
    position, current = 0, next(frames)
    following: np.ndarray | None = None
    for before, weight in series.plan.sources:
        while position < before:
            current = following if following is not None else next(frames)
            following = None
            position += 1
        if not weight:
            yield current
            continue
        if following is None:
            following = next(frames)
        mixed = (1 - weight) * current.astype(np.float64) + weight * following
        # Interpolated values of an integer scan stay integers, so that it can be int16.
        yield np.rint(mixed) if current.dtype.kind == "i" else mixed


def _read_rescaled(slices: Sequence[Slice], scan: DicomScan) -> Iterator[np.ndarray]:
    frames = read_frames(slices)
    for one in slices:
        try:
            yield rescale(next(frames), one.frame)
        except (DicomDamaged, OSError) as error:
            raise ScanFileError(scan.name, "dicom_pixels", _describe(one, error)) from None


def _describe(one: Slice, error: Exception) -> str:
    reason = (error.strerror or "not readable") if isinstance(error, OSError) else str(error)
    return f"{one.file.file.label}: {reason}"


def hash_dicom_files(scan: DicomScan) -> str:
    """SHA-256 of all files of a source and of how it is read."""
    digest = hashlib.sha256(f"{scan.series}\0{scan.fill_gaps}".encode())
    with open_dicom_files(scan.paths, scan.name) as files:
        paths = dict.fromkeys(file.path for file in files)
    for path in paths:
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()
