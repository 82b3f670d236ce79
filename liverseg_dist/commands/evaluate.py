"""Score a run on its test cases (or another part): each case once, exactly, on any number of ranks.

  liverseg evaluate runs/first --store STORE --source Task03_Liver    whole scans: the score to publish
  liverseg evaluate runs/first --store STORE --part validation        slabs of the store, no source files
  torchrun --standalone --nproc-per-node=4 -m liverseg_dist evaluate runs/first --store STORE
  liverseg evaluate runs/fold0 --ensemble runs/fold1 --store STORE --out runs/ensemble

Without --source the input is the store's slab of 64 slices. Voxels outside of it count as background, and the
slab was placed with the help of the truth. With --source every scan passes the audit of `convert`: a refused
scan counts as failed (--force scores and marks it).

Results are written to RUN/evaluation: summary.json, cases.csv, lesions.csv, report.html, pictures for
TensorBoard, and the ledger. Run the same line again after a stop: the ledger holds the finished cases. Settings
such as inference.mirror=true may follow. All ranks compute the largest scans together where that saves time.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.commands.case_progress import CaseProgress, case_progress
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
from liverseg_dist.console import write_error, write_lines
from liverseg_dist.data.store.case_store import CaseStore, Part
from liverseg_dist.distributed.collectives import barrier, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, LiversegError, RunFailed, UserError
from liverseg_dist.evaluation.case_scores import structures_of_summary
from liverseg_dist.evaluation.earlier import move_earlier_results
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.metrics.calibration import BINS
from liverseg_dist.evaluation.notes import list_distance_notes
from liverseg_dist.evaluation.report.terminal_summary import format_summary
from liverseg_dist.evaluation.results import EVALUATION, LEDGER, PICTURES
from liverseg_dist.inference.case_inputs import CaseInputs
from liverseg_dist.inference.evaluate_cases import CaseEvaluator
from liverseg_dist.inference.evaluation_results import (
    describe_evaluation,
    describe_moved_results,
    input_kind,
    read_complete_ledger,
    read_training_curves,
    refuse_slabs_over_scans,
    write_evaluation,
)
from liverseg_dist.inference.load_run import LoadedRun, build_predictor, fingerprint_runs
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.mask_table import write_dataset_file
from liverseg_dist.inference.scan_checks import ScanRefused
from liverseg_dist.inference.training_overlap import find_training_overlap, format_leakage_warning
from liverseg_dist.inference.work_division import divide_work
from liverseg_dist.logging_setup import ONCE
from liverseg_dist.texts.names import ScanIndex
from liverseg_dist.texts.paths import path_argument, text_argument
from liverseg_dist.training.crash_report import summarize_exception

_logger = logging.getLogger(__name__)
PARTS = ("test", "validation", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="inference.* settings for this evaluation"
    )
    parser.add_argument(
        "--store",
        type=text_argument,
        metavar="STORE",
        help="Zarr store (default: the one the run was trained on)",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="part of the store (default: test, or validation if the store has no test cases)",
    )
    parser.add_argument(
        "--cases", metavar="ID,ID", help="only these cases, from any part of the store"
    )
    parser.add_argument(
        "--source",
        type=path_argument,
        metavar="DIR",
        help="MSD folder: evaluate whole scans, not the slabs of the store",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --source: also score scans that the audit refuses, and mark them",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="folder for the results (default: RUN/evaluation, or RUN/evaluation/PART)",
    )
    parser.add_argument(
        "--save-masks", action="store_true", help="also write OUT/masks/CASE.nii.gz"
    )
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score the chosen cases on all ranks; rank 0 writes the results."""
    world = start_rank(args.device)
    # Several windows run at the same time instead, so that the result does not depend on the number
    # of threads.
    torch.set_num_threads(1)
    keep_freed_memory()
    runs = load_runs(args, world, args.overrides)
    store = store_for(args, runs)
    case_ids, part, folder = _choose_cases(args, runs[0], store)
    # Cases that a run was trained on give a score that is too good. The part `train` asks for
    # exactly that.
    overlap = find_training_overlap(runs, store, case_ids) if part != "train" else {}
    leakage = format_leakage_warning(overlap)
    # With an explicit --part or --cases the user has chosen these cases; a warning is enough then.
    if leakage and args.part is None and args.cases is None:
        raise UserError(
            f"{leakage}: an ensemble is scored on cases that none of its runs was trained on; make a "
            "store with a test set (convert.splits.test_fraction), or add "
            f"--part {part} to score these cases anyway"
        )
    inputs, unlabelled = inputs_for(store, case_ids, runs[0].settings, args.source, args.force)
    if not inputs.slabs:
        raise UserError(
            f"{store.path}: {part} has no labelled case; choose another --part or --cases"
        )
    # Scores of slabs are not comparable with those of whole scans, and would replace them without
    # a word.
    if args.out is None and args.source is None:
        refuse_slabs_over_scans(folder)
    evaluation = _build_evaluation(args, runs, inputs, folder, world)

    def work(monitor: HeartbeatMonitor) -> dict[str, Any]:
        if unlabelled:
            _logger.info("left out, without a label: %s", ", ".join(unlabelled))
        if leakage:
            _logger.warning("%s: expect less on other cases", leakage, extra=ONCE)
        fingerprint = evaluation.ledger.fingerprint
        # Results of other weights or settings are moved, not deleted: they may have taken days.
        moved = share_from_rank0(lambda: move_earlier_results(folder, fingerprint))
        if moved is not None:
            _logger.info("%s", describe_moved_results(moved, folder))
        reused = _score_cases(evaluation, folder, world, monitor)
        details = describe_evaluation(args.run, runs, inputs, part, args.weights, leakage)
        result: dict[str, Any] = share_from_rank0(
            lambda: _write_results(evaluation, folder, details, runs, reused)
        )
        return result

    return run_distributed(world, args.timeout, folder, work)


def _choose_cases(
    args: argparse.Namespace, run: LoadedRun, store: CaseStore
) -> tuple[list[str], str, Path]:
    """Return (case ids, name of the part, folder for the results)."""
    default_folder = run.path / EVALUATION
    if args.cases is not None:
        index = ScanIndex(store.case_ids)
        names = [name.strip() for name in args.cases.split(",") if name.strip()]
        # Names may be written as in the file names of the scans; the index finds the case of the
        # store.
        wanted = {index.find_scan(name) or name for name in names}
        unknown = sorted(wanted - set(store.case_ids))
        if unknown or not wanted:
            raise UserError(f"--cases: {', '.join(unknown) or 'nothing'} is not in {store.path}")
        return sorted(wanted), "cases", args.out or default_folder / "cases"
    fold = run.settings.data.fold
    default: Part = "test" if store.ids("test", fold) else "validation"
    part: Part = args.part or default
    folder = default_folder if part == default else default_folder / part
    return list(store.ids(part, fold)), part, args.out or folder


def _build_evaluation(
    args: argparse.Namespace, runs: list[LoadedRun], inputs: CaseInputs, folder: Path, world: World
) -> CaseEvaluator:
    # Everything that changes a case's score is in the fingerprint, so that no stale entry is reused.
    fingerprint = fingerprint_runs(runs)
    # The number of bins changes the calibration that is stored with each case.
    fingerprint |= {"input": input_kind(inputs), "calibration": BINS}
    fingerprint |= gate_of(inputs)
    masks = None
    if args.save_masks:
        masks = Ledger(folder / "masks" / LEDGER, fingerprint)
        masks.folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / LEDGER, fingerprint)
    predictor = build_predictor(runs, world.device, window_threads(args, world))
    return CaseEvaluator(inputs, predictor, ledger, masks, folder / PICTURES)


def _score_cases(
    evaluation: CaseEvaluator, folder: Path, world: World, monitor: HeartbeatMonitor
) -> int:
    """Score the share of this rank. All ranks return at the same time.

    Returns:
        Number of cases, of all ranks, that the ledger already contained.
    """
    # One rank reads the ledger for all: ranks that read it at different times would divide
    # different lists.
    recorded = share_from_rank0(lambda: sorted(evaluation.ledger.done()))
    known = sorted(evaluation.inputs.slabs.keys() & set(recorded))
    sizes = voxels_of(evaluation.inputs)
    new = {case_id: size for case_id, size in sizes.items() if case_id not in recorded}
    division = divide_work(new, world.global_rank, world.world_size)
    _logger.debug(
        "%d cases of an earlier call, %d new ones: %d of them alone, %d with the other ranks",
        len(known),
        len(new),
        len(division.whole),
        len(division.shared),
    )
    parallel = WindowParallel(world.device)
    shared = replace(
        evaluation,
        # The same predictor with other hands: it gives each rank a share of the windows of one
        # scan.
        predictor=evaluation.predictor.with_window_mapper(parallel.map_windows),
        window_scope=parallel.case_scope,
    )
    # Known cases are divided as well, because their pictures may have to be drawn again.
    own = [*known[world.global_rank :: world.world_size], *division.whole]
    reused = 0
    total = len(evaluation.inputs.slabs)
    with case_progress("evaluate", total, monitor) as progress:
        # The shared cases first: all ranks are needed for them, and none may be busy with its own
        # ones.
        for case_id in division.shared:
            progress.report_activity(f"scoring {case_id}")
            _score_shared_case(shared, case_id, world, folder)
            progress.advance(note=case_id, shared=True)
        for case_id in own:
            progress.report_activity(f"scoring {case_id}")
            reused += _score_own_case(evaluation, case_id, world, folder)
            progress.advance(note=case_id)
        _wait_for_other_ranks(progress, total)
    progress.report_activity("writing the results")
    return sum(gather_from_ranks(reused))


def _wait_for_other_ranks(progress: CaseProgress, total: int) -> None:
    progress.report_activity("waiting for the cases of other ranks")
    barrier()
    progress.complete(total)


def _score_own_case(evaluation: CaseEvaluator, case_id: str, world: World, folder: Path) -> bool:
    """Score a case on this rank alone; returns whether the ledger already contained it."""
    try:
        return evaluation.evaluate_case(case_id)
    except RunFailed as error:
        report_case_failure(error, world, folder, case_id)
        return False


def _score_shared_case(evaluation: CaseEvaluator, case_id: str, world: World, folder: Path) -> None:
    """Compute a case together with all other ranks; rank 0 scores it."""

    def score() -> None:
        evaluation.evaluate_case(case_id)

    def compute_windows() -> None:
        try:
            evaluation.compute_shared_windows(case_id)
        except RunFailed as error:
            # Every rank refuses the scan for the same reason. The rank that scores it reports that.
            if not isinstance(error.__cause__, ScanRefused):
                raise

    try:
        world.select_for_rank(score, compute_windows)
    except PeerFailed:
        pass  # the rank that failed prints the reason
    except RunFailed as error:
        report_case_failure(error, world, folder, case_id)


def _write_results(
    evaluation: CaseEvaluator,
    folder: Path,
    details: dict[str, Any],
    runs: list[LoadedRun],
    reused: int,
) -> dict[str, Any]:
    """Aggregate the ledger, write the files and print the result, on rank 0.

    The other ranks wait for the return value, so a failure is part of it and not raised.
    """
    try:
        cases, failures = read_complete_ledger(evaluation.ledger, set(evaluation.inputs.slabs))
        print_scan_warnings(cases)
        curves = read_training_curves(runs)
        summary = write_evaluation(evaluation, folder, details, curves, cases, failures)
        if evaluation.masks is not None:
            labels = evaluation.predictor.outputs.labels
            write_dataset_file(evaluation.masks.folder.parent, labels)
    except (LiversegError, OSError) as error:
        line = summarize_exception(error)
        write_error(line)
        return {"error": line, "exit_code": EXIT_FAILED}
    # Scores are printed after all files are written, so that a printed score can always be looked
    # up.
    _print_summary(summary, cases, folder)
    dice = {}
    for name in structures_of_summary(summary):
        dice[f"{name}_dice"] = summary[name]["dice_per_case"]
    return {
        "out": str(folder),
        "summary": str(folder / "summary.json"),
        "report": str(folder / "report.html"),
        "n_cases": summary["n_cases"],
        "reused": reused,
        "failed": failures,
        **dice,
        "exit_code": EXIT_FAILED if failures else EXIT_DONE,
    }


def _print_summary(summary: dict[str, Any], cases: list[dict[str, Any]], folder: Path) -> None:
    kind = summary["details"]["input"]
    line = f"{summary['n_cases']} cases, {kind}s"
    if kind == "slab":
        line += ", placed with the help of the truth (--source: whole scans, the score to publish)"
    lines = [
        f"{line}, on the scans' own voxels",
        f"post-processing: {summary['details']['postprocessing']}",
        *format_summary(summary),
    ]
    lines += [f"note: {note}" for note in list_distance_notes(cases)]
    if summary["failed"]:
        lines.append(f"failed: {', '.join(summary['failed'])}")
    write_lines(*lines, f"report: {folder / 'report.html'}")
