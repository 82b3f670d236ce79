"""Read a folder in the layout of the Medical Segmentation Decathlon (Task03_Liver).

    dataset.json  imagesTr/liver_0.nii.gz  labelsTr/liver_0.nii.gz  imagesTs/liver_1.nii.gz

`read_dataset(folder)` lists the cases without opening a scan. `dataset.json` is untrusted: its paths may not be
absolute or climb out of the folder (`..`). Links placed in the folder are followed, because data sets on clusters
often are folders of links; a warning names those that lead out of it. A file that is named but missing does not stop
the others: it becomes a finding of its case. Without a `dataset.json`, or with one that lists no scans (nnU-Net's since
version 2), images and labels are paired by file name.
Ids follow `texts.names`. MONAI's lists have `testing` for `test`.
"""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liverseg_dist.data.findings import Finding, is_valid_case_id
from liverseg_dist.data.io.dataset_folder import (
    MACOS_METADATA_PREFIX,
    SUBFOLDERS,
    FileFinder,
    describe_contents,
    find_unread_files,
    is_file,
    list_entries,
    parse_relative_path,
)
from liverseg_dist.data.io.modality import MODALITY_KEYS, check_modality
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import CLASS_NAMES
from liverseg_dist.texts.names import (
    SUFFIXES,
    assign_scan_ids,
    derive_pairing_key,
    derive_scan_id,
    fold_id,
    get_file_name,
    is_scan_name,
    list_some,
)
from liverseg_dist.texts.structured import read_json

INDEX_FILE = "dataset.json"
MAX_INDEX_BYTES = 64 << 20
MAX_ID_BYTES = 200
MAX_DIGITS = 9
TEST_KEYS = ("test", "testing")
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


FilePair = tuple[Path, Path | None]
"""Image and label of a case, as the index names them."""


@dataclass(frozen=True)
class DatasetCase:
    """One scan. `label` is None where there is none, by design or because the file is missing (then a finding)."""

    case_id: str
    image: Path
    label: Path | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class DatasetIndex:
    name: str
    training: tuple[DatasetCase, ...]
    test: tuple[DatasetCase, ...]
    notes: tuple[Finding, ...] = ()
    """About the data set as a whole."""


def read_dataset(folder: Path | str) -> DatasetIndex:
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
    index = folder / INDEX_FILE
    has_index = index.exists() or index.is_symlink()
    dataset = _from_index(folder, index) if has_index else _from_names(folder)
    _check_ids(folder, dataset)
    cases = (*dataset.training, *dataset.test)
    used = {path for case in cases for path in (case.image, case.label) if path is not None}
    listed = INDEX_FILE if not any(note.code == "no_index" for note in dataset.notes) else None
    left_out = find_unread_files(folder, used, listed)
    return replace(dataset, notes=(*dataset.notes, *left_out, *_outside(folder, dataset)))


# --- with dataset.json ------------------------------------------------------------------------------------------------


def _from_index(folder: Path, index: Path) -> DatasetIndex:
    content = _read_index(index)
    notes = [*_check_labels(content, index), *_modality_notes(content, index)]
    notes += _unread_notes(content)
    if not content.keys() & {"training", *TEST_KEYS}:
        named = _from_names(folder)
        return replace(named, notes=(*notes, *named.notes))
    training_files = [
        _training_files(folder, index, entry) for entry in _entries(content, "training", index)
    ]
    test_files = [
        _test_files(folder, index, entry)
        for key in TEST_KEYS
        for entry in _entries(content, key, index)
    ]
    training, test = _listed_cases(training_files, test_files)
    if not training and not test:
        raise UserError(f"{printable(index)}: names no scan under training or test")
    for key, cases in (("numTraining", training), ("numTest", test)):
        claimed = content.get(key)
        if isinstance(claimed, int) and claimed != len(cases):
            notes.append(
                Finding(
                    "warning",
                    "case_count",
                    f"{INDEX_FILE} says {key} {claimed} but lists {len(cases)}",
                )
            )
    name = content.get("name")
    return DatasetIndex(
        printable(name if isinstance(name, str) and name else folder.resolve().name)[:MAX_ID_BYTES],
        _sorted(training),
        _sorted(test),
        tuple(notes),
    )


def _read_index(index: Path) -> dict[str, Any]:
    if not index.is_file():
        raise UserError(f"{printable(index)}: not a file (a broken link?)")
    content = read_json(index, most_bytes=MAX_INDEX_BYTES)
    if not isinstance(content, dict):
        raise UserError(
            f"{printable(index)}: expected a JSON object with training, test and labels"
        )
    return content


def _check_labels(content: dict[str, Any], index: Path) -> list[Finding]:
    """Raises `UserError` for other labels than ours."""
    labels = content.get("labels")
    if labels is None:
        text = f"{INDEX_FILE} names no labels; their voxels are read as {EXPECTED_LABELS}"
        return [Finding("warning", "labels_unnamed", text)]
    if not isinstance(labels, dict):
        raise UserError(f"{printable(index)}: labels are no mapping; expected {EXPECTED_LABELS}")
    # nnU-Net's region of liver and tumour: the files hold 0, 1 and 2 as well
    labels = {key: 1 if value in ([1, 2], ["1", "2"]) else value for key, value in labels.items()}
    by_value = {_label_number(key): value for key, value in labels.items()}
    if all(
        isinstance(_label_number(value), int) for value in labels.values()
    ):  # nnU-Net writes name: number
        by_value = {_label_number(value): key for key, value in labels.items()}
    named = ", ".join(f"{value} {name}" for value, name in by_value.items()) or "none"
    if len(by_value) != len(labels) or set(by_value) != set(range(len(CLASS_NAMES))):
        raise UserError(
            f"{printable(index)}: labels are {printable(named)}; expected {EXPECTED_LABELS}"
        )
    for value, known in enumerate(SYNONYMS):
        if str(by_value[value]).strip().lower() not in known:
            raise UserError(
                f"{printable(index)}: labels are {printable(named)}; expected {EXPECTED_LABELS}"
            )
    return []


def _label_number(value: object) -> object:
    """1 for 1, "1", "01" and 1.0; anything else as it is."""
    if (
        isinstance(value, str)
        and value.strip().isascii()
        and value.strip().isdigit()
        and len(value) < MAX_DIGITS
    ):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return printable(value) if isinstance(value, bool | list | dict) else value


def _unread_notes(content: dict[str, Any]) -> list[Finding]:
    """Of what looks like scans, or like a division of them, and is not read."""
    notes = []
    if isinstance(content.get("dataset"), dict):
        text = f"{INDEX_FILE} lists scans under `dataset` (nnU-Net), which is not read; training and test, or file names, are"
        notes.append(Finding("warning", "unread_list", text))
    ending = content.get("file_ending", SUFFIXES[0])
    if isinstance(ending, str) and not ending.lower().endswith(SUFFIXES):
        text = f"{INDEX_FILE} says file_ending {printable(ending)}, which is not read; convert the scans to .nii.gz"
        notes.append(Finding("warning", "file_ending", text))
    for key, value in content.items():
        if (
            key not in ("training", *TEST_KEYS)
            and isinstance(value, list)
            and any(map(_names_an_image, value))
        ):
            text = f"{INDEX_FILE} lists {len(value)} scans under {printable(key)}, which is not read; training and test are"
            notes.append(Finding("warning", "unread_list", text))
    training = content.get("training")
    if isinstance(training, list) and any(
        isinstance(entry, dict) and "fold" in entry for entry in training
    ):
        text = f"{INDEX_FILE} names a fold for scans, which is not read; convert.splits.kind=file takes folds from a file"
        notes.append(Finding("warning", "unread_folds", text))
    return notes


def _names_an_image(entry: object) -> bool:
    name = entry.get("image") if isinstance(entry, dict) else entry
    return isinstance(name, str) and is_scan_name(get_file_name(name))


def _modality_notes(content: dict[str, Any], index: Path) -> list[Finding]:
    modality = next((content[key] for key in MODALITY_KEYS if content.get(key) is not None), None)
    if modality is None:
        return []
    names = modality
    if not isinstance(names, list):
        names = list(modality.values()) if isinstance(modality, dict) else [modality]
    if len(names) != 1:
        raise UserError(
            f"{printable(index)}: {len(names)} modalities; liver CTs have one channel of HU"
        )
    return check_modality(INDEX_FILE, names)


def _entries(content: dict[str, Any], key: str, index: Path) -> list[Any]:
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise UserError(
            f"{printable(index)}: {key} is a list of files, not {type(entries).__name__}"
        )
    return [entry for entry in entries if not _is_ghost(entry)]


def _is_ghost(entry: object) -> bool:
    name = entry.get("image") if isinstance(entry, dict) else entry
    return isinstance(name, str) and get_file_name(name).startswith(MACOS_METADATA_PREFIX)


def _training_files(folder: Path, index: Path, entry: object) -> FilePair:
    if not isinstance(entry, dict) or "image" not in entry:
        raise UserError(
            f'{printable(index)}: a training entry is {{"image": ..., "label": ...}}, not {_shown(entry)}'
        )
    label = entry.get("label")
    image = _inside(folder, index, entry["image"])
    return image, None if label is None else _inside(folder, index, label)


def _test_files(folder: Path, index: Path, entry: object) -> FilePair:
    name = entry.get("image") if isinstance(entry, dict) else entry
    label = entry.get("label") if isinstance(entry, dict) else None
    return _inside(folder, index, name), None if label is None else _inside(folder, index, label)


def _inside(folder: Path, index: Path, name: object) -> Path:
    """A path of `dataset.json`, which may not leave the folder."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{printable(index)}: a file name is expected, not {_shown(name)}")
    path = parse_relative_path(name)
    if path is None:
        raise UserError(
            f"{printable(index)}: {_shown(name)} leaves the data set's folder; paths are relative to it"
        )
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise UserError(f"{printable(index)}: {_shown(name)} cannot name a case; rename the file")
    return folder / path


def _listed_cases(
    training: list[FilePair], test: list[FilePair]
) -> tuple[list[DatasetCase], list[DatasetCase]]:
    """Cases of the index. Its own image names give the ids, whatever the files that were found are called."""
    both = [*training, *test]
    stems = {
        derive_scan_id(label.name, keep_channel=True) for _, label in both if label is not None
    }
    ids = assign_scan_ids((image.name for image, _ in both), stems).ids
    finder = FileFinder()

    def make_case(files: FilePair) -> DatasetCase:
        image, label = files
        # What looks like a further channel is a scan of its own if the index lists it.
        name = ids.get(image.name) or derive_scan_id(image.name, keep_channel=True)
        return _listed_case(name, image, label, finder)

    return [make_case(files) for files in training], [make_case(files) for files in test]


def _listed_case(case_id: str, image: Path, label: Path | None, finder: FileFinder) -> DatasetCase:
    findings = []
    image_file, problem = finder.find(image)
    if problem is not None:
        findings.append(
            Finding("error", "image_missing", f"{INDEX_FILE} names {_tail(image)}, {problem}")
        )
    label_file = None
    if label is not None:
        label_file, problem = finder.find(label)
        if problem is not None:
            findings.append(
                Finding("warning", "label_missing", f"{INDEX_FILE} names {_tail(label)}, {problem}")
            )
            label_file = None
    return DatasetCase(case_id, image_file, label_file, tuple(findings))


# --- without ----------------------------------------------------------------------------------------------------------


def _from_names(folder: Path) -> DatasetIndex:
    images, tests, label_files = (_scans(folder / part) for part in SUBFOLDERS)
    said = f"{INDEX_FILE} lists no scans" if (folder / INDEX_FILE).exists() else f"no {INDEX_FILE}"
    if not images and not tests:
        found = describe_contents(folder)
        raise UserError(
            f"{printable(folder)}: {said}, and no scans (.nii, .nii.gz) in imagesTr/ or imagesTs/; "
            f"expected a Task03_Liver folder{'; ' if found else ''}{found}"
        )
    notes = [Finding("warning", "no_index", f"{said}: images and labels are paired by file name")]
    stems = {derive_scan_id(path.name, keep_channel=True) for path in label_files}
    labels = _labels_by_key(folder, label_files)
    names = assign_scan_ids((path.name for path in images), stems)
    test_names = assign_scan_ids((path.name for path in tests), stems)
    training = [
        _named_case(path, names.ids[path.name], labels) for path in images if path.name in names.ids
    ]
    test = [
        DatasetCase(test_names.ids[path.name], path)
        for path in tests
        if path.name in test_names.ids
    ]
    channels = [*names.channels, *test_names.channels]
    if channels:
        text = "further channels of a scan (nnU-Net's _0001 and so on) are not read, a CT has one"
        some = list_some([printable(name) for name in channels])
        notes.append(
            Finding(
                "warning",
                "channels",
                f"{text}: {some}; if they are scans of their own, rename them",
            )
        )
    paired = {case.label for case in training}
    unpaired = [printable(path.name) for path in label_files if path not in paired]
    if unpaired:
        text = f"{len(unpaired)} label(s) without an image: {list_some(unpaired)}"
        notes.append(Finding("warning", "label_without_image", text))
    return DatasetIndex(folder.resolve().name, _sorted(training), _sorted(test), tuple(notes))


def _scans(folder: Path) -> list[Path]:
    return [path for path in list_entries(folder) if is_scan_name(path.name) and is_file(path)]


def _labels_by_key(folder: Path, files: list[Path]) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    for path in files:
        key = derive_pairing_key(derive_scan_id(path.name, keep_channel=True))
        if key in labels:
            both = f"{_tail(labels[key])} and {_tail(path)}"
            raise UserError(f"{printable(folder)}: {both} are labels of the same case; remove one")
        labels[key] = path
    return labels


def _named_case(image: Path, case_id: str, labels: dict[str, Path]) -> DatasetCase:
    label = labels.get(derive_pairing_key(case_id))
    findings: tuple[Finding, ...] = ()
    if label is None:
        findings = (
            Finding("warning", "label_missing", f"no label of that name for {_tail(image)}"),
        )
    return DatasetCase(case_id, image, label, findings)


# --- both -------------------------------------------------------------------------------------------------------------


def _sorted(cases: Iterable[DatasetCase]) -> tuple[DatasetCase, ...]:
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _check_ids(folder: Path, dataset: DatasetIndex) -> None:
    seen: dict[str, DatasetCase] = {}
    for case in (*dataset.training, *dataset.test):
        name = case.case_id
        if not is_valid_case_id(name) or len(name.encode("utf-8", "replace")) > MAX_ID_BYTES:
            raise UserError(
                f"{printable(folder)}: '{printable(name)}' cannot name a case; rename the file"
            )
        other = seen.setdefault(fold_id(name), case)
        if other is not case:
            both = f"{_tail(other.image)} and {_tail(case.image)}"
            same = "" if other.case_id == name else " (case does not count)"
            raise UserError(
                f"{printable(folder)}: two scans are called {printable(name)}{same}, {both}; "
                "case names must differ: rename or remove one"
            )


def _outside(folder: Path, dataset: DatasetIndex) -> list[Finding]:
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
