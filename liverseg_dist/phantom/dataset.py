"""A folder of phantom scans in the layout of Medical Segmentation Decathlon, Task03_Liver.

A case's files are written atomically, so a run that was stopped continues with the next case;
`dataset.json` is written last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cc3d
import numpy as np

from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.files import write_json
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.phantom.folder import (
    SCAN_FOLDERS,
    SETTINGS,
    check_phantom_folder,
    make_cases,
)
from liverseg_dist.phantom.grids import Size
from liverseg_dist.phantom.scan import make_scan
from liverseg_dist.volume import Grid

GENERATION = 5
"""Increased when a change of the code gives other scans for the same seed."""
FIRST_TEST = 10_000
"""Number of the first test case: both kinds of cases can be added later without renaming."""


@dataclass(frozen=True)
class PhantomSet:
    """A set of phantoms; the bytes of a case depend on `seed`, `size` and `hard`."""

    folder: Path
    cases: int
    test_cases: int = 0
    seed: int = 0
    size: Size = "small"
    hard: bool = False

    def case_numbers(self) -> list[int]:
        """Return the numbers of the training cases, then of the test cases."""
        return [*range(self.cases), *range(FIRST_TEST, FIRST_TEST + self.test_cases)]

    def case_files(self, number: int) -> tuple[Path, Path | None]:
        """Return the files of image and label; test cases have no label."""
        name = f"liver_{number}.nii.gz"
        if number >= FIRST_TEST:
            return self.folder / "imagesTs" / name, None
        return self.folder / "imagesTr" / name, self.folder / "labelsTr" / name

    @property
    def settings(self) -> dict[str, object]:
        """Content of `phantom.json`."""
        difficulty = "hard" if self.hard else "easy"
        return {
            "generation": GENERATION,
            "seed": self.seed,
            "size": self.size,
            "difficulty": difficulty,
        }


@dataclass(frozen=True)
class CaseSummary:
    """Content of a case; the last three fields are None for a test case."""

    case_id: str
    shape_zyx: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    liver_ml: float | None = None
    tumours: int | None = None
    tumour_ml: float | None = None


def write_dataset(
    wanted: PhantomSet, workers: int, done: Callable[[CaseSummary], None]
) -> list[CaseSummary]:
    """Create every case that does not exist.

    Args:
        wanted: the set.
        workers: number of processes.
        done: called after each case.

    Raises:
        UserError: the folder cannot be used.
    """
    check_folder(wanted)
    for name in SCAN_FOLDERS:
        (wanted.folder / name).mkdir(parents=True, exist_ok=True)
    write_json(wanted.folder / SETTINGS, wanted.settings)
    make_case = partial(_write_case, wanted)
    summaries = make_cases(make_case, wanted.case_numbers(), workers, done)
    # Last: a folder without this file is incomplete.
    write_json(wanted.folder / "dataset.json", _dataset_index(wanted))
    return summaries


def check_folder(wanted: PhantomSet) -> None:
    """Check that the folder is new or has phantoms of the same settings. Writes nothing.

    Raises:
        UserError: the folder cannot be used.
    """
    expected: set[Path] = set()
    for number in wanted.case_numbers():
        expected.update(file for file in wanted.case_files(number) if file is not None)
    check_phantom_folder(wanted.folder, wanted.settings, expected)


def _write_case(wanted: PhantomSet, number: int) -> CaseSummary:
    image_file, label_file = wanted.case_files(number)
    # Files are written atomically: one that exists is complete.
    if image_file.exists() and (label_file is None or label_file.exists()):
        kept = read_nifti(label_file, "label") if label_file else read_nifti(image_file)
        return _summarize_case(number, kept.grid, kept.voxels if label_file else None)
    scan = make_scan(wanted.seed, number, wanted.size, wanted.hard)
    write_image(image_file, np.ascontiguousarray(scan.image.voxels), scan.image.grid)
    if label_file is None:
        return _summarize_case(number, scan.image.grid, None)
    write_mask(label_file, np.ascontiguousarray(scan.label.voxels), scan.label.grid)
    return _summarize_case(number, scan.label.grid, scan.label.voxels)


def _summarize_case(number: int, grid: Grid, label: np.ndarray | None) -> CaseSummary:
    # Rounded, because files store the spacing as float32.
    z, y, x = (round(mm, 4) for mm in grid.spacing_mm)
    geometry = (f"liver_{number}", grid.shape, (z, y, x), grid.orientation)
    if label is None:
        return CaseSummary(*geometry)
    counts = np.bincount(label.ravel(), minlength=3)
    tumours = int(
        cc3d.connected_components(np.ascontiguousarray(label == TUMOUR), connectivity=26).max()
    )
    liver_ml = round(float(counts[LIVER] + counts[TUMOUR]) * grid.voxel_volume_ml, 2)
    return CaseSummary(
        *geometry, liver_ml, tumours, round(float(counts[TUMOUR]) * grid.voxel_volume_ml, 2)
    )


def _dataset_index(wanted: PhantomSet) -> dict[str, object]:
    """Return the content of dataset.json, with the keys of Task03_Liver."""
    test = [
        f"./imagesTs/liver_{number}.nii.gz"
        for number in wanted.case_numbers()
        if number >= FIRST_TEST
    ]
    names = [f"liver_{number}.nii.gz" for number in range(wanted.cases)]
    return {
        "name": "Liver phantom",
        "description": f"Synthetic abdomen CTs: {wanted.settings}",
        "reference": "liverseg_dist",
        "licence": "CC0-1.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": len(names),
        "numTest": len(test),
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ],
        "test": test,
    }
