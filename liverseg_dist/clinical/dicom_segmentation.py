"""Build a DICOM segmentation (SEG) of a mask on the frames of its source series.

A segment for each organ, and one for each lesion (a connected component) with a tracking id and UID,
so that a lesion can be followed in other reports. Lesions are numbered as in `clinical.quantify`.
The frames of the SEG lie on those of the source, one by one: tilted series and series with missing
slices need no resampling. Slices that were interpolated have no source and no frame.

Memory: only the pages of the stacked array that have foreground are used, because the array starts
as zeros and each segment is contiguous in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.ndimage import find_objects

from liverseg_dist.clinical.components import find_components
from liverseg_dist.clinical.dicom_codes import category_of, site_of, type_of
from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.optional_packages import load_module, quiet_pydicom
from liverseg_dist.pages.palette import structure_colours
from liverseg_dist.texts.uids import derive_uid
from liverseg_dist.volume import Volume

SegKind = Literal["binary", "labelmap", "fractional"]
SEG_KINDS: tuple[SegKind, ...] = ("binary", "labelmap", "fractional")
MAX_LESION_SEGMENTS = 100
"""Further lesions, the smallest ones, share one segment."""
SERIES_NUMBER = 900
"""Number of the new series; the report has the next one."""
MANUFACTURER = "liverseg_dist"


@dataclass(frozen=True)
class Producer:
    """What made the mask, for the algorithm identification.

    Attributes:
        version: version of this package.
        model: identifies the weights, such as the first digits of their checksum.
    """

    version: str
    model: str

    @property
    def full_version(self) -> str:
        return f"{self.version} {self.model}"[:64]


@dataclass(frozen=True)
class Segment:
    """One segment.

    Attributes:
        number: from 1.
        structure: of the label scheme.
        label: name of the structure; for lesions with their number.
        lesion: number of the lesion, None for an organ and for the segment of further lesions.
        tracking_uid: the same for the same mask of the same series.
    """

    number: int
    structure: Structure
    label: str
    lesion: int | None
    tracking_uid: str


@dataclass(frozen=True)
class SourceFrames:
    """Where the slices of a mask are in the source series.

    Attributes:
        datasets: source images without pixels; one for each slice, or a single multi-frame one.
        slices: for each data set (or frame of the single one), the slice of the mask, or None.
    """

    datasets: tuple[Any, ...]
    slices: tuple[int | None, ...]

    @property
    def is_multi_frame(self) -> bool:
        return len(self.datasets) == 1 and len(self.slices) > 1

    def limited_to(self, wanted: set[int]) -> "SourceFrames":
        """The classic images of the wanted slices; a multi-frame image is kept as it is."""
        if self.is_multi_frame:
            return self
        kept = [number for number, at in enumerate(self.slices) if at in wanted]
        # An empty mask still needs a frame of reference.
        kept = kept or [0]
        return SourceFrames(
            tuple(self.datasets[number] for number in kept),
            tuple(self.slices[number] for number in kept),
        )


def number_lesions(mask: Volume, scheme: LabelScheme, structure: Structure) -> np.ndarray:
    """Lesion numbers (uint32, z, y, x of the mask), as in `clinical.quantify`."""
    numbers = np.zeros(mask.shape, dtype=np.uint32)
    view = Volume(numbers, mask.grid).reoriented().voxels
    whole = scheme.mask_of(mask.reoriented().voxels, structure)
    for component in find_components(whole):
        view[component.box][component.mask_zyx] = component.number
    return numbers


def list_segments(
    mask: Volume, scheme: LabelScheme, key: str
) -> tuple[list[Segment], dict[str, np.ndarray]]:
    """The segments of a mask that have voxels, and the lesion numbers of each lesion structure.

    Args:
        mask: class values.
        scheme: what they mean.
        key: text that the tracking UIDs follow from.
    """
    segments: list[Segment] = []
    lesions: dict[str, np.ndarray] = {}

    def add(structure: Structure, label: str, lesion: int | None) -> None:
        number = len(segments) + 1
        uid = derive_uid("tracking", key, structure.name, label)
        segments.append(Segment(number, structure, label[:64], lesion, uid))

    for structure in scheme.structures:
        if structure.kind == "organ":
            if scheme.mask_of(mask.voxels, structure).any():
                add(structure, structure.name, None)
            continue
        lesions[structure.name] = number_lesions(mask, scheme, structure)
        count = int(lesions[structure.name].max(initial=0))
        for number in range(1, min(count, MAX_LESION_SEGMENTS) + 1):
            add(structure, f"{structure.name} {number}", number)
        if count > MAX_LESION_SEGMENTS:
            add(structure, f"{structure.name}, {count - MAX_LESION_SEGMENTS} more", None)
    return segments, lesions


def build_segmentation(
    mask: Volume,
    scheme: LabelScheme,
    source: SourceFrames,
    producer: Producer,
    key: str,
    kind: SegKind = "binary",
    probabilities: dict[str, np.ndarray] | None = None,
) -> tuple[Any, list[Segment]] | None:
    """The SEG as a pydicom data set, and its segments; None for a mask without foreground.

    Args:
        mask: class values on the grid of the series.
        scheme: what they mean.
        source: the images of the series.
        producer: what made the mask.
        key: text that all UIDs follow from.
        kind: `binary`; `labelmap` (segments may not overlap, so organs lack their lesions); or
            `fractional`: the probability of each structure.
        probabilities: by structure (z, y, x), for `fractional`.
    """
    highdicom = load_module("highdicom")
    segments, lesions = list_segments(mask, scheme, key)
    if kind == "fractional":
        segments = [
            _whole_structure(one, number, key) for number, one in enumerate(scheme.structures, 1)
        ]
    if not segments:
        return None
    frames = source.limited_to(set(np.flatnonzero(mask.voxels.any(axis=(1, 2))).tolist()))
    if kind == "fractional":
        frames = source
        pixels = _stack_probabilities(segments, probabilities or {}, frames)
    elif kind == "labelmap":
        pixels = _paint_labels(segments, lesions, mask, scheme, frames)
    else:
        pixels = _stack_segments(segments, lesions, mask, scheme, frames)
    with quiet_pydicom():
        segmentation = highdicom.seg.Segmentation(
            source_images=list(frames.datasets),
            pixel_array=pixels,
            segmentation_type=kind.upper(),
            segment_descriptions=[
                _describe_segment(segment, scheme, producer) for segment in segments
            ],
            series_instance_uid=derive_uid("seg series", key, kind),
            series_number=SERIES_NUMBER,
            sop_instance_uid=derive_uid("seg", key, kind),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=producer.full_version,
            device_serial_number="1",
            content_description="Automatic segmentation",
            content_creator_name=f"{MANUFACTURER}^Automatic",
            content_label="SEGMENTATION",
            series_description="Automatic segmentation",
        )
    return segmentation, segments


def _whole_structure(structure: Structure, number: int, key: str) -> Segment:
    uid = derive_uid("tracking", key, structure.name, "probability")
    return Segment(number, structure, structure.name, None, uid)


def select_segment(
    segment: Segment, at: int, lesions: dict[str, np.ndarray], mask: Volume, scheme: LabelScheme
) -> np.ndarray:
    """Voxels of a segment in a slice of the mask."""
    if segment.structure.kind == "organ":
        return scheme.mask_of(mask.voxels[at], segment.structure)
    numbers = lesions[segment.structure.name][at]
    if segment.lesion is None:
        return np.asarray(numbers > MAX_LESION_SEGMENTS)
    return np.asarray(numbers == segment.lesion)


def _stack_segments(
    segments: Sequence[Segment],
    lesions: dict[str, np.ndarray],
    mask: Volume,
    scheme: LabelScheme,
    frames: SourceFrames,
) -> np.ndarray:
    """(frame, row, column, segment), 0 and 1."""
    stacked = np.zeros((len(segments), len(frames.slices), *mask.shape[1:]), dtype=np.uint8)
    boxes = {name: find_objects(numbers) for name, numbers in lesions.items()}
    for row, segment in zip(stacked, segments, strict=True):
        box = None
        if segment.lesion is not None:
            box = boxes[segment.structure.name][segment.lesion - 1]
        for target, at in zip(row, frames.slices, strict=True):
            # Most lesions are in few slices.
            if at is None or (box is not None and not box[0].start <= at < box[0].stop):
                continue
            found = select_segment(segment, at, lesions, mask, scheme)
            # Writing zeros would use the memory that the docstring of the module saves.
            if found.any():
                target[found] = 1
    return stacked.transpose(1, 2, 3, 0)


def _paint_labels(
    segments: Sequence[Segment],
    lesions: dict[str, np.ndarray],
    mask: Volume,
    scheme: LabelScheme,
    frames: SourceFrames,
) -> np.ndarray:
    """(frame, row, column) with segment numbers; containers first, then what they contain."""
    labels = np.zeros((len(frames.slices), *mask.shape[1:]), dtype=np.uint16)
    ordered = sorted(segments, key=lambda one: -len(one.structure.values))
    for target, at in zip(labels, frames.slices, strict=True):
        if at is not None:
            for segment in ordered:
                target[select_segment(segment, at, lesions, mask, scheme)] = segment.number
    return labels


def _stack_probabilities(
    segments: Sequence[Segment], probabilities: dict[str, np.ndarray], frames: SourceFrames
) -> np.ndarray:
    shape = next(iter(probabilities.values())).shape
    stacked = np.zeros((len(frames.slices), *shape[1:], len(segments)), dtype=np.float32)
    for index, segment in enumerate(segments):
        values = probabilities[segment.structure.name]
        for target, at in zip(stacked, frames.slices, strict=True):
            if at is not None:
                np.clip(values[at], 0, 1, out=target[..., index])
    return stacked


def _describe_segment(segment: Segment, scheme: LabelScheme, producer: Producer) -> Any:
    highdicom = load_module("highdicom")
    codes = load_module("pydicom.sr.codedict").codes
    colour = structure_colours(scheme)[segment.structure.name]
    site = site_of(segment.structure, scheme)
    return highdicom.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.label,
        segmented_property_category=category_of(segment.structure),
        segmented_property_type=type_of(segment.structure),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MANUFACTURER,
            family=codes.cid7162.ArtificialIntelligence,
            version=producer.full_version,
        ),
        tracking_uid=segment.tracking_uid,
        tracking_id=segment.label,
        anatomic_regions=None if site is None else [site],
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
    )


def format_decimal(value: float) -> float:
    """A finite number that fits the 16 characters of a decimal string."""
    if not math.isfinite(value):
        return 0.0
    return float(f"{value:.6g}")
