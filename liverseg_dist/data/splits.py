"""Test set and folds: by patient, stratified by tumour burden, the same for the same cases on any machine."""

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liverseg_dist.config import SplitConfig
from liverseg_dist.config.shipped import find_config
from liverseg_dist.errors import UserError

log = logging.getLogger(__name__)
NNUNET_SEED = 12345
NNUNET_FOLDS = 5


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
        return _from_file(config, of_scan)
    ours = {case: share for case, share in burden.items() if case not in held_out}
    if config.kind == "nnunet":
        folds = nnunet_folds(
            [scan for scan, cases in of_scan.items() if not set(held_out).intersection(cases)]
        )
        return Splits(tuple(sorted(held_out)), tuple(_cases_of(fold, of_scan) for fold in folds))
    apart = {patients[case] for case in held_out}
    test = {case for case in burden if patients[case] in apart}
    splits = _stratified(
        {case: share for case, share in ours.items() if case not in test}, patients, config
    )
    return Splits(tuple(sorted({*splits.test, *test})), splits.folds)


def nnunet_folds(case_ids: Sequence[str] | Mapping[str, float]) -> tuple[tuple[str, ...], ...]:
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
    """Case to patient, who is called by their first case: from the CSV `case,patient`, else every case its own.

    Raises `UserError`.
    """
    patients = {case_id: case_id for case_id in case_ids}
    if path is None:
        return patients
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); convert.splits.patients is a CSV `case,patient`"
        ) from None
    named: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=2):
        if not row.get("case") or not row.get("patient"):
            raise UserError(
                f"{path}: line {number} lacks a case or a patient; the header is `case,patient`"
            )
        if row["case"] in patients:
            named.setdefault(row["patient"], []).append(row["case"])
    if rows and not named:
        first = rows[0]["case"]
        raise UserError(
            f"{path}: knows none of these scans; it begins with {first}, they with {min(case_ids)}"
        )
    for scans in (
        named.values()
    ):  # who is the same matters, not the name: a patient is called by their first scan
        patients.update(dict.fromkeys(scans, min(scans)))
    return patients


def patients_in_several_parts(splits: Splits, patients: Mapping[str, str]) -> list[str]:
    """Patients with scans in more than one part: what a network learns of them in one part it is asked in another."""
    parts: dict[str, set[int]] = {}
    for number, part in enumerate((splits.test, *splits.folds)):
        for case_id in part:
            parts.setdefault(patients[case_id], set()).add(number)
    return sorted(patient for patient, numbers in parts.items() if len(numbers) > 1)


def _stratified(
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


def fold_count(config: SplitConfig) -> int:
    """How many folds a store will have, where it has patients enough for them. Raises `UserError`."""
    if config.kind == "file":
        return len(_read_file(config)[1])
    return NNUNET_FOLDS if config.kind == "nnunet" else config.folds


def check_split_files(config: SplitConfig, scans: Sequence[str]) -> None:
    """Refuse before the first scan is converted what would be refused after the last. Raises `UserError`."""
    known = set(scans)
    if config.kind == "file":
        test, folds = _read_file(config)
        named = {*test, *(case for fold in folds for case in fold)}
        strangers = sorted(
            name for name in named if name not in known and name.rpartition("_tile")[0] not in known
        )
        if strangers:
            raise UserError(
                f"{config.file}: {summarize_names(strangers)}: no scan of this data set"
            )
    read_patients(config.patients, scans)


def _read_file(config: SplitConfig) -> tuple[list[str], list[list[str]]]:
    path = config.file
    if path is None:
        raise UserError(
            'convert.splits.kind=file needs convert.splits.file, a JSON {"test": [...], "folds": [[...]]}'
        )
    try:
        content = json.loads(find_config(path).read_text(encoding="utf-8"))
        if isinstance(
            content, list
        ):  # nnU-Net's splits_final.json: [{"train": [...], "val": [...]}, ...]
            content = {"folds": [fold["val"] for fold in content]}
        test, folds = content.get("test", []), content["folds"]
        if not isinstance(folds, list) or not all(
            isinstance(part, list) and all(isinstance(c, str) for c in part)
            for part in (test, *folds)
        ):
            raise TypeError("test and each fold are lists of case names")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        form = '{"test": [...], "folds": [[...], ...]}, nor nnU-Net\'s splits_final.json'
        raise UserError(f"{path}: not a JSON {form} ({error})") from None
    named = [*test, *(case for fold in folds for case in fold)]
    twice = sorted(case for case, count in Counter(named).items() if count > 1)
    if twice:
        raise UserError(f"{path}: {', '.join(twice[:5])} stands in more than one part")
    if not folds:
        raise UserError(f"{path}: names no fold; there is nothing to train on")
    return test, folds


def _from_file(config: SplitConfig, of_scan: Mapping[str, Sequence[str]]) -> Splits:
    """`of_scan`: the labelled cases of each scan; the file may name either."""
    known = {name: [name] for cases in of_scan.values() for name in cases} | dict(of_scan)
    test, folds = _read_file(config)
    named = {*test, *(name for fold in folds for name in fold)}
    if gone := sorted(named - known.keys()):
        log.warning("%s: %s: no labelled case of this data set", config.file, summarize_names(gone))
    left, parts = _cases_of(test, known), tuple(_cases_of(fold, known) for fold in folds)
    used = {case for part in (left, *parts) for case in part}
    if rest := sorted(scan for scan, cases in of_scan.items() if not used.issuperset(cases)):
        log.warning(
            "%s: labelled, and in no part of the splits, so never used: %s",
            config.file,
            summarize_names(rest),
        )
    if not used:
        raise UserError(f"{config.file}: no part has a labelled case of this data set")
    for number, part in enumerate(parts):
        if not part and any(parts):
            log.warning(
                "%s: fold %d has no labelled case: nothing to validate on", config.file, number
            )
    return Splits(left, parts)


def _cases_of(names: Iterable[str], known: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(case for name in names for case in known.get(name, ())))


def summarize_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
