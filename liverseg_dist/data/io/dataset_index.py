"""Read a folder in the layout of the Medical Segmentation Decathlon (Task03_Liver).

    dataset.json  imagesTr/liver_0.nii.gz  labelsTr/liver_0.nii.gz  imagesTs/liver_1.nii.gz

`read_dataset(folder)` lists the cases without opening a scan. `dataset.json` is untrusted: its paths may not be
absolute or climb out of the folder (`..`). Links placed in the folder are followed, because data sets on clusters
often are folders of links; a warning tells of those that lead out of it. A file that is named but missing does not stop
the others: it becomes a finding of its case. Without a `dataset.json`, or with one that lists no scans (nnU-Net's since
version 2), images and labels are paired by file name. Of nnU-Net's image names the channel, `_0000`, is no part of the
case's; MONAI's lists say `testing` for `test`.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from liverseg_dist.data.audit.findings import Finding, is_valid_case_id
from liverseg_dist.data.io.nifti import SUFFIXES
from liverseg_dist.data.modality import KEYS, check_modality
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import CLASS_NAMES

INDEX = "dataset.json"
MAX_INDEX_BYTES = 64 << 20
MAX_ID_BYTES = 200
TEST_KEYS = ("test", "testing")
CHANNEL = "_0000"
"""nnU-Net numbers the channels of images."""
EXPECTED_LABELS = "0 background, 1 liver, 2 tumour (or cancer)"
SYNONYMS = (
    ("background",),
    ("liver",),
    (
        "tumour",
        "tumor",
        "cancer",
        "lesion",
        "liver tumour",
        "liver tumor",
        "liver_tumour",
        "liver_tumor",
    ),
)


@dataclass(frozen=True)
class MsdCase:
    """One scan. `label` is None where there is none, by design or because the file is missing (then a finding)."""

    case_id: str
    image: Path
    label: Path | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class MsdDataset:
    name: str
    training: tuple[MsdCase, ...]
    test: tuple[MsdCase, ...]
    notes: tuple[Finding, ...] = ()
    """About the data set as a whole."""


def read_dataset(folder: Path | str) -> MsdDataset:
    """The cases of a data set, each part sorted by id. Raises `UserError` when the folder is no such data set."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(
            f"{printable(folder)}: no such folder; a Task03_Liver folder holds dataset.json and imagesTr/"
        )
    if not folder.is_dir():
        raise UserError(
            f"{printable(folder)}: not a folder; give the one that holds dataset.json and imagesTr/"
        )
    index = folder / INDEX
    dataset = (
        _from_index(folder, index) if index.exists() or index.is_symlink() else _from_names(folder)
    )
    _check_ids(folder, dataset)
    return replace(dataset, notes=(*dataset.notes, *_outside(folder, dataset)))


def case_id_of(path: PurePosixPath | Path) -> str:
    """File name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


# --- with dataset.json ------------------------------------------------------------------------------------------------


def _from_index(folder: Path, index: Path) -> MsdDataset:
    content = _read_json(index)
    notes = [*_check_labels(content, index), *_modality_notes(content, index)]
    if not content.keys() & {"training", *TEST_KEYS}:
        named = _from_names(folder)
        return replace(named, notes=(*notes, *named.notes))
    notes += _unread_notes(content)
    training = [
        _training_case(folder, index, entry) for entry in _entries(content, "training", index)
    ]
    test = [
        _test_case(folder, index, entry)
        for key in TEST_KEYS
        for entry in _entries(content, key, index)
    ]
    if any(case.image.name.startswith(f"{case.case_id}{CHANNEL}.") for case in training):
        test = [replace(case, case_id=case.case_id.removesuffix(CHANNEL)) for case in test]
    if not training and not test:
        raise UserError(f"{printable(index)}: names no scan under training or test")
    for key, cases in (("numTraining", training), ("numTest", test)):
        claimed = content.get(key)
        if isinstance(claimed, int) and claimed != len(cases):
            notes.append(
                Finding(
                    "warning", "case_count", f"{INDEX} says {key} {claimed} but lists {len(cases)}"
                )
            )
    name = content.get("name")
    return MsdDataset(
        printable(name if isinstance(name, str) and name else folder.resolve().name)[:MAX_ID_BYTES],
        _sorted(training),
        _sorted(test),
        tuple(notes),
    )


def _read_json(index: Path) -> dict[str, Any]:
    try:
        if not index.is_file():
            raise UserError(f"{printable(index)}: not a file (a broken link?)")
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise UserError(
                f"{printable(index)}: larger than {MAX_INDEX_BYTES >> 20} MiB; not a dataset.json"
            )
        content = json.loads(index.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{printable(index)}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(index)}: not valid JSON: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{printable(index)}: expected a JSON object with training, test and labels"
        )
    return content


def _check_labels(content: dict[str, Any], index: Path) -> list[Finding]:
    """Raises `UserError` for other labels than ours."""
    labels = content.get("labels")
    if labels is None:
        text = f"{INDEX} names no labels; their voxels are read as {EXPECTED_LABELS}"
        return [Finding("warning", "labels_unnamed", text)]
    if not isinstance(labels, dict):
        raise UserError(f"{printable(index)}: labels are no mapping; expected {EXPECTED_LABELS}")
    # nnU-Net's region of liver and tumour: the files hold 0, 1 and 2 as well
    labels = {key: 1 if value == [1, 2] else value for key, value in labels.items()}
    by_value = {str(key): value for key, value in labels.items()}
    if all(isinstance(value, int) for value in labels.values()):  # nnU-Net writes name: number
        by_value = {str(value): key for key, value in labels.items()}
    named = ", ".join(f"{value} {name}" for value, name in by_value.items()) or "none"
    if set(by_value) != {str(n) for n in range(len(CLASS_NAMES))}:
        raise UserError(
            f"{printable(index)}: labels are {printable(named)}; expected {EXPECTED_LABELS}"
        )
    for value, known in enumerate(SYNONYMS):
        if str(by_value[str(value)]).strip().lower() not in known:
            raise UserError(
                f"{printable(index)}: labels are {printable(named)}; expected {EXPECTED_LABELS}"
            )
    return []


def _unread_notes(content: dict[str, Any]) -> list[Finding]:
    """Of what looks like scans, or like a division of them, and is not read."""
    notes = []
    for key, value in content.items():
        if (
            key not in ("training", *TEST_KEYS)
            and isinstance(value, list)
            and any(map(_names_an_image, value))
        ):
            text = f"{INDEX} lists {len(value)} scans under {printable(key)}, which is not read; training and test are"
            notes.append(Finding("warning", "unread_list", text))
    training = content.get("training")
    if isinstance(training, list) and any(
        isinstance(entry, dict) and "fold" in entry for entry in training
    ):
        text = f"{INDEX} names a fold for scans, which is not read; convert.splits.kind=file takes folds from a file"
        notes.append(Finding("warning", "unread_folds", text))
    return notes


def _names_an_image(entry: object) -> bool:
    name = entry.get("image") if isinstance(entry, dict) else entry
    return isinstance(name, str) and name.endswith(SUFFIXES)


def _modality_notes(content: dict[str, Any], index: Path) -> list[Finding]:
    modality = next((content[key] for key in KEYS if content.get(key) is not None), None)
    if modality is None:
        return []
    names = modality
    if not isinstance(names, list):
        names = list(modality.values()) if isinstance(modality, dict) else [modality]
    if len(names) != 1:
        raise UserError(
            f"{printable(index)}: {len(names)} modalities; liver CTs have one channel of HU"
        )
    return check_modality(INDEX, names)


def _entries(content: dict[str, Any], key: str, index: Path) -> list[Any]:
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise UserError(
            f"{printable(index)}: {key} is a list of files, not {type(entries).__name__}"
        )
    return [entry for entry in entries if not _is_ghost(entry)]


def _is_ghost(entry: object) -> bool:
    name = entry.get("image") if isinstance(entry, dict) else entry
    return isinstance(name, str) and PurePosixPath(name).name.startswith("._")


def _training_case(folder: Path, index: Path, entry: object) -> MsdCase:
    if not isinstance(entry, dict) or "image" not in entry:
        raise UserError(
            f'{printable(index)}: a training entry is {{"image": ..., "label": ...}}, not {_shown(entry)}'
        )
    image = _inside(folder, index, entry["image"])
    if entry.get("label") is None:
        return _case(image, None)
    return _case(image, _inside(folder, index, entry["label"]))


def _test_case(folder: Path, index: Path, entry: object) -> MsdCase:
    name = entry.get("image") if isinstance(entry, dict) else entry
    label = entry.get("label") if isinstance(entry, dict) else None
    return _case(
        _inside(folder, index, name), None if label is None else _inside(folder, index, label)
    )


def _inside(folder: Path, index: Path, name: object) -> Path:
    """A path of `dataset.json`, which may not leave the folder."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{printable(index)}: a file name is expected, not {_shown(name)}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise UserError(
            f"{printable(index)}: {_shown(name)} leaves the data set's folder; paths are relative to it"
        )
    return folder / path


def _case(image: Path, label: Path | None) -> MsdCase:
    findings, label_name = [], label
    if not _is_file(image):
        findings.append(
            Finding("error", "image_missing", f"{INDEX} names {_tail(image)}, which does not exist")
        )
    if label is not None and not _is_file(label):
        findings.append(
            Finding(
                "warning", "label_missing", f"{INDEX} names {_tail(label)}, which does not exist"
            )
        )
        label = None
    case_id = case_id_of(image)
    if label_name is not None and case_id == f"{case_id_of(label_name)}{CHANNEL}":
        case_id = case_id.removesuffix(CHANNEL)
    return MsdCase(case_id, image, label, tuple(findings))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


# --- without ----------------------------------------------------------------------------------------------------------


def _from_names(folder: Path) -> MsdDataset:
    images, tests = _scans(folder / "imagesTr"), _scans(folder / "imagesTs")
    if not images and not tests:
        raise UserError(
            f"{printable(folder)}: no {INDEX}, and no scans in imagesTr/ or imagesTs/; expected a Task03_Liver folder"
        )
    labels = {case_id_of(path): path for path in _scans(folder / "labelsTr")}
    training = [_named_case(path, labels) for path in images]
    unpaired = set(labels) - {case.case_id for case in training}
    said = f"{INDEX} lists no scans" if (folder / INDEX).exists() else f"no {INDEX}"
    notes = [Finding("warning", "no_index", f"{said}: images and labels are paired by file name")]
    if unpaired:
        some = ", ".join(map(printable, sorted(unpaired)[:3]))
        notes.append(
            Finding(
                "warning",
                "label_without_image",
                f"{len(unpaired)} label(s) without an image: {some}",
            )
        )
    test = [_named_case(path, {}, part_label=False) for path in tests]
    return MsdDataset(folder.resolve().name, _sorted(training), _sorted(test), tuple(notes))


def _scans(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.name.endswith(SUFFIXES) and not p.name.startswith(".") and _is_file(p)
    )


def _named_case(image: Path, labels: dict[str, Path], part_label: bool = True) -> MsdCase:
    case_id = case_id_of(image)
    if case_id not in labels and case_id.endswith(CHANNEL):
        case_id = case_id.removesuffix(CHANNEL)
    label = labels.get(case_id)
    findings: tuple[Finding, ...] = ()
    if label is None and part_label:
        findings = (
            Finding("warning", "label_missing", f"no label of that name for {_tail(image)}"),
        )
    return MsdCase(case_id, image, label, findings)


# --- both -------------------------------------------------------------------------------------------------------------


def _sorted(cases: Iterable[MsdCase]) -> tuple[MsdCase, ...]:
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _check_ids(folder: Path, dataset: MsdDataset) -> None:
    seen: set[str] = set()
    for case in (*dataset.training, *dataset.test):
        name = case.case_id
        if not is_valid_case_id(name) or len(name.encode("utf-8", "replace")) > MAX_ID_BYTES:
            raise UserError(
                f"{printable(folder)}: '{printable(name)}' cannot name a case; rename the file"
            )
        if name in seen:
            raise UserError(
                f"{printable(folder)}: two scans are called {printable(name)}; case names must differ"
            )
        seen.add(name)


def _outside(folder: Path, dataset: MsdDataset) -> list[Finding]:
    """A data set from elsewhere may link to scans that its user never meant to convert."""
    home = os.path.realpath(folder)
    linked = [
        case.case_id
        for case in (*dataset.training, *dataset.test)
        for path in (case.image, case.label)
        if path is not None and os.path.commonpath([home, os.path.realpath(path)]) != home
    ]
    if not linked:
        return []
    names = sorted(set(linked))
    some = ", ".join(map(printable, names[:3])) + (" ..." if len(names) > 3 else "")
    return [
        Finding(
            "warning",
            "link_outside",
            f"files of {len(names)} scan(s) are links out of the folder: {some}",
        )
    ]


def _tail(path: Path) -> str:
    return printable(f"{path.parent.name}/{path.name}")


def _shown(value: object) -> str:
    text = printable(value) if isinstance(value, str) else type(value).__name__
    return f"'{text[:80]}'" if isinstance(value, str) else text
