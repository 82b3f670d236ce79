"""Choose the post-processing of a run on its validation cases; what helps is kept, and saved with the run.

  liverseg postprocess runs/first --store STORE                              the store's slabs
  liverseg postprocess runs/first --store STORE --source Task03_Liver        whole scans, as they will come
  torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 \\
      -m liverseg_dist postprocess runs/first --store STORE

Looked at, one after the other: a threshold for the tumour's probability, the largest liver only, filled holes, tumours
only near the liver, what they have outside it cut off, a least tumour volume. Each is kept if the mean Dice of liver
and tumour is higher with it when cases judge settings that were chosen on other cases (cross-validation), and no more
cases got worse than better. The choice goes to RUN/postprocess.yaml, which evaluate and predict use from then on
(inference.* on their line comes last); delete the file to undo it. Run the same line again after a stop: predicted
cases are not predicted again.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from liverseg_dist.commands.case_progress import case_progress
from liverseg_dist.commands.options import add_inference, window_threads
from liverseg_dist.commands.run_cases import (
    find_training_overlap,
    format_leakage_warning,
    gate_of,
    input_kind,
    inputs_for,
    load_runs,
    print_scan_warnings,
    store_for,
    voxels_of,
)
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, RunFailed, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.results import EVALUATION, LEDGER
from liverseg_dist.files import write_json
from liverseg_dist.inference.load_run import (
    POSTPROCESS,
    WEIGHTS_COMMENT,
    LoadedRun,
    build_predictor,
    fingerprint_runs,
)
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.postprocess_search import (
    MIN_CASES,
    NO_POSTPROCESSING,
    OPERATIONS,
    Decision,
    PostprocessSearch,
    decide_operation,
    write_choice,
)
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
        help="the Zarr store (default: the one the run was trained on)",
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
        help="MSD folder: whole scans, not the store's slabs",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --source: also take scans that the audit refuses, and mark them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be chosen, save nothing with the run",
    )
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    world = World.from_environment(args.device)
    if not world.is_main:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - for the process's life; rank 0 does the talking
    torch.set_num_threads(1)  # as evaluate: the same bits for any number of threads
    keep_freed_memory()
    runs = [_bare(loaded) for loaded in load_runs(args, world, args.overrides, postprocessed=False)]
    store = store_for(args, runs)
    case_ids = store.ids(args.part, runs[0].settings.data.fold)
    if args.part != "train" and (seen := find_training_overlap(runs, store, case_ids)):
        raise UserError(
            f"{format_leakage_warning(seen)}: what helps is chosen on cases that none of the runs knows"
        )
    job = _job(args, runs, store, world)
    cases = len(job.inputs.slabs)
    if cases < MIN_CASES:
        raise UserError(
            f"{store.path}: {args.part} has {cases} labelled cases; choosing needs {MIN_CASES} or more"
        )
    return run_distributed(
        world, args.timeout, job.folder, lambda watch: _choose(args, runs, job, world, watch)
    )


def _choose(
    args: argparse.Namespace,
    runs: list[LoadedRun],
    job: PostprocessSearch,
    world: World,
    watch: HeartbeatMonitor,
) -> dict[str, Any]:
    failed = _prepare(job, world, watch)
    if world.is_main:
        print_scan_warnings(
            record for record in job.ledger.read_all() if record["case_id"] in job.inputs.slabs
        )
    if failed:
        return {"failed": failed, "exit_code": EXIT_FAILED}
    cases = len(job.inputs.slabs)
    decisions = _decide(job, world, watch)
    chosen = {one.operation: one.option for one in decisions if one.kept}
    _say(decisions)
    watch.mark(-1, "writing the choice")
    if world.is_main and not args.dry_run:
        write_choice(args.run / POSTPROCESS, chosen, _told(args, runs, decisions, cases))
        write_json(
            job.folder / "choice.json",
            {"chosen": chosen, "decisions": [asdict(one) for one in decisions]},
        )
    if not args.dry_run:
        print(f"saved: {args.run / POSTPROCESS}", flush=True)
    barrier()
    return {
        "chosen": chosen,
        "n_cases": cases,
        "score_before": decisions[0].score_before,
        "score": _final_score(decisions),
        "saved": None if args.dry_run else str(args.run / POSTPROCESS),
        "exit_code": EXIT_DONE,
    }


def _bare(loaded: LoadedRun) -> LoadedRun:
    """A run without any post-processing: that is what we are about to choose."""
    inference = loaded.settings.inference.model_copy(
        update={name: getattr(NO_POSTPROCESSING, name) for name in OPERATIONS}
    )
    return replace(loaded, settings=loaded.settings.model_copy(update={"inference": inference}))


def _job(
    args: argparse.Namespace, runs: list[LoadedRun], store: CaseStore, world: World
) -> PostprocessSearch:
    settings = runs[0].settings
    inputs, _ = inputs_for(
        store, store.ids(args.part, settings.data.fold), settings, args.source, args.force
    )
    folder = args.run / EVALUATION / FOLDER
    fingerprint = (
        fingerprint_runs(runs) | {"input": input_kind(inputs), "codes": 1} | gate_of(inputs)
    )
    ledger = Ledger(folder / LEDGER, fingerprint)
    return PostprocessSearch(
        inputs, build_predictor(runs, world.device, window_threads(args, world)), ledger, folder
    )


def _prepare(job: PostprocessSearch, world: World, watch: HeartbeatMonitor) -> dict[str, str]:
    """Predict this rank's share; returns the failures of all ranks."""
    failed: dict[str, str] = {}
    mine = shard_cases(voxels_of(job.inputs), world.global_rank, world.world_size)
    total = len(job.inputs.slabs)
    with case_progress("predict", total, world, watch) as line:
        for case_id in mine:
            watch.mark(-1, f"predicting {case_id}")
            try:
                job.prepare_case(case_id)
            except RunFailed as error:
                failed[case_id] = str(error)
                report_case_failure(error, world, job.folder, case_id)
            line.advance(note=case_id)
        watch.mark(-1, "waiting for the others' cases")
        everything = gather_from_ranks(failed)
        line.complete(total)
    return {name: text for part in everything for name, text in part.items()}


def _decide(job: PostprocessSearch, world: World, watch: HeartbeatMonitor) -> list[Decision]:
    """One operation after the other; every rank tries the options on its own cases and reaches the same decision."""
    mine = shard_cases(voxels_of(job.inputs), world.global_rank, world.world_size)
    decisions: list[Decision] = []
    chosen: dict[str, Any] = {}
    total = len(OPERATIONS) * len(job.inputs.slabs)
    with case_progress("try", total, world, watch) as line:
        for operation in OPERATIONS:
            own = {}
            for case_id in mine:
                watch.mark(-1, f"trying {operation} on {case_id}")
                own[case_id] = job.try_options(case_id, operation, chosen)
                line.advance(note=f"{operation} {case_id}")
            watch.mark(-1, f"waiting for the others' {operation}")
            scores = {
                name: values for part in gather_from_ranks(own) for name, values in part.items()
            }
            decision = broadcast_from_rank0(decide_operation(operation, scores))
            decisions.append(decision)
            if decision.kept:
                chosen[operation] = decision.option
        line.complete(total)
    return decisions


def _final_score(decisions: list[Decision]) -> float:
    """Cross-validated score with all that was kept."""
    return next(
        (one.score_cross_validated for one in reversed(decisions) if one.kept),
        decisions[0].score_before,
    )


def _say(decisions: list[Decision]) -> None:
    headings = ("operation", "best", "Dice without", "cross-validated", "better/worse", "verdict")
    rows = [
        (
            one.operation,
            json.dumps(one.option),
            f"{one.score_before:.4f}",
            f"{one.score_cross_validated:.4f}",
            f"{one.better}/{one.worse}",
            "kept" if one.kept else "not kept",
        )
        for one in decisions
    ]
    print_table(headings, rows, right=headings[1:5])


def _told(
    args: argparse.Namespace, runs: list[LoadedRun], decisions: list[Decision], cases: int
) -> str:
    lines = [
        f"Chosen by `liverseg postprocess` on {cases} {args.part} cases; delete this file to undo it."
    ]
    lines.append(WEIGHTS_COMMENT.removeprefix("# ") + " ".join(run.weights_sha256 for run in runs))
    lines.append("Mean Dice of liver and tumour without the operation -> cross-validated with it:")
    lines += [
        f"  {one.operation}: {one.score_before:.4f} -> {one.score_cross_validated:.4f} {'' if one.kept else 'not '}kept"
        for one in decisions
    ]
    return "\n".join(lines)
