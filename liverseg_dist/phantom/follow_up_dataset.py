"""A folder of followed phantom patients in the layout of Task03_Liver: `liver_3_t0`, `liver_3_t1`
... are one patient.

`truth/liver_3.json` holds what is known of patient 3 and is written after its scans, so that a run
that was stopped continues there; `follow_up.json` collects all of them, `patients.csv` states which
scans are of one patient (for splits), `visits.csv` is the table of `liverseg follow --table`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.data.io.nifti import write_image, write_mask
from liverseg_dist.errors import UserError
from liverseg_dist.files import write_json, write_text
from liverseg_dist.phantom.folder import SETTINGS
from liverseg_dist.phantom.follow_up import make_follow_up
from liverseg_dist.phantom.grids import Size

GENERATION = 1
"""Raised when the same seed gives other patients than before."""
TRUTH = "follow_up.json"
VISITS = "visits.csv"
FIRST_DAY = date(2024, 1, 1)
"""Of every baseline in `visits.csv`; phantoms have days, and tables of patients have dates."""


@dataclass(frozen=True)
class FollowUpSet:
    """What the bytes depend on, and how many patients there are; `dates` counts the baseline."""

    folder: Path
    patients: int
    dates: int
    seed: int = 0
    size: Size = "small"
    hard: bool = False

    @property
    def settings(self) -> dict[str, object]:
        return {
            "follow_up_generation": GENERATION,
            "dates": self.dates,
            "seed": self.seed,
            "size": self.size,
            "difficulty": "hard" if self.hard else "easy",
        }

    def names(self, patient: int) -> list[str]:
        return [f"liver_{patient}_t{date}" for date in range(self.dates)]

    def truth_file(self, patient: int) -> Path:
        return self.folder / "truth" / f"liver_{patient}.json"


def write_follow_ups(wanted: FollowUpSet, done: Callable[[str], None]) -> list[dict[str, Any]]:
    """Make every patient that is not there yet; returns the truth about all.

    Raises:
        UserError: The folder holds something else.
    """
    check_follow_up_folder(wanted)
    for name in ("imagesTr", "labelsTr", "truth"):
        (wanted.folder / name).mkdir(parents=True, exist_ok=True)
    # Before the scans: an interrupted run leaves a folder that is recognised as its own.
    write_json(wanted.folder / SETTINGS, wanted.settings)
    truths = []
    for patient in range(wanted.patients):
        truths.append(_write_patient(wanted, patient))
        done(f"liver_{patient}")
    rows = ["case,patient"]
    for patient in range(wanted.patients):
        rows += [f"{name},patient_{patient}" for name in wanted.names(patient)]
    write_text(wanted.folder / "patients.csv", "\n".join(rows) + "\n")
    write_text(wanted.folder / VISITS, "\n".join(_visits(truths)) + "\n")
    write_json(wanted.folder / TRUTH, {"schema": 1, "coordinates": "RAS+, mm", "patients": truths})
    write_json(wanted.folder / "dataset.json", _index(wanted))
    return truths


def check_follow_up_folder(wanted: FollowUpSet) -> None:
    """Refuse a folder that is neither new nor one of the same patients. Raises `UserError`; writes
    nothing."""
    folder, mark = wanted.folder, wanted.folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; give a new folder")
    if not mark.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty and no phantom set; give a new folder")
        return
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{mark}: not readable as JSON; give another folder") from None
    if before != wanted.settings:
        raise UserError(
            f"{folder}: holds phantoms made with {before}, not {wanted.settings}; give another folder"
        )


def _write_patient(wanted: FollowUpSet, patient: int) -> dict[str, Any]:
    names, file = wanted.names(patient), wanted.truth_file(patient)
    # The truth is written after all scans of the patient, so these are complete.
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    followed = make_follow_up(wanted.seed, patient, wanted.dates, wanted.size, wanted.hard)
    for name, scan in zip(names, followed.scans, strict=True):
        image, label = scan.image, scan.label
        write_image(
            wanted.folder / "imagesTr" / f"{name}.nii.gz",
            np.ascontiguousarray(image.voxels),
            image.grid,
        )
        write_mask(
            wanted.folder / "labelsTr" / f"{name}.nii.gz",
            np.ascontiguousarray(label.voxels),
            label.grid,
        )
    truth = {"patient": f"patient_{patient}", **followed.truth(names)}
    write_json(file, truth)
    return truth


def _visits(truths: list[dict[str, Any]]) -> list[str]:
    rows = ["patient,date,scan,image"]
    for truth in truths:
        for name, day in zip(truth["scans"], truth["days"], strict=True):
            when = FIRST_DAY + timedelta(days=day)
            rows.append(f"{truth['patient']},{when},labelsTr/{name}.nii.gz,imagesTr/{name}.nii.gz")
    return rows


def _index(wanted: FollowUpSet) -> dict[str, object]:
    training = []
    for patient in range(wanted.patients):
        for name in wanted.names(patient):
            training.append(
                {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            )
    return {
        "name": "Liver phantom, followed",
        "description": f"Synthetic abdomen CTs: {wanted.settings}",
        "licence": "CC0-1.0",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
    }
