"""A folder of phantom scans in the layout of Medical Segmentation Decathlon, Task03_Liver.

A case's files are written whole or not at all, so a run that was stopped continues where it was; `dataset.json` comes
last. `phantom.json` remembers what decides the bytes, so that two kinds of phantom never mix in one folder.
"""

import json
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cc3d
import numpy as np

from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.errors import UserError
from liverseg_dist.files import write_json
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.phantom.scan import Size, make_scan
from liverseg_dist.volume import Grid
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

SETTINGS = "phantom.json"
GENERATION = 5
"""Raised when the same seed gives other scans than before."""
FIRST_TEST = 10_000
"""Number of the first test case: cases and test cases can be added later without renaming any."""


@dataclass(frozen=True)
class PhantomSet:
    """What the bytes of each case depend on (`seed`, `size`, `hard`), and how many there are."""

    folder: Path
    cases: int
    test_cases: int = 0
    seed: int = 0
    size: Size = "small"
    hard: bool = False

    def numbers(self) -> list[int]:
        """Training cases, then test cases."""
        return [*range(self.cases), *range(FIRST_TEST, FIRST_TEST + self.test_cases)]

    def files(self, number: int) -> tuple[Path, Path | None]:
        """Image and label; test cases have none."""
        name = f"liver_{number}.nii.gz"
        if number >= FIRST_TEST:
            return self.folder / "imagesTs" / name, None
        return self.folder / "imagesTr" / name, self.folder / "labelsTr" / name

    @property
    def settings(self) -> dict[str, object]:
        difficulty = "hard" if self.hard else "easy"
        return {
            "generation": GENERATION,
            "seed": self.seed,
            "size": self.size,
            "difficulty": difficulty,
        }


@dataclass(frozen=True)
class CaseSummary:
    """What is in a case; the last three are None for a test case."""

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
    """Make every case that is not there yet; `done` is called as each is finished. Raises `UserError`."""
    check_folder(wanted)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (wanted.folder / name).mkdir(parents=True, exist_ok=True)
    write_json(wanted.folder / SETTINGS, wanted.settings)
    summaries: dict[int, CaseSummary] = {}
    if workers <= 1:
        for number in wanted.numbers():
            summaries[number] = _one(wanted, number)
            done(summaries[number])
    else:
        with worker_pool(workers, get_context("spawn")) as pool:
            with terminal_signals_blocked():
                futures = {pool.submit(_one, wanted, number): number for number in wanted.numbers()}
            for future in as_completed(futures):
                summaries[futures[future]] = future.result()
                done(future.result())
    write_json(wanted.folder / "dataset.json", _index(wanted))
    return [summaries[number] for number in sorted(summaries)]


def check_folder(wanted: PhantomSet) -> None:
    """Refuse what is neither a new folder nor one of the same phantoms. Raises `UserError`; writes nothing."""
    folder, mark = wanted.folder, wanted.folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; give a new folder")
    if not mark.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: not empty and no phantom set; give a new folder, nothing here is overwritten"
            )
        return
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{mark}: not readable as JSON; give another folder") from None
    if before != wanted.settings:
        raise UserError(
            f"{folder}: holds phantoms made with {before}, not {wanted.settings}; give another folder"
        )
    expected = {file for number in wanted.numbers() for file in wanted.files(number)}
    found = [
        file
        for name in ("imagesTr", "labelsTr", "imagesTs")
        for file in (folder / name).glob("*.nii*")
    ]
    surplus = sorted(str(file.relative_to(folder)) for file in found if file not in expected)
    if surplus:
        raise UserError(
            f"{folder}: holds {len(surplus)} more scan files than asked for ({surplus[0]}); "
            "ask for at least as many --cases and --test-cases, or give another folder"
        )


def _one(wanted: PhantomSet, number: int) -> CaseSummary:
    image_file, label_file = wanted.files(number)
    if image_file.exists() and (
        label_file is None or label_file.exists()
    ):  # each appears only whole
        kept = read_nifti(label_file, "label") if label_file else read_nifti(image_file)
        return _summary(number, kept.grid, kept.voxels if label_file else None)
    scan = make_scan(wanted.seed, number, wanted.size, wanted.hard)
    write_image(image_file, np.ascontiguousarray(scan.image.voxels), scan.image.grid)
    if label_file is None:
        return _summary(number, scan.image.grid, None)
    write_mask(label_file, np.ascontiguousarray(scan.label.voxels), scan.label.grid)
    return _summary(number, scan.label.grid, scan.label.voxels)


def _summary(number: int, grid: Grid, label: np.ndarray | None) -> CaseSummary:
    z, y, x = (round(mm, 4) for mm in grid.spacing_mm)  # the file's are float32
    place = (f"liver_{number}", grid.shape, (z, y, x), grid.orientation)
    if label is None:
        return CaseSummary(*place)
    counts = np.bincount(label.ravel(), minlength=3)
    tumours = int(
        cc3d.connected_components(np.ascontiguousarray(label == TUMOUR), connectivity=26).max()
    )
    liver_ml = round(float(counts[LIVER] + counts[TUMOUR]) * grid.voxel_volume_ml, 2)
    return CaseSummary(
        *place, liver_ml, tumours, round(float(counts[TUMOUR]) * grid.voxel_volume_ml, 2)
    )


def _index(wanted: PhantomSet) -> dict[str, object]:
    """The keys of Task03_Liver's dataset.json."""
    test = [
        f"./imagesTs/liver_{number}.nii.gz" for number in wanted.numbers() if number >= FIRST_TEST
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
