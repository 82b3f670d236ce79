"""Write the mask of a DICOM scan as DICOM: segmentation (SEG), report (SR), outlines (RTSTRUCT).

`predict` calls `write_dicom_results` after it has written the mask. The objects belong to the study
of the source: they carry its patient and study attributes, because a PACS files them by these. Their
file names have the scan's pseudonym only.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist import __version__
from liverseg_dist.clinical.dicom_contours import build_structure_set
from liverseg_dist.clinical.dicom_report import build_report
from liverseg_dist.clinical.dicom_segmentation import (
    Producer,
    SegKind,
    SourceFrames,
    build_segmentation,
)
from liverseg_dist.clinical.quantify import quantify_case
from liverseg_dist.data.io.dicom_series import DicomScan, OpenSeries, open_series, read_dicom_scan
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.files import atomic_write
from liverseg_dist.labels import LabelScheme
from liverseg_dist.optional_packages import (
    WRITERS,
    load_module,
    quiet_pydicom,
    require_packages,
)
from liverseg_dist.texts.uids import derive_uid
from liverseg_dist.volume import Volume

SEG_SUFFIX = ".seg.dcm"
REPORT_SUFFIX = ".sr.dcm"
CONTOUR_SUFFIX = ".rt.dcm"
EMPTY_ATTRIBUTES = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
"""Attributes that a DICOM image must have, at least empty; anonymised images often lack them."""
MODEL_CHARACTERS = 12


@dataclass(frozen=True)
class DicomResults:
    """What is written beside the masks of DICOM scans.

    Attributes:
        kind: encoding of the SEG.
        with_report: whether to write the SR, too.
        model: identifies the weights and settings.
        with_contours: whether to write an RTSTRUCT, too.
    """

    kind: SegKind = "binary"
    with_report: bool = True
    model: str = ""
    with_contours: bool = False

    def list_files(self, out: Path, name: str) -> list[Path]:
        """The files of a scan. A mask without foreground has none of them."""
        files = [out / f"{name}{SEG_SUFFIX}"]
        if self.with_report:
            files.append(out / f"{name}{REPORT_SUFFIX}")
        if self.with_contours:
            files.append(out / f"{name}{CONTOUR_SUFFIX}")
        return files


def write_dicom_results(
    scan: DicomScan,
    mask: Volume,
    labels: LabelScheme,
    out: Path,
    options: DicomResults,
    probabilities: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write the SEG of a mask, and on request its SR and RTSTRUCT.

    Args:
        scan: the source.
        mask: class values on the grid that `read_dicom_scan` returns.
        labels: what they mean.
        out: folder; the files are called after the scan.
        options: what to write.
        probabilities: by structure, for a fractional SEG.

    Returns:
        The files; none for a mask without foreground, which has nothing to refer to.

    Raises:
        UserError: the packages are not installed.
        RunFailed: the source lacks what the objects need.
    """
    require_packages(WRITERS)
    files = options.list_files(out, scan.name)
    for file in files:
        # Files of an earlier mask must not stay beside the new one.
        file.unlink(missing_ok=True)
    try:
        with open_series(scan) as series:
            source = _read_source(series)
            key = _make_key(series, mask, options)
        producer = Producer(__version__, options.model[:MODEL_CHARACTERS])
        built = build_segmentation(
            mask, labels, source, producer, key, options.kind, dict(probabilities or {})
        )
        if built is None:
            return []
        segmentation, segments = built
        # The report refers to the segmentation, so that comes first.
        written = [segmentation]
        if options.with_report:
            image = read_dicom_scan(scan).volume
            quantities = quantify_case(mask, labels, image)
            written.append(
                build_report(
                    segmentation, segments, quantities, labels, source.datasets, producer, key
                )
            )
        if options.with_contours:
            written.append(build_structure_set(mask, labels, source, producer, key))
        for dataset, file in zip(written, files, strict=True):
            _save(dataset, file)
    except (UserError, OSError, MemoryError):
        raise
    # highdicom refuses sources that lack attributes with many types of error. Their texts may
    # quote values of the source.
    except Exception as error:
        raise RunFailed(
            f"{scan.name}: the mask cannot be written as DICOM ({type(error).__name__}: the source "
            "lacks attributes or has invalid ones); --dicom-results none writes NIfTI alone"
        ) from error
    return files


def _read_source(series: OpenSeries) -> SourceFrames:
    """The source images without pixels, and the slice of the mask that each frame is."""
    slice_of = {}
    for at, (place, weight) in enumerate(series.plan.sources):
        if not weight:
            slice_of[place] = at
    ordered = series.ordered
    files = {one.file.file.number: one.file for one in ordered}
    if len(files) == len(ordered):
        datasets = [_read_dataset(one.file.file) for one in ordered]
        places = range(len(ordered))
        return SourceFrames(tuple(datasets), tuple(slice_of.get(place) for place in places))
    if len(files) > 1:
        raise ValueError("frames of several multi-frame files")
    (file,) = files.values()
    slices: list[int | None] = [None] * len(file.frames)
    for place, one in enumerate(ordered):
        slices[one.frame.frame] = slice_of.get(place)
    return SourceFrames((_read_dataset(file.file),), tuple(slices))


def _read_dataset(file: Any) -> Any:
    pydicom = load_module("pydicom")
    with quiet_pydicom(), file.open() as stream:
        dataset = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
        for keyword in EMPTY_ATTRIBUTES:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
        if not dataset.get("FrameOfReferenceUID"):
            dataset.FrameOfReferenceUID = derive_uid("frame", dataset.SeriesInstanceUID)
    return dataset


def _make_key(series: OpenSeries, mask: Volume, options: DicomResults) -> str:
    """Text that the UIDs follow from: the same mask of the same series gives the same objects."""
    digest = hashlib.sha256(np.ascontiguousarray(mask.voxels).data)
    return f"{series.stack.first.series_uid} {options.model} {options.kind} {digest.hexdigest()}"


def _save(dataset: Any, file: Path) -> None:
    with quiet_pydicom(), atomic_write(file) as stream:
        dataset.save_as(stream, enforce_file_format=True)
