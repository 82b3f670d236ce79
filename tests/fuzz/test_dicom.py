"""Damaged DICOM series: each is read, or refused in one line; no hang, and bounded memory."""

import random
import resource
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.data.io.dicom_series import DicomScan, list_source_stacks, read_dicom_scan
from liverseg_dist.errors import LiversegError
from tests.data.dicom_sources import compress, make_grid, make_scan, write_scan
from tests.fuzz.dicom_files import damage_file

SHAPE = (5, 16, 20)
MAX_GROWTH_KIB = 600 << 10


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    scan = make_scan(make_grid(shape=SHAPE))
    plain, packed = write_scan(folder / "plain", scan), write_scan(folder / "packed", scan)
    compress(packed, "jpeg70")
    return [plain, packed]


def read_damaged(folder: Path) -> str:
    """`read`, or the message of the error; any other exception fails the test."""
    scan = DicomScan((folder,), "scan_x")
    try:
        list_source_stacks(scan)
        file = read_dicom_scan(scan)
    except LiversegError as error:
        return str(error)
    assert file.volume.voxels.ndim == 3
    assert np.isfinite(file.volume.affine).all()
    return "read"


def run(series: list[Path], folder: Path, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        # Writing nonsense values makes pydicom warn.
        warnings.simplefilter("ignore")
        for number in range(count):
            target = folder / "s"
            shutil.copytree(series[number % len(series)], target)
            files = sorted(target.iterdir())
            for file in files if rng.random() < 0.3 else [rng.choice(files)]:
                damage_file(file, rng)
            message = read_damaged(target)
            outcomes["read" if message == "read" else "refused"] += 1
            assert "\n" not in message
            assert str(folder) not in message
            shutil.rmtree(target)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < MAX_GROWTH_KIB
    return outcomes


def test_damaged_series_are_read_or_refused(series: list[Path], tmp_path: Path) -> None:
    outcomes = run(series, tmp_path, 60, seed=1)
    assert min(outcomes.values()) > 5


@pytest.mark.long
def test_many_damaged_series_are_read_or_refused(series: list[Path], tmp_path: Path) -> None:
    run(series, tmp_path, 5000, seed=2)
