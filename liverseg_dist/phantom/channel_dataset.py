"""A folder of phantoms with any modality and any labelled structures, in one of three layouts.

- `nnunet`: nnU-Net v2: `imagesTr/ID_0000.nii.gz`, `ID_0001.nii.gz` for the channels; regions.
- `msd`: Decathlon with one channel, `imagesTr/ID.nii.gz`, as Task03_Liver.
- `msd4d`: Decathlon with all channels in one file, `imagesTr/ID.nii.gz` (x, y, z, channel), as
  Task01_BrainTumour.

`truth/ID.json` holds what is known of a case, such as the motion between CT and MR. It is written
after the case's scans, so that a run that was stopped continues there; `truth.json` has all cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from liverseg_dist.data.io.nifti import write_image, write_mask
from liverseg_dist.files import write_json
from liverseg_dist.phantom.channel_case import (
    ChannelCase,
    Recipe,
    list_present_channels,
    make_channel_case,
)
from liverseg_dist.phantom.dataset import FIRST_TEST
from liverseg_dist.phantom.folder import (
    SCAN_FOLDERS,
    SETTINGS,
    check_phantom_folder,
    make_cases,
)
from liverseg_dist.phantom.nifti_4d import write_channels
from liverseg_dist.texts.structured import read_json

Layout = Literal["msd", "nnunet", "msd4d"]
LAYOUTS: tuple[Layout, ...] = ("msd", "nnunet", "msd4d")
GENERATION = 1
"""Increased when a change of the code gives other scans for the same seed."""
TRUTH = "truth"
COORDINATES = "RAS+, mm"


@dataclass(frozen=True)
class ChannelSet:
    """A set of phantoms; the bytes of a case depend on `recipe` and `layout`."""

    folder: Path
    cases: int
    test_cases: int
    recipe: Recipe
    layout: Layout

    def case_numbers(self) -> list[int]:
        """Return the numbers of the training cases, then of the test cases."""
        return [*range(self.cases), *range(FIRST_TEST, FIRST_TEST + self.test_cases)]

    def image_files(self, number: int) -> dict[str, Path]:
        """Return the file of each channel that a case has; the order is that of the channels."""
        folder = self.folder / ("imagesTs" if number >= FIRST_TEST else "imagesTr")
        files = {}
        present = list_present_channels(self.recipe, number)
        for index, channel in enumerate(self.recipe.channels):
            if channel in present:
                suffix = f"_{index:04d}" if self.layout == "nnunet" else ""
                files[channel] = folder / f"{case_id(number)}{suffix}.nii.gz"
        return files

    def label_file(self, number: int) -> Path | None:
        """Return the file of the label; test cases have none."""
        if number >= FIRST_TEST:
            return None
        return self.folder / "labelsTr" / f"{case_id(number)}.nii.gz"

    def truth_file(self, number: int) -> Path:
        """Return the file of what is known of a case."""
        return self.folder / TRUTH / f"{case_id(number)}.json"

    @property
    def settings(self) -> dict[str, object]:
        """Content of `phantom.json`."""
        recipe = self.recipe
        return {
            "channel_generation": GENERATION,
            "seed": recipe.seed,
            "size": recipe.size,
            "difficulty": "hard" if recipe.hard else "easy",
            "modality": recipe.modality,
            "mr_sequences": list(recipe.sequences),
            "structures": list(recipe.labels.structures),
            "benign_lesions": recipe.benign_lesions,
            "misalignment_mm": recipe.misalignment_mm,
            "missing_channel": recipe.missing_share,
            "layout": self.layout,
        }


def case_id(number: int) -> str:
    """Return the name of a case."""
    return f"abdomen_{number}"


def write_channel_set(
    wanted: ChannelSet, workers: int, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Create every case that does not exist.

    Args:
        wanted: the set.
        workers: number of processes.
        done: called after each case with what is known about it.

    Returns:
        What is known about each case.

    Raises:
        UserError: the folder cannot be used.
    """
    check_channel_folder(wanted)
    for name in (*SCAN_FOLDERS, TRUTH):
        (wanted.folder / name).mkdir(parents=True, exist_ok=True)
    write_json(wanted.folder / SETTINGS, wanted.settings)
    truths = make_cases(partial(_write_case, wanted), wanted.case_numbers(), workers, done)
    write_json(
        wanted.folder / f"{TRUTH}.json", {"schema": 1, "coordinates": COORDINATES, "cases": truths}
    )
    # Last: a folder without this file is incomplete.
    write_json(wanted.folder / "dataset.json", _dataset_index(wanted))
    return truths


def check_channel_folder(wanted: ChannelSet) -> None:
    """Check that the folder is new or has phantoms of the same settings. Writes nothing.

    Raises:
        UserError: the folder cannot be used.
    """
    expected: set[Path] = set()
    for number in wanted.case_numbers():
        expected.update(wanted.image_files(number).values())
        label = wanted.label_file(number)
        if label is not None:
            expected.add(label)
    check_phantom_folder(wanted.folder, wanted.settings, expected)


def _write_case(wanted: ChannelSet, number: int) -> dict[str, Any]:
    files, label_file = wanted.image_files(number), wanted.label_file(number)
    truth_file = wanted.truth_file(number)
    needed = [*files.values(), *([label_file] if label_file else []), truth_file]
    if all(file.is_file() for file in needed):
        return read_json(truth_file)
    case = make_channel_case(wanted.recipe, number)
    if wanted.layout == "msd4d":
        write_channels(next(iter(files.values())), list(case.images.values()))
    else:
        for channel, file in files.items():
            image = case.images[channel]
            write_image(file, np.ascontiguousarray(image.voxels), image.grid)
    if label_file is not None:
        write_mask(label_file, np.ascontiguousarray(case.label.voxels), case.label.grid)
    truth = _describe_case(wanted, number, case)
    write_json(truth_file, truth)
    return truth


def _describe_case(wanted: ChannelSet, number: int, case: ChannelCase) -> dict[str, Any]:
    """Return the content of the truth file."""
    grids = {}
    for channel, image in case.images.items():
        grids[channel] = {
            "shape_zyx": list(image.shape),
            # Rounded, because files store the spacing as float32.
            "spacing_mm_zyx": [round(mm, 4) for mm in image.spacing_mm],
            "orientation": image.grid.orientation,
        }
    truth = {"case": case_id(number), **case.truth, "grids": grids}
    if wanted.label_file(number) is None:
        return truth
    counts = np.bincount(case.label.voxels.ravel(), minlength=256)
    voxel_ml = case.label.grid.voxel_volume_ml
    volumes = {}
    for name, value in wanted.recipe.labels.values.items():
        volumes[name] = round(float(counts[value]) * voxel_ml, 2)
    if wanted.recipe.labels.has_region:
        volumes["liver"] = round(volumes["liver"] + volumes["tumour"], 2)
    return {**truth, "volumes_ml": volumes}


def _dataset_index(wanted: ChannelSet) -> dict[str, object]:
    """Return the content of dataset.json."""
    recipe = wanted.recipe
    channels = {str(index): name for index, name in enumerate(recipe.channels)}
    index: dict[str, object] = {
        "name": "Abdomen phantom",
        "description": f"Synthetic abdomen scans: {wanted.settings}",
        "reference": "liverseg_dist",
        "licence": "CC0-1.0",
        "release": "1.0",
        "numTraining": wanted.cases,
    }
    if wanted.layout == "nnunet":
        index |= {
            "channel_names": channels,
            "labels": recipe.labels.nnunet_labels(),
            "file_ending": ".nii.gz",
        }
        if recipe.labels.has_region:
            index["regions_class_order"] = list(recipe.labels.values.values())
        return index
    training = []
    for number in range(wanted.cases):
        name = f"{case_id(number)}.nii.gz"
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    tests = [f"./imagesTs/{case_id(n)}.nii.gz" for n in wanted.case_numbers() if n >= FIRST_TEST]
    return index | {
        "tensorImageSize": "4D" if wanted.layout == "msd4d" else "3D",
        "modality": channels,
        "labels": recipe.labels.decathlon_labels(),
        "numTest": len(tests),
        "training": training,
        "test": tests,
    }
