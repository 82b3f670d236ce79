"""Choose the post-processing of a run on its validation cases, and save it with the run.

  liverseg postprocess runs/first --store STORE                              slabs of the store
  liverseg postprocess runs/first --store STORE --source Task03_Liver        whole scans, as in prediction
  torchrun --standalone --nproc-per-node=4 -m liverseg_dist postprocess runs/first --store STORE

Operations, tried in this order for each organ with lesions and each of its lesion structures: a
threshold for the probability of the lesion, only the largest part of the organ, filled holes, no
lesions far from the organ, lesions cut where they leave it, a minimum volume. An operation is kept
if it raises the mean Dice of the structures in cross-validation (its setting is chosen on some cases
and scored on the others), and if not more cases get worse than better.

The choice is written to RUN/postprocess.yaml. evaluate and predict use it from then on; inference.* settings on the
command line have precedence; delete the file to undo the choice. Run the same line again after a stop: predicted cases
are not predicted again.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from liverseg_dist.commands.case_progress import case_progress
from liverseg_dist.commands.options import add_inference, window_threads
from liverseg_dist.commands.run_cases import (
    gate_of,
    inputs_for,
    load_runs,
    print_scan_warnings,
    store_for,
    voxels_of,
)
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.console import write_lines
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, RunFailed, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.results import EVALUATION, LEDGER
from liverseg_dist.files import write_json
from liverseg_dist.inference.evaluation_results import input_kind
from liverseg_dist.inference.label_codes import CODES_VERSION
from liverseg_dist.inference.load_run import (
    POSTPROCESS,
    WEIGHTS_COMMENT,
    LoadedRun,
    build_predictor,
    fingerprint_runs,
)
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.postprocess_operations import (
    list_operations,
    without_postprocessing,
    write_choice,
)
from liverseg_dist.inference.postprocess_search import (
    MIN_CASES,
    Decision,
    PostprocessSearch,
    decide_operation,
)
from liverseg_dist.inference.training_overlap import find_training_overlap, format_leakage_warning
from liverseg_dist.inference.work_division import shard_cases
from liverseg_dist.texts.paths import path_argument, text_argument
from liverseg_dist.tracking.terminal_table import print_table

FOLDER = "postprocess"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="inference.* settings of the prediction"
    )
    parser.add_argument(
        "--store",
        type=text_argument,
        metavar="STORE",
        help="Zarr store (default: the one the run was trained on)",
    )
    parser.add_argument(
        "--part",
        choices=("validation", "train"),
        default="validation",
        help="cases to choose on (default: validation)",
    )
    parser.add_argument(
        "--source",
        type=path_argument,
        metavar="DIR",
        help="MSD folder: use whole scans, not the slabs of the store",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --source: also use scans that the audit refuses, and mark them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be chosen; do not save it with the run",
    )
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Predict the cases on all ranks, choose the operations, and save the choice on rank 0."""
    world = start_rank(args.device)
    # As in evaluate: several windows run at the same time, so that the result does not depend on
    # the number of threads.
    torch.set_num_threads(1)
    keep_freed_memory()
    # What was chosen earlier must not be part of the predictions on which the choice is made
    # again.
    loaded = load_runs(args, world, args.overrides, postprocessed=False)
    runs = [_without_postprocessing(one) for one in loaded]
    store = store_for(args, runs)
    case_ids = store.ids(args.part, runs[0].settings.data.fold)
    # On training cases nearly every lesion is right, so no operation would show what it does.
    if args.part != "train" and (overlap := find_training_overlap(runs, store, case_ids)):
        raise UserError(
            f"{format_leakage_warning(overlap)}: post-processing is chosen on cases that none of the "
            "runs was trained on; leave these runs out of --ensemble, or use a store with other splits"
        )
    search = _build_search(args, runs, store, world)
    cases = len(search.inputs.slabs)
    # With fewer cases cross-validation would choose by chance.
    if cases < MIN_CASES:
        raise UserError(
            f"{store.path}: {args.part} has {cases} labelled cases; "
            f"the choice needs {MIN_CASES} or more"
        )
    return run_distributed(
        world,
        args.timeout,
        search.folder,
        lambda monitor: _choose_operations(args, runs, search, world, monitor),
    )


def _choose_operations(
    args: argparse.Namespace,
    runs: list[LoadedRun],
    search: PostprocessSearch,
    world: World,
    monitor: HeartbeatMonitor,
) -> dict[str, Any]:
    failed = _predict_cases(search, world, monitor)
    # The warnings are in the ledger, because cases of an earlier call are not read again.
    world.call_on_rank0(partial(_write_scan_warnings, search))
    if failed:
        return {"failed": failed, "exit_code": EXIT_FAILED}
    cases = len(search.inputs.slabs)
    decisions = _decide_operations(search, world, monitor)
    chosen = {one.operation: one.option for one in decisions if one.kept}
    _print_decisions(decisions)

    def save_choice() -> None:
        # Comment and choice are one file, so that a copy of it keeps its evidence.
        comment = _describe_choice(args, runs, decisions, cases)
        write_choice(args.run / POSTPROCESS, search.labels, chosen, comment)
        record = {"chosen": chosen, "decisions": [asdict(one) for one in decisions]}
        write_json(search.folder / "choice.json", record)

    if not args.dry_run:
        share_from_rank0(save_choice)
        write_lines(f"saved: {args.run / POSTPROCESS}")
    return {
        "chosen": chosen,
        "n_cases": cases,
        "score_before": decisions[0].score_before,
        "score": _final_score(decisions),
        "saved": None if args.dry_run else str(args.run / POSTPROCESS),
        "exit_code": EXIT_DONE,
    }


def _write_scan_warnings(search: PostprocessSearch) -> None:
    # The ledger also has cases of earlier calls, with another --part.
    records = search.ledger.read_all()
    print_scan_warnings(one for one in records if one["case_id"] in search.inputs.slabs)


def _without_postprocessing(loaded: LoadedRun) -> LoadedRun:
    """Switch off all operations, because they are what is chosen here."""
    inference = without_postprocessing(loaded.settings.inference)
    return replace(loaded, settings=loaded.settings.model_copy(update={"inference": inference}))


def _build_search(
    args: argparse.Namespace, runs: list[LoadedRun], store: CaseStore, world: World
) -> PostprocessSearch:
    settings = runs[0].settings
    case_ids = store.ids(args.part, settings.data.fold)
    inputs, _ = inputs_for(store, case_ids, settings, args.source, args.force)
    folder = args.run / EVALUATION / FOLDER
    # "codes": version of the encoding of predictions in the ledger.
    fingerprint = fingerprint_runs(runs)
    fingerprint |= {"input": input_kind(inputs), "codes": CODES_VERSION}
    fingerprint |= gate_of(inputs)
    ledger = Ledger(folder / LEDGER, fingerprint)
    predictor = build_predictor(runs, world.device, window_threads(args, world))
    return PostprocessSearch(inputs, predictor, ledger, folder)


def _predict_cases(
    search: PostprocessSearch, world: World, monitor: HeartbeatMonitor
) -> dict[str, str]:
    """Predict the share of this rank; returns the failures of all ranks."""
    failed: dict[str, str] = {}
    own = shard_cases(voxels_of(search.inputs), world.global_rank, world.world_size)
    total = len(search.inputs.slabs)
    with case_progress("predict", total, monitor) as progress:
        for case_id in own:
            progress.report_activity(f"predicting {case_id}")
            try:
                search.prepare_case(case_id)
            except RunFailed as error:
                failed[case_id] = str(error)
                report_case_failure(error, world, search.folder, case_id)
            progress.advance(note=case_id)
        progress.report_activity("waiting for the cases of other ranks")
        all_failed: dict[str, str] = {}
        for part in gather_from_ranks(failed):
            all_failed |= part
        progress.complete(total)
    return all_failed


def _decide_operations(
    search: PostprocessSearch, world: World, monitor: HeartbeatMonitor
) -> list[Decision]:
    """Decide one operation after the other, each with the operations kept before.

    Every rank tries the options on its own cases; all ranks get the same decision.
    """
    own = shard_cases(voxels_of(search.inputs), world.global_rank, world.world_size)
    decisions: list[Decision] = []
    chosen: dict[str, Any] = {}
    operations = list_operations(search.labels)
    total = len(operations) * len(search.inputs.slabs)
    with case_progress("try", total, monitor) as progress:
        for operation, candidates in operations.items():
            own_scores = {}
            for case_id in own:
                progress.report_activity(f"trying {operation} on {case_id}")
                own_scores[case_id] = search.try_options(case_id, operation, chosen)
                progress.advance(note=f"{operation} {case_id}")
            progress.report_activity(f"waiting for {operation} on other ranks")
            scores: dict[str, Any] = {}
            for part in gather_from_ranks(own_scores):
                scores |= part
            # Rank 0 decides for all: the same rounding everywhere.
            decision = broadcast_from_rank0(decide_operation(operation, candidates.options, scores))
            decisions.append(decision)
            if decision.kept:
                chosen[operation] = decision.option
        progress.complete(total)
        progress.report_activity("writing the choice")
    return decisions


def _final_score(decisions: list[Decision]) -> float:
    """Cross-validated score with all operations that were kept."""
    # Decisions are cumulative: the score of the last kept one includes the earlier ones.
    kept = [one for one in decisions if one.kept]
    return kept[-1].score_cross_validated if kept else decisions[0].score_before


def _print_decisions(decisions: list[Decision]) -> None:
    headings = ("operation", "best", "Dice without", "cross-validated", "better/worse", "verdict")
    rows = []
    for one in decisions:
        rows.append((
            one.operation,
            json.dumps(one.option),
            f"{one.score_before:.4f}",
            f"{one.score_cross_validated:.4f}",
            f"{one.better}/{one.worse}",
            "kept" if one.kept else "not kept",
        ))  # fmt: skip
    print_table(headings, rows, right=headings[1:5])


def _describe_choice(
    args: argparse.Namespace, runs: list[LoadedRun], decisions: list[Decision], cases: int
) -> str:
    """The comment at the top of postprocess.yaml: cases, weights, and the scores of each operation."""
    # The hash ties the choice to the weights; after more training the file is reported as
    # outdated.
    weights = " ".join(run.weights_sha256 for run in runs)
    names = runs[0].settings.data.label_scheme.structure_names
    lines = [
        f"Chosen by `liverseg postprocess` on {cases} {args.part} cases; delete this file to undo it.",
        WEIGHTS_COMMENT.removeprefix("# ") + weights,
        f"Mean Dice of {' and '.join(names)} without the operation -> cross-validated with it:",
    ]
    for one in decisions:
        scores = f"{one.score_before:.4f} -> {one.score_cross_validated:.4f}"
        lines.append(f"  {one.operation}: {scores} {'' if one.kept else 'not '}kept")
    return "\n".join(lines)
