"""What the commands on a finished run share: its models, the cases of a store, as slabs or as whole scans."""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.modality import refuse_other_modality
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import UserError
from liverseg_dist.inference.case_inputs import CaseInputs, group_slabs_by_scan
from liverseg_dist.inference.load_run import (
    POSTPROCESS,
    LoadedRun,
    find_common_mirror_axes,
    load_run,
)
from liverseg_dist.inference.outdated_results import OUTDATED_CHOICE, has_outdated_postprocessing
from liverseg_dist.inference.scan_checks import fingerprint_scan_checks, format_warnings

Seen = dict[str, list[str]]
"""A run's folder -> cases to be scored that it was trained on."""


def load_runs(
    args: argparse.Namespace, world: World, overrides: Sequence[str], postprocessed: bool = True
) -> list[LoadedRun]:
    """The models of RUN and --ensemble, with --weights both two of each; their probabilities are averaged."""
    kinds = ("last", "best") if args.weights == "both" else (args.weights,)
    runs = [
        load_run(path, world.device, overrides, kind, postprocessed)
        for path in (args.run, *args.ensemble)
        for kind in kinds
    ]
    if world.is_main and postprocessed and has_outdated_postprocessing(runs[0]):
        print(f"warning: {runs[0].path / POSTPROCESS} {OUTDATED_CHOICE}", file=sys.stderr)
    if world.is_main and runs[0].settings.inference.mirror:
        _tell_what_is_not_mirrored(runs)
    return runs


def _tell_what_is_not_mirrored(runs: Sequence[LoadedRun]) -> None:
    known = find_common_mirror_axes(runs)
    some = sorted({axis for run in runs for axis in find_common_mirror_axes([run])} - set(known))
    if some:
        names = ", ".join("zyx"[axis] for axis in some)
        print(
            f"warning: not mirrored along {names}: not all of these models were in training",
            file=sys.stderr,
        )
    elif not known:
        print(
            f"warning: {runs[0].path}: inference.mirror=true changes nothing: training mirrored no axis "
            "(data.augmentation, data.mirror_axes)",
            file=sys.stderr,
        )


def store_for(args: argparse.Namespace, runs: Sequence[LoadedRun]) -> CaseStore:
    """--store, or the one that the first run was trained on. Raises `UserError`."""
    path = args.store or runs[0].settings.data.store
    if path is None:
        raise UserError("--store is not given, and the run does not name one")
    return CaseStore.open(path)


def find_training_overlap(
    runs: Sequence[LoadedRun], store: CaseStore, case_ids: Sequence[str]
) -> Seen:
    """Of these cases, those that each run was trained on; runs that saw none, or other data, are left out.

    That it was this data is told by the intensities, which are computed from the training cases; the store may lie
    elsewhere by now.
    """
    wanted, seen = set(case_ids), {}
    for run in runs:
        data = run.settings.data
        if data.intensity == store.intensity and data.spacing_mm == store.spacing_mm:
            ids = sorted(wanted.intersection(store.ids("train", data.fold)))
            if ids:
                seen[str(run.path)] = ids
    return seen


def format_leakage_warning(seen: Seen) -> str:
    return "; ".join(
        f"{Path(name).name} was trained on {', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}"
        for name, ids in seen.items()
    )


def inputs_for(
    store: CaseStore,
    case_ids: Sequence[str],
    settings: Settings,
    source: Path | None,
    force: bool = False,
) -> tuple[CaseInputs, list[str]]:
    """(inputs of the labelled cases, the unlabelled ones); with `source` (an MSD folder) whole scans.

    `force`: scans that the audit refuses are taken as well.
    """
    slabs, unlabelled = group_slabs_by_scan(store, case_ids)
    sources = None
    if source is not None:
        dataset = read_dataset(source)
        refuse_other_modality(source, dataset.notes, settings.convert.modality)
        sources = {case.case_id: case.image for case in (*dataset.training, *dataset.test)}
    return CaseInputs(store, slabs, settings, sources, force), unlabelled


def gate_of(inputs: CaseInputs) -> dict[str, object]:
    """For a ledger's fingerprint: whole scans pass the audit, the store's slabs passed it in conversion."""
    return {} if inputs.sources is None else {"gate": fingerprint_scan_checks(inputs.settings)}


def print_scan_warnings(records: Iterable[Mapping[str, Any]]) -> None:
    """The warnings of scans that were read from files, from the records of a ledger."""
    for record in records:
        for line in format_warnings(record["case_id"], record.get("scan_findings", ())):
            print(line, file=sys.stderr, flush=True)


def input_kind(inputs: CaseInputs) -> str:
    return "slab" if inputs.sources is None else "scan"


def voxels_of(inputs: CaseInputs) -> dict[str, int]:
    """Size of each scan, which tells how long it takes."""
    return {
        name: math.prod(inputs.store.meta(ids[0]).source_grid.shape)
        for name, ids in inputs.slabs.items()
    }
