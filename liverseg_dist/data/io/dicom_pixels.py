"""Decode the frames of a stack one after the other: `read_frames`.

Uncompressed pixels are read from their place in the file into an array; all other encodings are
decoded by pydicom with gdcm. The size of a frame is checked against the file or against limits
before memory is allocated, because a damaged header may claim any size.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from liverseg_dist.data.io.dicom_headers import DicomDamaged, FileHeader, FrameHeader
from liverseg_dist.data.io.dicom_stacks import Slice
from liverseg_dist.optional_packages import load_module, quiet_pydicom

MAX_SIDE = 8192
MAX_FRAME_VOXELS = 4096 * 4096
MAX_COMPRESSED_RATIO = 20_000
"""A frame of one value is the extreme case: 512 x 512 in about 60 bytes of JPEG-LS."""
BITS = (8, 16, 32)


def check_pixels(header: FileHeader) -> None:
    """Check that the pixels of a file can be those of a scan.

    Raises:
        DicomDamaged: the reason, without values of the file that could identify a patient.
    """
    if header.samples != 1 or header.photometric != "MONOCHROME2":
        raise DicomDamaged("the pixels are not MONOCHROME2 with one sample")
    if header.has_lut:
        raise DicomDamaged("values by ModalityLUTSequence are not supported")
    rows, columns = header.rows, header.columns
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        raise DicomDamaged(f"frames of {columns} x {rows} pixels are not possible")
    if rows * columns > MAX_FRAME_VOXELS:
        raise DicomDamaged(f"frames of {columns} x {rows} pixels are too large")
    stored, allocated = header.bits_stored, header.bits_allocated
    if allocated not in BITS or not 0 < stored <= allocated:
        raise DicomDamaged(f"pixels of {stored} of {allocated} bits are not supported")
    if not stored - 1 <= header.high_bit < allocated:
        raise DicomDamaged(f"HighBit {header.high_bit} does not fit {stored} stored bits")
    needed = rows * columns * (allocated // 8) * len(header.frames)
    if header.pixel_offset is not None and header.pixel_bytes < needed:
        raise DicomDamaged("the pixel data are shorter than the header states")


def read_frames(slices: Sequence[Slice]) -> Iterator[np.ndarray]:
    """Yield the stored values (rows, columns) of each slice, in the given order.

    Raises:
        DicomDamaged: the pixels of a file cannot be decoded.
        OSError, ScanFileError: a file cannot be read.
    """
    for _, group in itertools.groupby(slices, key=lambda one: one.file.file.number):
        own = list(group)
        header = own[0].file
        numbers = [one.frame.frame for one in own]
        check_pixels(header)
        if header.pixel_offset is not None:
            yield from _read_plain(header, numbers)
        else:
            yield from _decode(header, numbers)


def rescale(values: np.ndarray, frame: FrameHeader) -> np.ndarray:
    """The values in HU (CT) or in the unit of the scanner, as integers where these are exact."""
    slope, intercept = frame.slope, frame.intercept
    if slope.is_integer() and intercept.is_integer() and abs(slope) < 1 << 15:
        wide = np.int64 if values.itemsize > 2 else np.int32
        if abs(intercept) < 1 << 30:
            integers = values.astype(wide)
            if slope != 1:
                np.multiply(integers, int(slope), out=integers)
            if intercept:
                np.add(integers, int(intercept), out=integers)
            return integers
    with np.errstate(over="ignore", invalid="ignore"):
        return values * np.float64(slope) + intercept


def _read_plain(header: FileHeader, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    kind = "i" if header.is_signed else "u"
    dtype = np.dtype(f"<{kind}{header.bits_allocated // 8}")
    count = header.rows * header.columns
    assert header.pixel_offset is not None
    with header.file.open() as stream:
        for number in numbers:
            stream.seek(header.pixel_offset + number * count * dtype.itemsize)
            data = stream.read(count * dtype.itemsize)
            if len(data) < count * dtype.itemsize:
                raise DicomDamaged("the file ends within its pixel data (truncated)")
            values = np.frombuffer(data, dtype).reshape(header.rows, header.columns)
            yield _select_bits(values, header)


def _select_bits(values: np.ndarray, header: FileHeader) -> np.ndarray:
    """Drop the bits outside of the stored ones, which old files use for overlays."""
    unused = header.bits_allocated - header.bits_stored
    if not unused:
        return values
    above = header.bits_allocated - 1 - header.high_bit
    # Shifting up and down again extends the sign of signed values.
    return (values << above) >> unused


def _decode(header: FileHeader, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    pydicom = load_module("pydicom")
    pixels = load_module("pydicom.pixels")
    shape = (header.rows, header.columns)
    try:
        with quiet_pydicom(), header.file.open() as stream:
            dataset = pydicom.dcmread(stream)
            _check_compressed_size(dataset, header)
            missing = len(numbers)
            for values in pixels.iter_pixels(dataset, indices=list(numbers), raw=True):
                missing -= 1
                if values.shape != shape or values.dtype.kind not in "iu":
                    raise DicomDamaged("the decoded pixels do not have the size of the header")
                yield values
            if missing:
                raise DicomDamaged("the file has fewer frames than its header states")
    except (OSError, DicomDamaged):
        raise
    except MemoryError:
        raise DicomDamaged("a frame does not fit into memory") from None
    # The decoders raise many types for damaged data.
    except (Exception, RecursionError):
        name = _name_syntax(header.transfer_syntax)
        raise DicomDamaged(f"the pixels ({name}) cannot be decoded") from None


def _check_compressed_size(dataset: Any, header: FileHeader) -> None:
    data = dataset.get("PixelData")
    if not data:
        raise DicomDamaged("the file has no pixel data")
    wanted = header.rows * header.columns * (header.bits_allocated // 8) * len(header.frames)
    if len(data) * MAX_COMPRESSED_RATIO < wanted:
        raise DicomDamaged("the pixel data are too short for the size in the header")


def _name_syntax(syntax: str) -> str:
    """Name of a transfer syntax of the standard; its UID is no identifier of a patient."""
    uid = load_module("pydicom.uid").UID(syntax)
    name = str(uid.name) if uid.is_transfer_syntax else ""
    return name or "unknown transfer syntax"
