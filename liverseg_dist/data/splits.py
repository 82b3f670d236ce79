"""Test set and folds: by patient, stratified by tumour burden, the same for the same cases on any machine."""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.config import SplitConfig
from liverseg_dist.config.shipped import find_config
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.matching import TableEntry, TableMatches, match_entries
from liverseg_dist.texts.names import (
    MAX_SHOWN,
    ScanIndex,
    derive_scan_id,
    fold_id,
    get_file_name,
    list_some,
)
from liverseg_dist.texts.structured import read_json
from liverseg_dist.texts.tables import read_table

log = logging.getLogger(__name__)
NNUNET_SEED = 12345
NNUNET_FOLDS = 5
PATIENTS_PURPOSE = "; convert.splits.patients is a CSV `case,patient`"
SPLIT_FORMS = '{"test": [...], "folds": [[...], ...]}, nor nnU-Net\'s splits_final.json'


@dataclass(frozen=True)
class Splits:
    test: tuple[str, ...]
    folds: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, list]:
        return {"test": list(self.test), "folds": [list(fold) for fold in self.folds]}


def make_splits(
    burden: Mapping[str, float],
    patients: Mapping[str, str],
    config: SplitConfig,
    held_out: Collection[str] = (),
    scans: Mapping[str, str] | None = None,
) -> Splits:
    """Splits of the labelled cases. `burden`: tumour over liver volume; `patients`: case to patient; `scans`: case to
    the scan it is a slab of (None: each is one), which `nnunet` and `file` mean. Raises `UserError`.

    `held_out`: labelled cases that the data set itself sets apart as a test set. With `stratified` and `nnunet` they
    are the test set, or part of it, and no fold holds another scan of their patients (`nnunet` knows no patients).
    """
    of_scan: dict[str, list[str]] = {}
    for case in burden:
        of_scan.setdefault(scans[case] if scans is not None else case, []).append(case)
    if config.kind == "file":
        return _split_by_file(config, of_scan)
    ours = {case: share for case, share in burden.items() if case not in held_out}
    if config.kind == "nnunet":
        folds = build_nnunet_folds(
            [scan for scan, cases in of_scan.items() if not set(held_out).intersection(cases)]
        )
        return Splits(
            tuple(sorted(held_out)), tuple(_collect_cases(fold, of_scan) for fold in folds)
        )
    apart = {patients[case] for case in held_out}
    test = {case for case in burden if patients[case] in apart}
    splits = _split_stratified(
        {case: share for case, share in ours.items() if case not in test}, patients, config
    )
    return Splits(tuple(sorted({*splits.test, *test})), splits.folds)


def build_nnunet_folds(
    case_ids: Sequence[str] | Mapping[str, float],
) -> tuple[tuple[str, ...], ...]:
    """Validation cases of nnU-Net's five folds: scikit-learn's KFold(5, shuffle, seed 12345) over the sorted ids.

    The shuffle is NumPy's legacy generator's, which is frozen; the first (n mod 5) folds have one case more.
    """
    ids = sorted(case_ids)
    if len(ids) < NNUNET_FOLDS:
        raise UserError(
            f"convert.splits.kind=nnunet needs {NNUNET_FOLDS} labelled cases, there are {len(ids)}"
        )
    order = np.arange(len(ids))
    np.random.RandomState(NNUNET_SEED).shuffle(order)
    sizes = [
        len(ids) // NNUNET_FOLDS + (fold < len(ids) % NNUNET_FOLDS) for fold in range(NNUNET_FOLDS)
    ]
    ends = np.cumsum(sizes)
    parts = (np.sort(order[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    return tuple(tuple(ids[i] for i in part) for part in parts)


def read_patients(path: Path | None, case_ids: Sequence[str]) -> dict[str, str]:
    """Case to patient, each called by their first case: from the CSV `case,patient`, else every case its own.

    Two spellings of a patient that differ in spaces, case or Unicode form are one patient: to take one patient for two
    would put their scans on both sides of a split. Raises `UserError`.
    """
    patients = {case_id: case_id for case_id in case_ids}
    if path is None:
        return patients
    named: dict[str, list[str]] = {}
    for case_id, entry in _match_patients(path, case_ids).by_scan.items():
        named.setdefault(fold_id(entry.value), []).append(case_id)
    for scans in (
        named.values()
    ):  # who is the same matters, not the name: a patient is called by their first scan
        patients.update(dict.fromkeys(scans, min(scans)))
    return patients


def _match_patients(path: Path, case_ids: Sequence[str]) -> TableMatches[str]:
    table = read_table(path, ("case", "patient"), PATIENTS_PURPOSE)
    entries = []
    for row in table.rows:
        if not row["case"] or not row["patient"]:
            raise UserError(
                f"{printable(path)}: line {row.line} lacks a case or a patient; the header is `case,patient`"
            )
        entries.append(TableEntry(f"line {row.line}", row["case"], row["patient"]))
    if not entries:
        raise UserError(f"{printable(path)}: has no rows{PATIENTS_PURPOSE}")
    return match_entries(path, entries, case_ids)


def _describe_patients(path: Path, case_ids: Sequence[str]) -> list[str]:
    matches = _match_patients(path, case_ids)
    lines = matches.describe(path, "so each counts as a patient of its own")
    spellings: dict[str, dict[str, str]] = {}
    for entry in matches.by_scan.values():
        spellings.setdefault(fold_id(entry.value), {}).setdefault(entry.value, entry.where)
    mixed = [where for where in spellings.values() if len(where) > 1]
    for places in mixed[:MAX_SHOWN]:  # names of patients stay in the file
        lines.append(
            f"{printable(path)}: {', '.join(places.values())}: spellings of one patient, taken as one"
        )
    return lines


def find_divided_patients(splits: Splits, patients: Mapping[str, str]) -> list[str]:
    """Patients with scans in more than one part: what a network learns of them in one part it is asked in another."""
    parts: dict[str, set[int]] = {}
    for number, part in enumerate((splits.test, *splits.folds)):
        for case_id in part:
            parts.setdefault(patients[case_id], set()).add(number)
    return sorted(patient for patient, numbers in parts.items() if len(numbers) > 1)


def _split_stratified(
    burden: Mapping[str, float], patients: Mapping[str, str], config: SplitConfig
) -> Splits:
    """Patients in order of burden are dealt out in rounds, one to each fold; neighbours in burden part.

    Within a round the order is drawn by a hash of the patients' names, so that one more case moves few others.
    """
    if not burden:
        return Splits((), tuple(() for _ in range(config.folds)))
    groups: dict[str, list[str]] = {}
    for case_id in sorted(burden):
        groups.setdefault(patients[case_id], []).append(case_id)
    ordered = sorted(
        groups, key=lambda patient: (max(burden[case] for case in groups[patient]), patient)
    )
    count = len(ordered)
    # Every fold needs a patient to validate on and one to train on before any can be held out.
    wanted = round(config.test_fraction * count)
    test_count = max(0, min(wanted, count - min(config.folds, max(2, count))))
    places = (
        {int((i + 0.5) * count / test_count) for i in range(test_count)} if test_count else set()
    )
    test = [patient for place, patient in enumerate(ordered) if place in places]
    rest = [patient for place, patient in enumerate(ordered) if place not in places]
    folds: list[list[str]] = [[] for _ in range(min(config.folds, max(1, len(rest))))]
    for start in range(0, len(rest), len(folds)):
        dealt = sorted(
            rest[start : start + len(folds)], key=lambda p: hashlib.sha256(p.encode()).hexdigest()
        )
        emptiest = sorted(range(len(folds)), key=lambda f: (len(folds[f]), f))
        for fold, patient in zip(emptiest, dealt, strict=False):
            folds[fold] += groups[patient]
    return Splits(
        tuple(sorted(case for patient in test for case in groups[patient])),
        tuple(tuple(sorted(f)) for f in folds),
    )


def count_folds(config: SplitConfig) -> int:
    """How many folds a store will have, where it has patients enough for them. Raises `UserError`."""
    if config.kind == "file":
        return len(_read_split_file(config)[1])
    return NNUNET_FOLDS if config.kind == "nnunet" else config.folds


def check_split_files(config: SplitConfig, scans: Sequence[str]) -> None:
    """Refuse before the first scan is converted what would be refused after the last. Raises `UserError`."""
    known = set(scans)
    if config.kind == "file":
        test, folds = _read_split_file(config)
        named = {*test, *(case for fold in folds for case in fold)}
        index = ScanIndex(scans)
        unknown = sorted(
            name
            for name in named
            if index.find(name) is None and name.rpartition("_tile")[0] not in known
        )
        if unknown:
            raise UserError(f"{config.file}: {list_some(unknown)}: no scan of this data set")
    for line in [] if config.patients is None else _describe_patients(config.patients, scans):
        log.warning("%s", line)


def _read_split_file(config: SplitConfig) -> tuple[list[str], list[list[str]]]:
    path = config.file
    if path is None:
        raise UserError(
            'convert.splits.kind=file needs convert.splits.file, a JSON {"test": [...], "folds": [[...]]}'
        )
    content = read_json(find_config(path), purpose=f"; not a JSON {SPLIT_FORMS}")
    try:
        test, folds = _parse_splits(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON {SPLIT_FORMS} ({error})") from None
    named = [
        derive_scan_id(get_file_name(name), keep_channel=True)
        for part in (test, *folds)
        for name in part
    ]
    twice = sorted(case for case, count in Counter(named).items() if count > 1)
    if twice:
        raise UserError(f"{path}: {list_some(twice)} stands in more than one part")
    if not folds:
        raise UserError(f"{path}: names no fold; there is nothing to train on")
    return test, folds


def _parse_splits(content: Any) -> tuple[list[str], list[list[str]]]:
    """(test, folds) of our own form, nnU-Net's splits_final.json, or a MONAI list whose entries have a fold."""
    if isinstance(content, list):  # nnU-Net: [{"train": [...], "val": [...]}, ...]
        content = {"folds": [fold["val"] for fold in content]}
    elif "folds" not in content and isinstance(content.get("training"), list):
        content = _convert_monai_list(content)
    test, folds = content.get("test", []), content["folds"]
    if not isinstance(folds, list) or not all(isinstance(part, list) for part in (test, *folds)):
        raise TypeError("test and each fold are lists of case names")
    test, folds = (
        [_read_case_name(entry) for entry in test],
        [[_read_case_name(entry) for entry in fold] for fold in folds],
    )
    return test, folds


def _convert_monai_list(content: dict[str, Any]) -> dict[str, Any]:
    """MONAI's Auto3DSeg: {"training": [{"image": ..., "fold": 0}, ...], "testing": [...]}."""
    folds: dict[int, list[Any]] = {}
    for entry in content["training"]:
        fold = entry["fold"]
        if not isinstance(fold, int) or fold < 0:
            raise TypeError("fold is a whole number from 0 on")
        folds.setdefault(fold, []).append(entry)
    count = max(folds, default=-1) + 1
    if count > len(content["training"]):
        raise TypeError(f"fold {count - 1} is more than there are cases")
    test = content.get("testing", content.get("test", []))
    return {"test": test, "folds": [folds.get(number, []) for number in range(count)]}


def _read_case_name(entry: Any) -> str:
    name = entry.get("image") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        raise TypeError("test and each fold are lists of case names")
    return name


def _split_by_file(config: SplitConfig, of_scan: Mapping[str, Sequence[str]]) -> Splits:
    """`of_scan`: the labelled cases of each scan; the file may name either."""
    known = {name: [name] for cases in of_scan.values() for name in cases} | dict(of_scan)
    test, folds = _match_known_names(_read_split_file(config), known)
    named = {*test, *(name for fold in folds for name in fold)}
    if gone := sorted(named - known.keys()):
        log.warning("%s: %s: no labelled case of this data set", config.file, list_some(gone))
    left, parts = _collect_cases(test, known), tuple(_collect_cases(fold, known) for fold in folds)
    used = {case for part in (left, *parts) for case in part}
    if rest := sorted(scan for scan, cases in of_scan.items() if not used.issuperset(cases)):
        log.warning(
            "%s: labelled, and in no part of the splits, so never used: %s",
            config.file,
            list_some(rest),
        )
    if not used:
        raise UserError(f"{config.file}: no part has a labelled case of this data set")
    for number, part in enumerate(parts):
        if not part and any(parts):
            log.warning(
                "%s: fold %d has no labelled case: nothing to validate on", config.file, number
            )
    return Splits(left, parts)


def _match_known_names(
    splits: tuple[list[str], list[list[str]]], known: Collection[str]
) -> tuple[list[str], list[list[str]]]:
    """The file's names as the data set has them, where they mean one of its cases."""
    index = ScanIndex(known)
    test = [index.find(name) or name for name in splits[0]]
    folds = [[index.find(name) or name for name in fold] for fold in splits[1]]
    named = Counter(name for part in (test, *folds) for name in part)
    if twice := sorted(name for name, count in named.items() if count > 1):
        raise UserError(
            f"the split file names {list_some(twice)} twice, in different spellings; remove one"
        )
    return test, folds


def _collect_cases(names: Iterable[str], known: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(case for name in names for case in known.get(name, ())))
