"""What the commands on a finished run share: its models, and the cases of a store as slabs or
whole scans."""

import argparse
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.console import write_notes
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.modality import check_same_channels
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
from liverseg_dist.inference.run_data import check_same_data
from liverseg_dist.inference.scan_checks import fingerprint_scan_checks, format_warnings
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.logging_setup import ONCE

_logger = logging.getLogger(__name__)


def load_runs(
    args: argparse.Namespace, world: World, overrides: Sequence[str], postprocessed: bool = True
) -> list[LoadedRun]:
    """Load the models of RUN and --ensemble. With `--weights both` each run gives two models.

    Args:
        overrides: `inference.KEY=VALUE` for this call.
        postprocessed: use the post-processing that was chosen for the run.

    Returns:
        Models whose probabilities are averaged; the settings of the first one apply.
    """
    kinds = ("last", "best") if args.weights == "both" else (args.weights,)
    runs = []
    # Each model is one more pass over the scan; its probabilities are averaged with equal weight.
    for path in (args.run, *args.ensemble):
        for kind in kinds:
            runs.append(load_run(path, world.device, overrides, kind, postprocessed))
    if postprocessed and has_outdated_postprocessing(runs[0]):
        _logger.warning("%s %s", runs[0].path / POSTPROCESS, OUTDATED_CHOICE, extra=ONCE)
    if runs[0].settings.inference.mirror:
        _warn_of_unmirrored_axes(runs)
    return runs


def _warn_of_unmirrored_axes(runs: Sequence[LoadedRun]) -> None:
    """A network that was not trained on mirrored patches is not mirrored in inference either."""
    common = set(find_common_mirror_axes(runs))
    # The axes of the first run may be fewer than those of another: only common ones can be
    # averaged.
    of_some_runs: set[int] = set()
    for run in runs:
        of_some_runs.update(find_common_mirror_axes([run]))
    left_out = sorted(of_some_runs - common)
    if left_out:
        names = ", ".join("zyx"[axis] for axis in left_out)
        _logger.warning(
            "not mirrored along %s: some of these models were trained without", names, extra=ONCE
        )
    elif not common:
        _logger.warning(
            "%s: inference.mirror=true changes nothing: training mirrored no axis "
            "(data.augmentation, data.mirror_axes)",
            runs[0].path,
            extra=ONCE,
        )


def store_for(args: argparse.Namespace, runs: Sequence[LoadedRun]) -> CaseStore:
    """Open --store, or the store that the first run was trained on. Raises `UserError`."""
    path = args.store or runs[0].settings.data.store
    if path is None:
        raise UserError("--store is not given, and the run does not name one")
    store = CaseStore.open(path)
    # Another store with the same name may have other voxel sizes or labels.
    check_same_data(store, runs[0].settings.data)
    return store


def inputs_for(
    store: CaseStore,
    case_ids: Sequence[str],
    settings: Settings,
    source: Path | None,
    force: bool = False,
) -> tuple[CaseInputs, list[str]]:
    """Collect the inputs of the labelled cases.

    Args:
        source: folder of a data set, to read whole scans; None for the slabs of the store.
        force: include scans that the audit refuses.

    Returns:
        (inputs, ids of the cases without a label).
    """
    slabs, unlabelled = group_slabs_by_scan(store, case_ids)
    sources = None
    if source is not None:
        channels = settings.data.image_channels
        dataset = read_dataset(source, settings.convert.channels)
        check_same_channels(source, dataset.channels, channels)
        sources = {}
        for case in (*dataset.training, *dataset.test):
            # All files of a case together, so that a missing channel is noticed when the case is
            # read.
            sources[case.case_id] = ScanFiles(case.case_id, case.images, len(channels))
    return CaseInputs(store, slabs, settings, sources, force), unlabelled


def gate_of(inputs: CaseInputs) -> dict[str, object]:
    """The audit's part of a ledger's fingerprint. Slabs of a store were audited in conversion."""
    return {} if inputs.sources is None else {"gate": fingerprint_scan_checks(inputs.settings)}


def print_scan_warnings(records: Iterable[Mapping[str, Any]]) -> None:
    """Print the warnings of scans that were read from files.

    Args:
        records: entries of a ledger.
    """
    for record in records:
        write_notes(*format_warnings(record["case_id"], record.get("scan_findings", ())))


def voxels_of(inputs: CaseInputs) -> dict[str, int]:
    """Number of voxels of each scan, as an estimate of its computing time."""
    sizes = {}
    for name, ids in inputs.slabs.items():
        sizes[name] = math.prod(inputs.store.meta(ids[0]).source_grid.shape)
    return sizes
