"""A folder of phantom CTs as DICOM: one folder per case with a series and its label as NIfTI.

    dataset.json  liver_0/ct/IM0001.dcm ...  liver_0/label.nii.gz

The scans are those of `phantom.dataset` for the same seed, size and difficulty. A series appears
complete or not at all, so a run that was stopped continues with the next case.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from liverseg_dist.data.io.nifti import write_mask
from liverseg_dist.errors import UserError
from liverseg_dist.files import write_json
from liverseg_dist.optional_packages import require_dicom
from liverseg_dist.phantom.dataset import FIRST_TEST, PhantomSet
from liverseg_dist.phantom.dicom_series import SeriesOptions, build_series, write_series
from liverseg_dist.phantom.folder import SETTINGS, check_phantom_folder, make_cases
from liverseg_dist.phantom.scan import make_scan

SERIES_FOLDER = "ct"
LABEL_FILE = "label.nii.gz"


def write_dicom_dataset(
    wanted: PhantomSet, workers: int, done: Callable[[str], None]
) -> list[Path]:
    """Create every case that does not exist. Returns the folders of the cases.

    Args:
        wanted: the set; its test cases have no label.
        workers: number of processes.
        done: called with the name of each case after it.

    Raises:
        UserError: the folder cannot be used, or the packages for DICOM are not installed.
    """
    require_dicom()
    check_dicom_folder(wanted)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    write_json(wanted.folder / SETTINGS, _settings(wanted))
    make_case = partial(_write_case, wanted)
    made = make_cases(
        make_case, wanted.case_numbers(), workers, lambda folder: done(str(folder.name))
    )
    # Last: a folder without this file is incomplete.
    index = {
        "name": "Liver phantom",
        "description": f"Synthetic abdomen CTs: {wanted.settings}",
        "licence": "CC0-1.0",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
    }
    write_json(wanted.folder / "dataset.json", index)
    return made


def check_dicom_folder(wanted: PhantomSet) -> None:
    """Check that the folder is new or has phantoms of the same settings. Writes nothing."""
    check_phantom_folder(wanted.folder, _settings(wanted), ())
    names = {f"liver_{number}" for number in wanted.case_numbers()}
    found = [path.name for path in wanted.folder.glob("liver_*") if path.name not in names]
    if found:
        raise UserError(
            f"{wanted.folder}: contains {len(found)} more cases than requested ({min(found)}); "
            "increase --cases and --test-cases, or give another folder"
        )


def _settings(wanted: PhantomSet) -> dict[str, object]:
    return {**wanted.settings, "format": "dicom"}


def _write_case(wanted: PhantomSet, number: int) -> Path:
    folder = wanted.folder / f"liver_{number}"
    series, label_file = folder / SERIES_FOLDER, folder / LABEL_FILE
    is_test = number >= FIRST_TEST
    if series.is_dir() and (is_test or label_file.is_file()):
        return folder
    scan = make_scan(wanted.seed, number, wanted.size, wanted.hard)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_test:
        write_mask(label_file, np.ascontiguousarray(scan.label.voxels), scan.label.grid)
    options = SeriesOptions(key=f"phantom {wanted.settings} {number}", description="Abdomen")
    write_series(series, build_series(scan.image, options))
    return folder
