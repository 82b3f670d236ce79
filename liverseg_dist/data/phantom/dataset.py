"""A folder of phantom scans in the layout of Medical Segmentation Decathlon, Task03_Liver."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cc3d
import numpy as np

from liverseg_dist.data.nifti import read_nifti, write_image, write_mask
from liverseg_dist.data.phantom.scan import PhantomScan, Size, make_scan
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LIVER, TUMOUR

SETTINGS = "phantom.json"


@dataclass(frozen=True)
class PhantomSet:
    """What the bytes of each case depend on (`seed`, `size`, `hard`), and how many there are."""

    folder: Path
    cases: int
    test_cases: int = 0
    seed: int = 0
    size: Size = "small"
    hard: bool = False

    def names(self) -> list[tuple[int, str, bool]]:
        """(case number, id, has a label), training first."""
        total = self.cases + self.test_cases
        return [(number, f"liver_{number}", number < self.cases) for number in range(total)]


@dataclass(frozen=True)
class CaseSummary:
    case_id: str
    shape_zyx: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    liver_ml: float
    tumours: int
    tumour_ml: float


def write_dataset(wanted: PhantomSet, workers: int, done: Callable[[CaseSummary], None]) -> list[CaseSummary]:
    """Make every case that is not there yet; `done` is called as each is finished. Raises `UserError`."""
    _open_folder(wanted)
    summaries: dict[int, CaseSummary] = {}
    if workers <= 1:
        for number, _, labelled in wanted.names():
            summaries[number] = _one(wanted, number, labelled)
            done(summaries[number])
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            futures = {pool.submit(_one, wanted, number, labelled): number for number, _, labelled in wanted.names()}
            for future in as_completed(futures):
                summaries[futures[future]] = future.result()
                done(future.result())
    _write_json(wanted.folder / "dataset.json", _index(wanted))
    return [summaries[number] for number in sorted(summaries)]


def _open_folder(wanted: PhantomSet) -> None:
    """A new folder, or one made before with what decides the bytes being equal."""
    folder, mark = wanted.folder, wanted.folder / SETTINGS
    settings = {key: value for key, value in asdict(wanted).items() if key in ("seed", "size", "hard")}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; give a new folder")
    if mark.exists():
        before = json.loads(mark.read_text(encoding="utf-8"))
        if before != settings:
            raise UserError(f"{folder}: holds phantoms made with {before}, not {settings}; give another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty and no phantom set; give a new folder, nothing here is overwritten")
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_json(mark, settings)


def _one(wanted: PhantomSet, number: int, labelled: bool) -> CaseSummary:
    case_id = f"liver_{number}"
    image_file = wanted.folder / ("imagesTr" if labelled else "imagesTs") / f"{case_id}.nii.gz"
    label_file = wanted.folder / "labelsTr" / f"{case_id}.nii.gz"
    if labelled and image_file.exists() and label_file.exists():  # each appears only whole
        label = read_nifti(label_file, "label")
        return _summary(case_id, label.voxels, label.grid.orientation, label.spacing_mm, label.grid.voxel_volume_ml)
    scan: PhantomScan = make_scan(wanted.seed, number, wanted.size, wanted.hard)
    write_image(image_file, np.ascontiguousarray(scan.image.voxels), scan.image.grid)
    if labelled:
        write_mask(label_file, np.ascontiguousarray(scan.label.voxels), scan.label.grid)
    grid = scan.label.grid
    return _summary(case_id, scan.label.voxels, grid.orientation, grid.spacing_mm, grid.voxel_volume_ml)


def _summary(
    case_id: str, label: np.ndarray, orientation: str, spacing_mm: tuple[float, float, float], voxel_ml: float
) -> CaseSummary:
    counts = np.bincount(label.ravel(), minlength=3)
    tumours = int(cc3d.connected_components(np.ascontiguousarray(label == TUMOUR), connectivity=26).max())
    z, y, x = label.shape
    liver_ml = float(counts[LIVER] + counts[TUMOUR]) * voxel_ml
    return CaseSummary(case_id, (z, y, x), spacing_mm, orientation, liver_ml, tumours, float(counts[TUMOUR]) * voxel_ml)


def _index(wanted: PhantomSet) -> dict[str, object]:
    training = [n for _, n, labelled in wanted.names() if labelled]
    test = [n for _, n, labelled in wanted.names() if not labelled]
    return {
        "name": "Liver phantom",
        "description": f"Synthetic abdomen CTs, seed {wanted.seed}, size {wanted.size}",
        "reference": "liverseg_dist",
        "licence": "CC0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in training
        ],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }


def _write_json(path: Path, content: object) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
