"""What the headers of DICOM images say, without their pixels: `read_file_header`.

A classic CT or MR file is one frame; an Enhanced (multi-frame) file has many, described by
functional groups. Both become `FileHeader` with `FrameHeader`s, so that all later steps are the
same. Of the patient only PatientID is read, to find the scans of one patient in a data set; it is
stored as a keyed hash (`dicom_names`) or not at all.

Files are untrusted: every error that pydicom raises for a damaged file becomes `DicomDamaged`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from liverseg_dist.data.io.dicom_files import SIGNATURE, SIGNATURE_OFFSET, DicomFile
from liverseg_dist.optional_packages import load_module, quiet_pydicom

CT_CLASSES = frozenset(
    ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
)
"""CT, Enhanced CT, Legacy Converted Enhanced CT."""
MR_CLASSES = frozenset(
    ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")
)
MAX_FRAMES = 100_000
MAX_TEXT = 64
"""Longest text that is kept of a value."""
HEADER_TAGS = (
    "PatientID", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "SeriesDescription", "Modality", "ImageType", "InstanceNumber", "AcquisitionNumber",
    "EchoTime", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
SPLIT_TAGS = (
    "ImageType", "AcquisitionNumber", "EchoTime", "TemporalPositionIdentifier", "TriggerTime",
    "DiffusionBValue",
)  # fmt: skip
"""Values that distinguish the volumes of one series (phases, echoes, diffusion)."""

Float3 = tuple[float, float, float]
Float6 = tuple[float, float, float, float, float, float]


class DicomDamaged(ValueError):
    """A file cannot be parsed, or a value that is needed is missing or malformed. The text has no
    values of the file."""


@dataclass(frozen=True)
class FrameHeader:
    """One frame.

    Attributes:
        frame: from 0 within its file.
        position_mm: centre of the first pixel, LPS (DICOM's patient coordinates).
        orientation: directions of increasing column, then of increasing row.
        spacing_mm: between rows, between columns.
        slope, intercept: rescaling to HU.
        splits: `SPLIT_TAGS` of this frame that are present.
    """

    frame: int
    position_mm: Float3 | None
    orientation: Float6 | None
    spacing_mm: tuple[float, float] | None
    slope: float
    intercept: float
    splits: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FileHeader:
    """One file. `pixel_offset` is where uncompressed pixels begin, None where pydicom must decode."""

    file: DicomFile
    patient_id: str
    sop_class: str
    sop_uid: str
    study_uid: str
    series_uid: str
    series_number: int | None
    description: str
    modality: str
    image_type: tuple[str, ...]
    instance_number: int | None
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    samples: int
    photometric: str
    transfer_syntax: str
    has_lut: bool
    pixel_offset: int | None
    pixel_bytes: int
    frames: tuple[FrameHeader, ...]

    @property
    def is_image(self) -> bool:
        """Whether it is a CT or MR image, not a report, segmentation or screen shot."""
        return self.sop_class in CT_CLASSES or self.sop_class in MR_CLASSES

    @property
    def is_localizer(self) -> bool:
        return "LOCALIZER" in self.image_type


def read_file_header(file: DicomFile) -> FileHeader:
    """Read the header of a file. The file must be DICOM (`DicomFile.is_dicom`).

    Raises:
        DicomDamaged: see the class.
        OSError, ScanFileError: the file cannot be read.
    """
    pydicom = load_module("pydicom")
    try:
        with quiet_pydicom(), file.open() as stream:
            dataset = pydicom.dcmread(
                stream,
                stop_before_pixels=True,
                specific_tags=list(HEADER_TAGS),
                # Files without the preamble; `is_dicom` has checked their first bytes.
                force=_lacks_preamble(stream),
            )
            offset, length = _find_pixels(stream, dataset)
            return _describe_file(file, dataset, offset, length)
    except (OSError, DicomDamaged):
        raise
    # pydicom raises many types for damaged files, and RecursionError for nested sequences.
    except (Exception, RecursionError):
        raise DicomDamaged("not readable as DICOM") from None


def _lacks_preamble(stream: Any) -> bool:
    start = stream.read(SIGNATURE_OFFSET + len(SIGNATURE))
    stream.seek(0)
    return bool(start[SIGNATURE_OFFSET:] != SIGNATURE)


def _find_pixels(stream: Any, dataset: Any) -> tuple[int | None, int]:
    """Offset and length of uncompressed pixels, at which pydicom stopped; (None, 0) otherwise."""
    uid = load_module("pydicom.uid")
    syntax = _transfer_syntax(dataset)
    if syntax not in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        return None, 0
    start = stream.tell()
    header = stream.read(12)
    if header[:4] != b"\xe0\x7f\x10\x00":
        return None, 0
    # Some files are implicit although their meta information names explicit.
    is_explicit = syntax == uid.ExplicitVRLittleEndian and header[4:6].isalpha()
    skipped = 12 if is_explicit else 8
    length = int.from_bytes(header[skipped - 4 : skipped], "little")
    if length == 0xFFFFFFFF:
        return None, 0
    return start + skipped, length


def _transfer_syntax(dataset: Any) -> str:
    meta = getattr(dataset, "file_meta", None)
    found = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    if found:
        return found
    # Without meta information pydicom guesses the encoding from the first element.
    is_implicit = bool(dataset.original_encoding[0])
    return "1.2.840.10008.1.2" if is_implicit else "1.2.840.10008.1.2.1"


def _describe_file(
    file: DicomFile, dataset: Any, pixel_offset: int | None, pixel_bytes: int
) -> FileHeader:
    sop_class = _text(dataset, "SOPClassUID")
    is_image = sop_class in CT_CLASSES or sop_class in MR_CLASSES
    frames: tuple[FrameHeader, ...] = ()
    if is_image:
        frames = tuple(_describe_frames(dataset))
    bits = _integer(dataset, "BitsAllocated") or 0
    stored = _integer(dataset, "BitsStored") or bits
    high = _integer(dataset, "HighBit")
    return FileHeader(
        file=file,
        patient_id=_text(dataset, "PatientID"),
        sop_class=sop_class,
        sop_uid=_text(dataset, "SOPInstanceUID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        series_number=_integer(dataset, "SeriesNumber"),
        description=_text(dataset, "SeriesDescription"),
        modality="CT" if sop_class in CT_CLASSES else "MR" if is_image else "",
        image_type=_texts(dataset, "ImageType"),
        instance_number=_integer(dataset, "InstanceNumber"),
        rows=_integer(dataset, "Rows") or 0,
        columns=_integer(dataset, "Columns") or 0,
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else high,
        is_signed=_integer(dataset, "PixelRepresentation") == 1,
        samples=_integer(dataset, "SamplesPerPixel") or 1,
        photometric=_text(dataset, "PhotometricInterpretation"),
        transfer_syntax=_transfer_syntax(dataset),
        has_lut="ModalityLUTSequence" in dataset,
        pixel_offset=pixel_offset,
        pixel_bytes=pixel_bytes,
        frames=frames,
    )


def _describe_frames(dataset: Any) -> Iterator[FrameHeader]:
    shared = _first_item(dataset, "SharedFunctionalGroupsSequence")
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        if (_integer(dataset, "NumberOfFrames") or 1) != 1:
            raise DicomDamaged("several frames without functional groups")
        yield _describe_frame(0, dataset, (dataset,))
        return
    if len(groups) != _integer(dataset, "NumberOfFrames") or len(groups) > MAX_FRAMES:
        raise DicomDamaged("the number of frames is not that of the functional groups")
    for number, group in enumerate(groups):
        sources = [group] if shared is None else [group, shared]
        inner: list[Any] = []
        for source in sources:
            for element in source:
                # Macros are sequences of one item; their values are what a classic file has.
                if element.VR == "SQ" and len(element.value):
                    inner.append(element.value[0])
        yield _describe_frame(number, dataset, inner)


def _describe_frame(number: int, dataset: Any, sources: Sequence[Any]) -> FrameHeader:
    """Values of the first source that has them; `dataset` itself for a classic file."""
    slope = _find_floats(sources, "RescaleSlope", 1)
    intercept = _find_floats(sources, "RescaleIntercept", 1)
    position = _find_floats(sources, "ImagePositionPatient", 3)
    orientation = _find_floats(sources, "ImageOrientationPatient", 6)
    spacing = _find_floats(sources, "PixelSpacing", 2)
    return FrameHeader(
        frame=number,
        position_mm=None if position is None else (position[0], position[1], position[2]),
        orientation=orientation,
        spacing_mm=None if spacing is None else (spacing[0], spacing[1]),
        slope=1.0 if slope is None else slope[0],
        intercept=0.0 if intercept is None else intercept[0],
        splits=tuple(_list_splits(dataset, sources)),
    )


_ENHANCED_SPLITS = {
    "EffectiveEchoTime": "EchoTime",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "FrameType": "ImageType",
    "StackID": "StackID",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
    "DiffusionBValue": "DiffusionBValue",
}
"""Keyword in a functional group -> name of the split."""


def _list_splits(dataset: Any, sources: Sequence[Any]) -> Iterator[tuple[str, str]]:
    is_classic = len(sources) == 1 and sources[0] is dataset
    names = {tag: tag for tag in SPLIT_TAGS} if is_classic else _ENHANCED_SPLITS
    for keyword, name in names.items():
        for source in sources:
            if keyword in source:
                yield name, str(source.get(keyword))[:MAX_TEXT]
                break


def _first_item(dataset: Any, keyword: str) -> Any | None:
    found = dataset.get(keyword)
    return found[0] if found else None


def _find_floats(sources: Sequence[Any], keyword: str, count: int) -> Any:
    for source in sources:
        value = source.get(keyword)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        values = [value] if count == 1 else list(value)
        try:
            numbers = tuple(float(one) for one in values)
        except (TypeError, ValueError):
            raise DicomDamaged(f"{keyword} has no numbers") from None
        if len(numbers) != count or not all(math.isfinite(one) for one in numbers):
            raise DicomDamaged(f"{keyword} is not {count} finite number(s)")
        return numbers
    return None


def _text(dataset: Any, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip("\0 ")[:256]


def _texts(dataset: Any, keyword: str) -> tuple[str, ...]:
    value = dataset.get(keyword)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else list(value)
    return tuple(str(one).strip().upper()[:MAX_TEXT] for one in values[:8])


def _integer(dataset: Any, keyword: str) -> int | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DicomDamaged(f"{keyword} is no integer") from None
