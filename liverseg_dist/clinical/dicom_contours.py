"""Build a DICOM structure set (RTSTRUCT) of a mask: outlines on the slices of the source series.

Outlines follow the edges of the voxels, so that a reader that fills them gets the mask back voxel by
voxel. Holes are contours of their own within the outer one (even-odd rule). Slices that were
interpolated have no source image and no contour.
"""

import datetime
from collections.abc import Iterator
from typing import Any

import numpy as np

from liverseg_dist.clinical.dicom_segmentation import (
    MANUFACTURER,
    SERIES_NUMBER,
    Producer,
    Segment,
    SourceFrames,
    list_segments,
    select_segment,
)
from liverseg_dist.labels import LabelScheme
from liverseg_dist.optional_packages import load_module, quiet_pydicom
from liverseg_dist.pages.palette import structure_colours
from liverseg_dist.texts.uids import derive_uid
from liverseg_dist.volume import Volume

STRUCTURE_SET_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
COPIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
    "ReferringPhysicianName",
)  # fmt: skip
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
Corner = tuple[int, int]


def trace_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines of a mask (rows, columns) along the edges of its pixels.

    Returns:
        For each outline its corners (n, 2) as row and column; pixel centres are whole numbers.
        Pixels that touch at a corner only have outlines of their own.
    """
    following = _link_edges(np.pad(mask.astype(bool), 1))
    outlines = []
    while following:
        start = next(iter(following))
        first = following[start][0]
        is_shared = len(following[start]) > 1
        corner, end = start, first
        direction: Corner = (0, 0)
        corners: list[Corner] = []
        while True:
            following[corner].remove(end)
            if not following[corner]:
                del following[corner]
            step = (end[0] - corner[0], end[1] - corner[1])
            if step != direction:
                corners.append(corner)
            corner, direction = end, step
            # Where two pixels touch at a corner, the turn to the right stays at the same pixel.
            turned = (corner[0] + direction[1], corner[1] - direction[0])
            if corner == start and (not is_shared or turned == first):
                break
            ends = following[corner]
            end = turned if len(ends) > 1 and turned in ends else ends[0]
        # Corner k of the padded array is half a pixel before pixel k - 1.
        outlines.append(np.array(corners, dtype=float) - 1.5)
    return outlines


def _link_edges(padded: np.ndarray) -> dict[Corner, list[Corner]]:
    """End corners of the edges that start at each corner, with the mask to their right."""
    above, below = padded[:-1], padded[1:]
    left, right = padded[:, :-1], padded[:, 1:]
    edges: tuple[tuple[np.ndarray, Corner, Corner], ...] = (
        (below & ~above, (1, 0), (1, 1)),
        (above & ~below, (1, 1), (1, 0)),
        (right & ~left, (1, 1), (0, 1)),
        (left & ~right, (0, 1), (1, 1)),
    )
    following: dict[Corner, list[Corner]] = {}
    for is_edge, start, end in edges:
        for row, column in np.argwhere(is_edge).tolist():
            begin = (row + start[0], column + start[1])
            following.setdefault(begin, []).append((row + end[0], column + end[1]))
    return following


def build_structure_set(
    mask: Volume, scheme: LabelScheme, source: SourceFrames, producer: Producer, key: str
) -> Any | None:
    """The RTSTRUCT as a pydicom data set, with the segments of the SEG; None for an empty mask."""
    pydicom = load_module("pydicom")
    segments, lesions = list_segments(mask, scheme, key)
    if not segments:
        return None
    first = source.datasets[0]
    with quiet_pydicom():
        dataset = _start(first, producer, key)
        dataset.ReferencedFrameOfReferenceSequence = [_refer_to_series(source)]
        rois, contours, observations = [], [], []
        for segment in segments:
            roi = pydicom.Dataset()
            roi.ROINumber = segment.number
            roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
            roi.ROIName = segment.label
            roi.ROIGenerationAlgorithm = "AUTOMATIC"
            rois.append(roi)
            item = pydicom.Dataset()
            item.ROIDisplayColor = list(structure_colours(scheme)[segment.structure.name])
            item.ReferencedROINumber = segment.number
            item.ContourSequence = list(_build_contours(segment, lesions, mask, scheme, source))
            contours.append(item)
            observation = pydicom.Dataset()
            observation.ObservationNumber = observation.ReferencedROINumber = segment.number
            is_organ = segment.structure.kind == "organ"
            observation.RTROIInterpretedType = "ORGAN" if is_organ else ""
            observation.ROIInterpreter = ""
            observations.append(observation)
        dataset.StructureSetROISequence = rois
        dataset.ROIContourSequence = contours
        dataset.RTROIObservationsSequence = observations
    return dataset


def _start(source: Any, producer: Producer, key: str) -> Any:
    pydicom = load_module("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE_ENDIAN
    dataset.file_meta.MediaStorageSOPClassUID = STRUCTURE_SET_CLASS
    dataset.file_meta.MediaStorageSOPInstanceUID = derive_uid("rtstruct", key)
    for keyword in COPIED:
        if keyword in source:
            dataset[keyword] = source[keyword]
    now = datetime.datetime.now()
    dataset.SOPClassUID = STRUCTURE_SET_CLASS
    dataset.SOPInstanceUID = derive_uid("rtstruct", key)
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesInstanceUID = derive_uid("rtstruct series", key)
    dataset.SeriesNumber = SERIES_NUMBER + 2
    dataset.SeriesDescription = "Automatic contours"
    dataset.OperatorsName = ""
    dataset.InstanceNumber = 1
    dataset.FrameOfReferenceUID = source.FrameOfReferenceUID
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions = producer.full_version
    dataset.StructureSetLabel = "SEGMENTATION"
    dataset.StructureSetDate = now.strftime("%Y%m%d")
    dataset.StructureSetTime = now.strftime("%H%M%S")
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _refer_to_image(dataset: Any, frame: int | None = None) -> Any:
    item = load_module("pydicom").Dataset()
    item.ReferencedSOPClassUID = dataset.SOPClassUID
    item.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    if frame is not None:
        item.ReferencedFrameNumber = frame
    return item


def _refer_to_series(source: SourceFrames) -> Any:
    pydicom = load_module("pydicom")
    first = source.datasets[0]
    series = pydicom.Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ContourImageSequence = [_refer_to_image(dataset) for dataset in source.datasets]
    study = pydicom.Dataset()
    study.ReferencedSOPClassUID = STUDY_CLASS
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = pydicom.Dataset()
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _build_contours(
    segment: Segment,
    lesions: dict[str, np.ndarray],
    mask: Volume,
    scheme: LabelScheme,
    source: SourceFrames,
) -> Iterator[Any]:
    pydicom = load_module("pydicom")
    for number, at in enumerate(source.slices):
        if at is None:
            continue
        for outline in trace_outlines(select_segment(segment, at, lesions, mask, scheme)):
            index = np.column_stack([np.full(len(outline), at), outline])
            points = mask.grid.world_mm(index) * RAS_TO_LPS
            contour = pydicom.Dataset()
            image = source.datasets[0 if source.is_multi_frame else number]
            frame = number + 1 if source.is_multi_frame else None
            contour.ContourImageSequence = [_refer_to_image(image, frame)]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(points)
            # A thousandth of a millimetre fits the 16 characters of a decimal string.
            contour.ContourData = [f"{value:.3f}" for value in points.reshape(-1)]
            yield contour
