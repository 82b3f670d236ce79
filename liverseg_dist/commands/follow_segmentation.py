"""`liverseg follow --run`: the masks of a patient or of a table of patients, made by a run first."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from liverseg_dist.commands.follow_cohort import PatientScans, Prepare
from liverseg_dist.commands.predict import load_prediction
from liverseg_dist.commands.segment_scans import segment_scans
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import UserError, printable
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.names import derive_scan_id, fold_id


def name_scans(files: Sequence[Path], labels: Sequence[str]) -> dict[Path, str] | None:
    """Ids for scans whose file names are not unique, such as `march/ct.nii.gz` and `june/ct.nii.gz`.

    Args:
        files: the scans.
        labels: what makes each scan unique, such as its patient and date.

    Returns:
        None where the file names are unique; else the id of each file: file name and label.
    """
    by_id: dict[str, Path] = {}
    for file in files:
        by_id.setdefault(fold_id(derive_scan_id(file.name)), file)
    if len(by_id) == len(set(files)):
        return None
    names: dict[Path, str] = {}
    for file, label in zip(files, labels, strict=True):
        names.setdefault(file, f"{derive_scan_id(file.name)}_{label}")
    return names


def segment_patients(
    args: argparse.Namespace, patients: list[PatientScans], overrides: list[str], world: World
) -> tuple[list[PatientScans], LabelScheme, Prepare]:
    """Plan the segmentation of a table whose column `scan` names scans.

    Returns:
        The patients with the masks that the run will write and the scans as images, the labels of
        the run, and what segments the scans.
    """
    keep_freed_memory()
    files, labels = [], []
    for number, patient in enumerate(patients, start=1):
        for file, date in zip(patient.masks, patient.dates, strict=True):
            files.append(file)
            # The patient's number in the table: a patient's name may hold any characters.
            labels.append(f"patient_{number}_{date}")
    settings = argparse.Namespace(**{**vars(args), "out": args.out / "masks"})
    job, scans = load_prediction(settings, overrides, files, world, name_scans(files, labels))
    mask_of_file = {}
    scan_of_mask = {}
    for scan in scans:
        mask = job.get_mask_file(scan.scan_id)
        scan_of_mask[mask] = scan.scan_id
        for source in scan.paths:
            # A DICOM series is one source of many files.
            for path in source.paths if isinstance(source, DicomScan) else (source,):
                mask_of_file[path] = mask
    planned = []
    for patient in patients:
        if any(file not in mask_of_file for file in patient.masks):
            raise UserError(
                f"--table: a DICOM folder of patient {printable(patient.patient)} has several "
                "scans; name one in each row"
            )
        masks = tuple(mask_of_file[file] for file in patient.masks)
        planned.append(replace(patient, masks=masks, images=patient.masks))

    def segment(watch: HeartbeatMonitor) -> dict[Path, str]:
        failed = segment_scans(job, scans, world, watch)
        reasons = job.ledger.failures()
        missing = {}
        for mask, scan_id in scan_of_mask.items():
            if scan_id in failed:
                missing[mask] = reasons.get(scan_id, f"{scan_id}: could not be segmented")
        return missing

    return planned, job.labels, segment
