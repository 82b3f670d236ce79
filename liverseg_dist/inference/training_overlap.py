"""Leakage check: which cases to be scored were used to train one of the runs.

`evaluate` and `postprocess` warn of such cases or refuse them, because a model scores too well on its
training cases.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference.load_run import LoadedRun

MAX_NAMED_CASES = 3

TrainingOverlap = dict[str, list[str]]
"""Run folder -> cases to be scored that the run was trained on."""


def find_training_overlap(
    runs: Sequence[LoadedRun], store: CaseStore, case_ids: Sequence[str]
) -> TrainingOverlap:
    """Find the cases that each run was trained on. Runs without such cases are left out.

    A run belongs to the store if its intensity figures and voxel size equal those of the store. The figures are
    computed from the training cases, so they identify the data even when the store was moved.
    """
    wanted = set(case_ids)
    overlap: TrainingOverlap = {}
    for run in runs:
        data = run.settings.data
        # A run of another data set shares no cases with the store, even if ids happen to be the
        # same.
        if data.intensity != store.intensity or data.spacing_mm != store.spacing_mm:
            continue
        ids = sorted(wanted.intersection(store.ids("train", data.fold)))
        if ids:
            overlap[str(run.path)] = ids
    return overlap


def format_leakage_warning(overlap: Mapping[str, Sequence[str]]) -> str:
    """One line that names each run and the first of its training cases."""
    sentences = []
    for folder, ids in overlap.items():
        named = ", ".join(ids[:MAX_NAMED_CASES])
        more = len(ids) - MAX_NAMED_CASES
        rest = f" and {more} more" if more > 0 else ""
        sentences.append(f"{Path(folder).name} was trained on {named}{rest}")
    return "; ".join(sentences)
