"""Test set and folds of a data set, by patient and stratified by the burden of lesions.

Equal cases give equal splits on any machine. `convert` stores the splits in the store's root
attributes; training and evaluation read them from there.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import SplitConfig
from liverseg_dist.data.patients import describe_patients
from liverseg_dist.data.split_file import NamedSplits, read_split_file
from liverseg_dist.errors import UserError
from liverseg_dist.texts.names import ScanIndex, list_some

log = logging.getLogger(__name__)
NNUNET_SEED = 12345
NNUNET_FOLDS = 5


@dataclass(frozen=True)
class Splits:
    """Case ids of the test set and of the folds, each sorted."""

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
    """Divide the labelled cases into a test set and folds.

    Args:
        burden: Number of each labelled case by which cases are stratified, such as the volume of
            lesions over that of their organ.
        patients: The patient of each case.
        config: How to divide.
        held_out: Labelled cases that the data set itself defines as a test set. With `stratified`
            and `nnunet` they are in the test set. With `stratified`, no fold holds another scan of
            their patients; `nnunet` does not consider patients.
        scans: The scan of each case, of which the case is a slab. `nnunet` and `file` divide
            scans. None: each case is a scan.

    Raises:
        UserError: Too few cases for nnU-Net's folds, or a split file that does not fit.
    """
    cases_by_scan: dict[str, list[str]] = {}
    for case_id in burden:
        scan = scans[case_id] if scans is not None else case_id
        cases_by_scan.setdefault(scan, []).append(case_id)
    if config.kind == "file":
        return _split_by_file(config, cases_by_scan)
    if config.kind == "nnunet":
        return _split_like_nnunet(cases_by_scan, held_out)
    # All scans of a held-out patient are held out, also those in the training list.
    held_out_patients = {patients[case_id] for case_id in held_out}
    test = {case_id for case_id in burden if patients[case_id] in held_out_patients}
    rest = {case_id: value for case_id, value in burden.items() if case_id not in test}
    splits = _split_stratified(rest, patients, config)
    return Splits(tuple(sorted({*splits.test, *test})), splits.folds)


def find_divided_patients(splits: Splits, patients: Mapping[str, str]) -> list[str]:
    """Patients with scans in more than one part, sorted.

    A network that was trained on a patient in one part is evaluated on the same patient in another.
    """
    parts: dict[str, set[int]] = {}
    for number, part in enumerate((splits.test, *splits.folds)):
        for case_id in part:
            parts.setdefault(patients[case_id], set()).add(number)
    return sorted(patient for patient, numbers in parts.items() if len(numbers) > 1)


def count_folds(config: SplitConfig) -> int:
    """Number of folds of a store, if it has enough patients for them. Raises `UserError`."""
    if config.kind == "file":
        return len(read_split_file(config).folds)
    return NNUNET_FOLDS if config.kind == "nnunet" else config.folds


def check_split_files(config: SplitConfig, scans: Sequence[str]) -> None:
    """Check split file and patient table before the first scan is converted.

    Without this check, `make_splits` would refuse them after hours of conversion.

    Raises:
        UserError: A file is unreadable, or names a scan that the data set does not have.
    """
    if config.kind == "file":
        index = ScanIndex(scans)
        known = set(scans)
        unknown = []
        for name in sorted(set(read_split_file(config).list_names())):
            scan_of_slab = name.rpartition("_tile")[0]
            # Slabs do not exist before the conversion, so their names are checked by their scan.
            if index.find_scan(name) is None and scan_of_slab not in known:
                unknown.append(name)
        if unknown:
            raise UserError(f"{config.file}: {list_some(unknown)}: no scan of this data set")
    if config.patients is not None:
        for line in describe_patients(config.patients, scans):
            log.warning("%s", line)


# --- nnU-Net -----------------------------------------------------------------------------------


def build_nnunet_folds(
    case_ids: Sequence[str] | Mapping[str, float],
) -> tuple[tuple[str, ...], ...]:
    """Validation cases of nnU-Net's five folds.

    nnU-Net uses scikit-learn's KFold(5, shuffle=True, random_state=12345) over the sorted ids. Its
    shuffle is that of NumPy's legacy generator, which is frozen, so the folds are computed here
    without scikit-learn. The first (n mod 5) folds have one case more.

    Raises:
        UserError: Fewer than five cases.
    """
    ids = sorted(case_ids)
    if len(ids) < NNUNET_FOLDS:
        raise UserError(
            f"convert.splits.kind=nnunet needs {NNUNET_FOLDS} labelled cases, there are {len(ids)}"
        )
    order = np.arange(len(ids))
    np.random.RandomState(NNUNET_SEED).shuffle(order)
    size, larger_folds = divmod(len(ids), NNUNET_FOLDS)
    folds = []
    start = 0
    for number in range(NNUNET_FOLDS):
        end = start + size + (number < larger_folds)
        folds.append(tuple(ids[i] for i in sorted(order[start:end])))
        start = end
    return tuple(folds)


def _split_like_nnunet(
    cases_by_scan: Mapping[str, Sequence[str]], held_out: Collection[str]
) -> Splits:
    held_out = set(held_out)
    scans = [scan for scan, cases in cases_by_scan.items() if held_out.isdisjoint(cases)]
    folds = build_nnunet_folds(scans)
    return Splits(
        tuple(sorted(held_out)), tuple(_collect_cases(fold, cases_by_scan) for fold in folds)
    )


# --- stratified --------------------------------------------------------------------------------


def _split_stratified(
    burden: Mapping[str, float], patients: Mapping[str, str], config: SplitConfig
) -> Splits:
    """Sort patients by burden and distribute them in rounds, one patient to each fold."""
    if not burden:
        return Splits((), tuple(() for _ in range(config.folds)))
    cases_by_patient: dict[str, list[str]] = {}
    for case_id in sorted(burden):
        cases_by_patient.setdefault(patients[case_id], []).append(case_id)
    # A patient with several scans counts by the scan with the highest burden.
    max_burden = {}
    for patient, cases in cases_by_patient.items():
        max_burden[patient] = max(burden[case_id] for case_id in cases)
    ordered = sorted(cases_by_patient, key=lambda patient: (max_burden[patient], patient))
    test_positions = _choose_test_positions(len(ordered), config)
    # Patients, not cases, are assigned, so that scans of a patient stay together.
    test = [patient for i, patient in enumerate(ordered) if i in test_positions]
    rest = [patient for i, patient in enumerate(ordered) if i not in test_positions]
    folds = _distribute_patients(rest, cases_by_patient, config.folds)
    return Splits(
        _collect_cases(test, cases_by_patient),
        tuple(tuple(sorted(fold)) for fold in folds),
    )


def _choose_test_positions(count: int, config: SplitConfig) -> set[int]:
    """Positions of the test patients in the order of burden, evenly spaced."""
    # Every fold needs a patient, for validation and training, before any patient is held out.
    reserved = min(config.folds, max(2, count))
    test_count = max(0, min(round(config.test_fraction * count), count - reserved))
    return {int((i + 0.5) * count / test_count) for i in range(test_count)}


def _distribute_patients(
    ordered: Sequence[str], cases_by_patient: Mapping[str, Sequence[str]], folds: int
) -> list[list[str]]:
    """Distribute patients in rounds over the folds, the emptiest fold first.

    Within a round the order follows a hash of the patients' ids, so that an additional case changes
    the fold of few others.
    """
    result: list[list[str]] = [[] for _ in range(min(folds, max(1, len(ordered))))]
    for start in range(0, len(ordered), len(result)):
        patients = sorted(ordered[start : start + len(result)], key=_hash_text)
        emptiest = sorted(range(len(result)), key=lambda number: (len(result[number]), number))
        for number, patient in zip(emptiest, patients, strict=False):
            result[number] += cases_by_patient[patient]
    return result


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- file --------------------------------------------------------------------------------------


def _split_by_file(config: SplitConfig, cases_by_scan: Mapping[str, Sequence[str]]) -> Splits:
    """The splits of `config.file`, whose names may be those of scans or of slabs."""
    known: dict[str, Sequence[str]] = {}
    for cases in cases_by_scan.values():
        for case_id in cases:
            known[case_id] = [case_id]
    known.update(cases_by_scan)
    named = _match_known_names(read_split_file(config), known)
    unknown = sorted(set(named.list_names()) - known.keys())
    if unknown:
        log.warning("%s: %s: no labelled case of this data set", config.file, list_some(unknown))
    test = _collect_cases(named.test, known)
    folds = tuple(_collect_cases(fold, known) for fold in named.folds)
    used = set(test).union(*folds)
    unused = sorted(scan for scan, cases in cases_by_scan.items() if not used.issuperset(cases))
    if unused:
        log.warning(
            "%s: labelled, but in no part of the splits, so never used: %s",
            config.file,
            list_some(unused),
        )
    if not used:
        raise UserError(f"{config.file}: no part has a labelled case of this data set")
    for number, fold in enumerate(folds):
        # A store that is only tested on may have no fold with a labelled case.
        if not fold and any(folds):
            log.warning(
                "%s: fold %d has no labelled case: nothing to validate on", config.file, number
            )
    return Splits(test, folds)


def _match_known_names(splits: NamedSplits, known: Collection[str]) -> NamedSplits:
    """Replace the file's names by those of the data set; unknown names stay."""
    # Names in the file may have suffixes, folders or another case.
    index = ScanIndex(known)
    test = [index.find_scan(name) or name for name in splits.test]
    folds = []
    for fold in splits.folds:
        folds.append([index.find_scan(name) or name for name in fold])
    matched = NamedSplits(test, folds)
    counts = Counter(matched.list_names())
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise UserError(
            f"the split file names {list_some(repeated)} twice, in different spellings; remove one"
        )
    return matched


def _collect_cases(
    names: Iterable[str], cases_by_name: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    cases: list[str] = []
    for name in names:
        cases += cases_by_name.get(name, ())
    return tuple(sorted(cases))
