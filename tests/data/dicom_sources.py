"""DICOM series for tests: a scan with two balls, and the variants in which scanners write it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from pydicom.uid import generate_uid

from liverseg_dist.phantom.dicom_series import SeriesOptions, build_series, write_series
from liverseg_dist.volume import Grid, Volume

SHAPE = (24, 36, 44)
SPACING_MM = (3.0, 1.0, 0.8)
"""z, y, x."""
BALLS = (((20.0, -15.0, 40.0), 9.0, 400), ((-6.0, 10.0, 62.0), 6.0, -300))
"""Centre (RAS mm) relative to the middle of the scan, radius, HU."""

GDCM_SYNTAX = {
    "j2k": gdcm.TransferSyntax.JPEG2000Lossless,
    "jpegls": gdcm.TransferSyntax.JPEGLSLossless,
    "rle": gdcm.TransferSyntax.RLELossless,
    "jpeg70": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg57": gdcm.TransferSyntax.JPEGLosslessProcess14,
}


def axes(name: str = "axial") -> np.ndarray:
    """Directions of x, y, z of the array (columns) in LPS."""
    if name == "axial":
        return np.eye(3)
    if name == "feet_first":
        return np.diag([-1.0, 1.0, -1.0])
    if name == "prone":
        return np.diag([-1.0, -1.0, 1.0])
    if name == "sagittal":
        return np.column_stack([[0, 1, 0], [0, 0, -1], [1, 0, 0]]).astype(float)
    if name == "coronal":
        return np.column_stack([[1, 0, 0], [0, 0, -1], [0, 1, 0]]).astype(float)
    if name == "oblique":
        a, b = np.radians(17), np.radians(-9)
        one = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        two = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        return np.asarray(one @ two)
    if name == "tilted":
        # The gantry is tilted: rows are oblique, the table still moves along z.
        c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
        return np.column_stack([[1, 0, 0], [0, c, s], [0, 0, 1]])
    raise ValueError(name)


def make_grid(name: str = "axial", shape: tuple[int, int, int] = SHAPE) -> Grid:
    steps = axes(name) * np.array(SPACING_MM[::-1])
    lps = np.eye(4)
    lps[:3, :3] = steps
    lps[:3, 3] = np.array([12.0, -31.0, 50.0]) - steps @ (np.array(shape[::-1]) - 1) / 2
    return Grid(shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)


def make_scan(grid: Grid | None = None, seed: int = 0) -> Volume:
    """Soft tissue with noise and two balls at known places of the world."""
    grid = grid or make_grid()
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    world = grid.world_mm(index)
    voxels = np.random.default_rng(seed).integers(-20, 20, grid.shape) + 40
    middle = grid.world_mm((np.array(grid.shape) - 1) / 2)
    for offset, radius, hu in balls(grid):
        voxels[np.linalg.norm(world - middle - offset, axis=-1) <= radius] = hu
    return Volume(voxels.astype(np.int16), grid)


def balls(grid: Grid) -> list[tuple[np.ndarray, float, int]]:
    """Offset from the middle in the world, radius, HU: inside the scan for any orientation."""
    steps = grid.affine[:3, :3]
    return [
        (steps @ np.array([8.0, -5.0, 4.0]), 7.0, 400),
        (steps @ np.array([-9.0, 6.0, -5.0]), 6.0, -300),
    ]


def write_scan(
    folder: Path, scan: Volume, change: Callable[[list[Any]], None] | None = None, **options: Any
) -> Path:
    """Write a series; `change` may alter the data sets before they are written."""
    datasets = build_series(scan, SeriesOptions(**{"key": folder.name, **options}))
    if change is not None:
        change(datasets)
    write_series(folder, datasets)
    return folder


def shuffle(folder: Path) -> None:
    """Rename the files at random, without suffix."""
    files = sorted(folder.iterdir())
    names = [f"{number:08x}" for number in random.Random(3).sample(range(1 << 30), len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)


def reverse_numbers(datasets: list[Any]) -> None:
    for number, dataset in enumerate(reversed(datasets), start=1):
        dataset.InstanceNumber = number


def compress(folder: Path, syntax: str) -> None:
    """Compress the files of a folder with gdcm; RLE with pydicom, as gdcm writes it wrongly."""
    for file in sorted(folder.iterdir()):
        if syntax == "rle":
            dataset = pydicom.dcmread(file)
            dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
            dataset.save_as(file)
            continue
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(GDCM_SYNTAX[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(file))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def encode(folder: Path, syntax: str) -> None:
    """Write uncompressed files in another encoding."""
    uids = {
        "implicit": pydicom.uid.ImplicitVRLittleEndian,
        "big": pydicom.uid.ExplicitVRBigEndian,
        "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
    }
    for file in sorted(folder.iterdir()):
        # Element by element: a data set that was read keeps its encoding.
        dataset = pydicom.Dataset()
        dataset.update(pydicom.dcmread(file))
        if syntax == "bare":
            pydicom.dcmwrite(
                file, dataset, implicit_vr=True, little_endian=True, enforce_file_format=False
            )
            continue
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uids[syntax]
        if syntax == "big":
            # pydicom writes the bytes as they are.
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset["PixelData"].VR = "OW"
        pydicom.dcmwrite(
            file,
            dataset,
            implicit_vr=syntax == "implicit",
            little_endian=syntax != "big",
            enforce_file_format=True,
        )


def fresh_uids(datasets: list[Any]) -> None:
    """Give copies of images UIDs of their own."""
    for dataset in datasets:
        dataset.SOPInstanceUID = generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
