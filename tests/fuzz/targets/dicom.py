"""DICOM series with damaged files: cut, flipped bytes, wrong lengths, transfer syntaxes, nesting,
dimensions, and well-formed values that are nonsense."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pydicom

from liverseg_dist.data.io.dicom_series import DicomScan, list_source_stacks, read_dicom_scan
from tests.data.dicom_sources import compress, make_grid, make_scan, write_scan
from tests.fuzz.judge import Wrong

SHAPE = (5, 16, 20)

Damage = Callable[[bytes, Random], bytes]
SYNTAXES = (b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.5\0\0\0",
            b"1.2.840.10008.1.2\0\0\0\0\0", b"9.9.9.9.9.9.9.9.9.9.9\0")  # fmt: skip
VALUES = ("", "nan", "1e400", "-1", "0", "99999999999999999999", "\\\\\\", "a", "1\\2", "1e-300")
KEYWORDS = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
    "RescaleIntercept", "SeriesNumber", "InstanceNumber", "SeriesInstanceUID", "SOPInstanceUID",
    "ImageType", "NumberOfFrames",
)  # fmt: skip
NUMBERS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
           "PixelRepresentation")  # fmt: skip


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bytes(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    # Most damage to headers; pixels are merely other values.
    limit = len(changed) if rng.random() < 0.3 else min(len(changed), 1600)
    for _ in range(rng.choice((1, 3, 20, 200))):
        changed[rng.randrange(limit)] = rng.randrange(256)
    return bytes(changed)


def change_lengths(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(132, min(len(changed) - 4, 1600))
        length = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(1 << 32)))
        changed[at : at + 4] = length.to_bytes(4, "little")
    return bytes(changed)


def change_syntax(data: bytes, rng: Random) -> bytes:
    return data.replace(b"1.2.840.10008.1.2.1\0", rng.choice(SYNTAXES)[:20], 1)


def insert_noise(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(132, min(len(data), 1600))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 1000))) + data[at:]


def nest_sequences(data: bytes, rng: Random) -> bytes:
    """Sequences of undefined length within each other, without an end."""
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    at = data.find(b"\x08\x00\x08\x00CS")
    return data[:at] + sequence * rng.choice((10, 500, 5000)) + data[at:]


def drop_preamble(data: bytes, rng: Random) -> bytes:
    return data[132 + rng.choice((0, 1, 50)) :]


BYTES: tuple[Damage, ...] = (
    cut, flip_bytes, change_lengths, change_syntax, insert_noise, nest_sequences, drop_preamble,
)  # fmt: skip


def change_values(dataset: Any, rng: Random) -> None:
    """Values that are well-formed DICOM and nonsense."""
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            keyword = rng.choice(NUMBERS)
            setattr(dataset, keyword, rng.choice((0, 1, 3, 7, 12, 31, 64, 4096, 65535)))
        else:
            keyword = rng.choice(KEYWORDS)
            tag = pydicom.datadict.tag_for_keyword(keyword)
            kind = pydicom.datadict.dictionary_VR(tag)
            element = pydicom.DataElement(tag, "LO", rng.choice(VALUES))
            element.VR = kind if kind == "UI" else "LO"
            dataset[tag] = element


def damage_file(file: Path, rng: Random) -> None:
    """Damage one file in one of these ways."""
    if rng.random() < 0.35:
        dataset = pydicom.dcmread(file)
        change_values(dataset, rng)
        dataset.save_as(file)
        return
    file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))


class DicomTarget:
    name = "dicom"

    def __init__(self, folder: Path) -> None:
        scan = make_scan(make_grid(shape=SHAPE))
        self.series = [write_scan(folder / "plain", scan), write_scan(folder / "packed", scan)]
        compress(self.series[1], "jpeg70")

    def make(self, case: Path, chance: Random) -> None:
        target = case / "series"
        shutil.copytree(chance.choice(self.series), target)
        files = sorted(target.iterdir())
        with warnings.catch_warnings():
            # Writing nonsense values makes pydicom warn.
            warnings.simplefilter("ignore")
            for file in files if chance.random() < 0.3 else [chance.choice(files)]:
                damage_file(file, chance)

    def check(self, case: Path) -> None:
        scan = DicomScan((case / "series",), "scan")
        list_source_stacks(scan)
        volume = read_dicom_scan(scan).volume
        if volume.voxels.ndim != 3 or not np.isfinite(volume.affine).all():
            raise Wrong("no volume")
