"""Data sets of DICOM scans: one folder (or ZIP) per case, with its label.

    dataset.json  case_a/ct/IM0001.dcm ...  case_a/label.nii.gz      the label as NIfTI
                  case_b/ct/IM0001.dcm ...  case_b/segmentation.dcm  the label as DICOM SEG

An RTSTRUCT is read like a SEG. `dataset.json` is optional; it names the labels (and channels) as for
NIfTI. A SEG names its segments itself. Cases without a label are test cases. Scans with one PatientID
stay together in the splits. Case ids are pseudonyms (`dicom_names`), unless the names of the folders
are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from liverseg_dist.config import ChannelConfig
from liverseg_dist.data.io.dataset_case import Cases, DatasetCase
from liverseg_dist.data.io.dataset_folder import is_file, list_entries
from liverseg_dist.data.io.dicom_files import DicomFile, walk_files
from liverseg_dist.data.io.dicom_segments import is_segmentation, list_segment_names
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.data.io.dicom_sources import DicomOptions, has_dicom_files, name_scan
from liverseg_dist.data.io.source_labels import SourceLabels, labels_of_files
from liverseg_dist.errors import UserError, printable
from liverseg_dist.optional_packages import require_dicom
from liverseg_dist.texts.names import is_scan_name

MIN_CASES_OF_ANONYMISED = 3
"""Two scans of one patient are a follow-up; more with one PatientID are probably anonymised."""
MAX_SEARCHED_FILES = 8
"""A SEG lies alone or with few other files in its folder; folders of images are not searched."""


@dataclass(frozen=True)
class DicomCases:
    """The cases of a folder, and the labels that their SEGs name (None for NIfTI labels)."""

    training: Cases
    test: Cases
    labels: SourceLabels | None


def is_dicom_dataset(folder: Path) -> bool:
    """Whether a folder has at least one folder or ZIP with DICOM files, and no imagesTr."""
    if (folder / "imagesTr").exists() or (folder / "imagesTs").exists():
        return False
    return any(_is_case(entry) for entry in list_entries(folder))


def _is_case(entry: Path) -> bool:
    if entry.name.startswith("."):
        return False
    return (entry.is_dir() or entry.suffix.lower() == ".zip") and has_dicom_files(entry)


def list_dicom_cases(
    folder: Path, channels: Sequence[ChannelConfig], options: DicomOptions | None = None
) -> DicomCases:
    """List the cases without reading their images.

    Args:
        folder: the data set.
        channels: of the data set; a series is one channel.
        options: selection and naming of the series; None for the defaults.

    Raises:
        UserError: the packages for DICOM are not installed, a case has several labels, or some
            labels are NIfTI and others DICOM.
    """
    require_dicom()
    if len(channels) > 1:
        names_of_channels = ", ".join(channel.name for channel in channels)
        raise UserError(
            f"{printable(folder)}: a DICOM series is one channel, but the data set has "
            f"{len(channels)} ({names_of_channels}); write NIfTI with liverseg to-nifti first"
        )
    options = options or DicomOptions()
    training: list[DatasetCase] = []
    test: list[DatasetCase] = []
    names: set[str] = set()
    for entry in list_entries(folder):
        if not _is_case(entry):
            continue
        scan = name_scan((entry,), options)
        label, structures = _find_label(entry, scan.name)
        names |= {name for name, _ in structures}
        case = DatasetCase(scan.name, scan, label, structure_files=structures)
        (training if case.has_label else test).append(case)
    if names and any(case.label is not None for case in training):
        raise UserError(
            f"{printable(folder)}: some labels are NIfTI and others DICOM SEG; use one kind"
        )
    training, test = _forget_shared_patient(training, test)
    labels = labels_of_files(printable(folder), sorted(names)) if names else None
    return DicomCases(tuple(training), tuple(test), labels)


def _forget_shared_patient(
    training: list[DatasetCase], test: list[DatasetCase]
) -> tuple[list[DatasetCase], list[DatasetCase]]:
    """Drop the patient where all cases have the same one: anonymised sets often have one PatientID
    for all."""
    cases = [*training, *test]
    patients = {case.patient for case in cases}
    if len(cases) < MIN_CASES_OF_ANONYMISED or len(patients) > 1:
        return training, test
    forgotten = []
    for case in cases:
        assert isinstance(case.image, DicomScan)
        scan = replace(case.image, patient="")
        forgotten.append(replace(case, image=scan, images=(scan,)))
    return forgotten[: len(training)], forgotten[len(training) :]


def _find_label(entry: Path, name: str) -> tuple[Path | None, tuple[tuple[str, Path], ...]]:
    """The NIfTI label of a case, or the structures of its SEG with the file for each."""
    nifti: list[Path] = []
    segmentations: list[Path] = []
    by_folder: dict[Path, list[Path]] = {}
    if not entry.is_dir():
        return None, ()
    for path in walk_files(entry, name):
        if is_scan_name(path.name) and is_file(path):
            nifti.append(path)
        else:
            by_folder.setdefault(path.parent, []).append(path)
    if len(nifti) > 1:
        raise UserError(f"{name}: the case has {len(nifti)} NIfTI files; one label is read")
    if nifti:
        return nifti[0], ()
    for files in by_folder.values():
        # The first bytes of each image would have to be read otherwise, twice.
        candidates = files if len(files) <= MAX_SEARCHED_FILES else _named_like_labels(files)
        for path in candidates:
            file = DicomFile(1, path)
            if file.is_dicom and is_segmentation(file):
                segmentations.append(path)
    if len(segmentations) > 1:
        raise UserError(f"{name}: the case has {len(segmentations)} DICOM SEGs; one is read")
    if not segmentations:
        return None, ()
    structures = dict.fromkeys(one.structure for one in list_segment_names(segmentations[0]))
    return None, tuple((structure, segmentations[0]) for structure in structures)


def _named_like_labels(files: Sequence[Path]) -> list[Path]:
    return [path for path in files if "seg" in path.name.lower() or "label" in path.name.lower()]
