"""Score a run on its test cases (or another part): exactly, each case once, on any number of ranks.

  liverseg evaluate runs/first --store STORE --source Task03_Liver      whole scans, the score to publish
  liverseg evaluate runs/first --store STORE --part validation          the store's slabs, no source files needed
  torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 \\
      -m liverseg_dist evaluate runs/first --store STORE
  liverseg evaluate runs/fold0 --ensemble runs/fold1 --ensemble runs/fold2 --store STORE --out runs/ensemble

Without --source the input is the store's slab of 64 slices; all outside it counts as background, and the slab was
placed with the help of the truth. With --source every scan passes the audit of `convert`: a refused one counts as
failed (--force scores it, and marks it). Results lie in RUN/evaluation: summary.json, cases.csv, lesions.csv,
report.html, pictures for TensorBoard and the ledger, by which the same line, run again, continues. Settings such as
inference.mirror=true may follow. The largest scans are computed by all ranks together where that ends sooner.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.commands.case_progress import case_progress
from liverseg_dist.commands.options import add_inference, window_threads
from liverseg_dist.commands.run_cases import (
    Seen,
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
from liverseg_dist.data.audit.audit_summary import audit_summary
from liverseg_dist.data.store.case_store import CaseStore, Part
from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    LiversegError,
    RunFailed,
    UserError,
    printable,
)
from liverseg_dist.evaluation.curves import Curves, read_curves
from liverseg_dist.evaluation.earlier import move_earlier_results
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.metrics.calibration import BINS
from liverseg_dist.evaluation.notes import list_distance_notes
from liverseg_dist.evaluation.report.tensorboard import write_tensorboard
from liverseg_dist.evaluation.report.terminal_summary import format_ratio, format_summary
from liverseg_dist.evaluation.results import EVALUATION, LEDGER, PICTURES, SUMMARY, write_results
from liverseg_dist.inference.case_inputs import CaseInputs
from liverseg_dist.inference.evaluate_cases import Evaluation
from liverseg_dist.inference.load_run import POSTPROCESS, LoadedRun, predictor_for, runs_fingerprint
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.postprocess_report import describe_postprocessing
from liverseg_dist.inference.postprocess_search import postprocessing_settings
from liverseg_dist.inference.scan_checks import ScanRefused, warnings_of
from liverseg_dist.inference.work_division import divide_work
from liverseg_dist.texts.names import ScanIndex
from liverseg_dist.texts.paths import path_argument, quoted, text_argument
from liverseg_dist.tracking.provenance import collect_provenance
from liverseg_dist.training.crash_report import summarize_exception

PARTS = ("test", "validation", "train")
PART_WORDS = {
    "test": "test cases",
    "validation": "validation cases",
    "train": "training cases",
    "cases": "chosen cases",
}
SHARED_DISK_PATIENCE_S = 60.0
"""A file another node wrote may take this long to be seen on a network file system."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="inference.* settings for this evaluation"
    )
    parser.add_argument(
        "--store",
        type=text_argument,
        metavar="STORE",
        help="the Zarr store (default: the one the run was trained on)",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="default: test, or validation where the store has no test cases",
    )
    parser.add_argument(
        "--cases", metavar="ID,ID", help="these cases only, whatever part they are in"
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
        "--out", type=path_argument, metavar="DIR", help="default: RUN/evaluation, or in it PART/"
    )
    parser.add_argument(
        "--save-masks", action="store_true", help="also write OUT/masks/CASE.nii.gz"
    )
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    world = World.from_environment(args.device)
    if not world.is_main:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - for the process's life; rank 0 does the talking
    torch.set_num_threads(
        1
    )  # windows are computed side by side instead: the same bits for any number of threads
    keep_freed_memory()
    runs = load_runs(args, world, args.overrides)
    store = store_for(args, runs)
    case_ids, part, folder = _choose(args, runs[0], store)
    seen = find_training_overlap(runs, store, case_ids) if part != "train" else {}
    if seen and args.part is None and args.cases is None:
        raise UserError(
            f"{format_leakage_warning(seen)}: an ensemble is judged on cases that none of its runs knows; make a store with a "
            f"test set (convert.splits.test_fraction), or say --part {part} to score these all the same"
        )
    inputs, unlabelled = inputs_for(store, case_ids, runs[0].settings, args.source, args.force)
    if not inputs.slabs:
        raise UserError(
            f"{store.path}: {part} has no labelled case; choose another --part or --cases"
        )
    if args.out is None and args.source is None:
        refuse_slabs_over_scans(folder)
    job = _job(args, runs, inputs, folder, world)

    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        if unlabelled:
            print(f"left out, without a label: {', '.join(unlabelled)}")
        if seen:
            print(
                f"warning: {format_leakage_warning(seen)}: expect less on others", file=sys.stderr
            )
        moved = broadcast_from_rank0(
            move_earlier_results(folder, job.ledger.fingerprint) if world.is_main else None
        )
        if moved is not None:
            print(_describe_move(moved, folder), flush=True)
        reused = _work(job, folder, world, watch)
        watch.mark(-1, "writing the results")
        details = _details(args, runs, part, inputs, seen)
        training = _training_curves(runs)
        return broadcast_from_rank0(
            _finish(job, folder, details, training, reused) if world.is_main else None
        )

    return run_distributed(world, args.timeout, folder, work)


def _choose(
    args: argparse.Namespace, run: LoadedRun, store: CaseStore
) -> tuple[list[str], str, Path]:
    """(case ids, name of the part, folder for the results)."""
    home = run.path / EVALUATION
    if args.cases is not None:
        index = ScanIndex(store.case_ids)
        names = [name.strip() for name in args.cases.split(",") if name.strip()]
        wanted = [index.find(name) or name for name in names]
        strangers = sorted(set(wanted) - set(store.case_ids))
        if strangers or not wanted:
            raise UserError(f"--cases: {', '.join(strangers) or 'nothing'} is not in {store.path}")
        return sorted(set(wanted)), "cases", args.out or home / "cases"
    fold = run.settings.data.fold
    default: Part = "test" if store.ids("test", fold) else "validation"
    part: Part = args.part or default
    return list(store.ids(part, fold)), part, args.out or (home if part == default else home / part)


def refuse_slabs_over_scans(folder: Path) -> None:
    """The scores to publish are not replaced by others. Raises `UserError`."""
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        scans = content["details"]["input"] == "scan"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if scans:
        raise UserError(
            f"{folder}: holds the scores of whole scans; give --source again, or another --out for those of slabs"
        )


def _job(
    args: argparse.Namespace, runs: list[LoadedRun], inputs: CaseInputs, folder: Path, world: World
) -> Evaluation:
    fingerprint = (
        runs_fingerprint(runs)
        | {"input": input_kind(inputs), "calibration": BINS}
        | gate_of(inputs)
    )
    masks = None
    if args.save_masks:
        masks = Ledger(folder / "masks" / LEDGER, fingerprint)
        masks.folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / LEDGER, fingerprint)
    predictor = predictor_for(runs, world.device, window_threads(args, world))
    return Evaluation(inputs, predictor, ledger, masks, folder / PICTURES)


def _work(job: Evaluation, folder: Path, world: World, watch: HeartbeatMonitor) -> int:
    """Score this rank's share; returns how many cases of all ranks were already done. Ends together on all ranks."""
    before = broadcast_from_rank0(sorted(job.ledger.done()))
    known = sorted(job.inputs.slabs.keys() & set(before))
    new = {name: size for name, size in voxels_of(job.inputs).items() if name not in before}
    fresh = divide_work(new, world.global_rank, world.world_size)
    team = WindowParallel(world.device)
    shared = replace(
        job, predictor=job.predictor.spread_by(team.map_windows), together=team.case_scope
    )
    alone = [*known[world.global_rank :: world.world_size], *fresh.alone]
    reused = 0
    total = len(job.inputs.slabs)
    with case_progress("evaluate", total, world, watch) as line:
        for case_id in (*fresh.together, *alone):
            watch.mark(-1, f"scoring {case_id}")
            try:
                if case_id not in fresh.together:
                    reused += job.run_case(case_id)
                elif world.is_main:
                    shared.run_case(case_id)
                else:
                    shared.help_case(case_id)
            except PeerFailed:
                pass  # told by the rank that failed
            except RunFailed as error:
                is_helper = case_id in fresh.together and not world.is_main
                # A helper reports nothing of a refusal: rank 0 prints the same reason.
                if not (is_helper and isinstance(error.__cause__, ScanRefused)):
                    report_case_failure(error, world, folder, case_id)
            line.advance(note=case_id, shared=case_id in fresh.together)
        watch.mark(-1, "waiting for the others' cases")
        barrier()
        line.complete(total)
    return sum(gather_from_ranks(reused))


def _finish(
    job: Evaluation, folder: Path, details: dict[str, Any], training: dict[str, Curves], reused: int
) -> dict[str, Any]:
    """Aggregate the ledger, write the files, print the result. Any failure is part of the answer to all ranks."""
    try:
        cases, failures = _read_ledger(job.ledger, set(job.inputs.slabs))
        if not cases:
            first = next(iter(failures.values()), "no reason was kept")
            raise RunFailed(
                f"{folder}: none of {len(job.inputs.slabs)} cases could be scored; the first: {first}"
            )
        print_scan_warnings(cases)
        details = _with_scan_note(details, cases)
        machine = {"date": time.strftime("%Y-%m-%d"), **collect_provenance(job.predictor.device)}
        summary = write_results(
            folder,
            cases,
            failures,
            details,
            job.ledger,
            machine,
            training=training,
            postprocessing=postprocessing_settings(job.predictor.config),
        )
        write_tensorboard(
            folder, summary, cases, folder / PICTURES, job.inputs.settings.train.max_steps
        )
    except (LiversegError, OSError) as error:
        line = summarize_exception(error)
        print(f"liverseg: {line}", file=sys.stderr)
        return {"error": line, "exit_code": EXIT_FAILED}
    _say(summary, cases, folder)
    return {
        "out": str(folder),
        "summary": str(folder / "summary.json"),
        "report": str(folder / "report.html"),
        "n_cases": summary["n_cases"],
        "reused": reused,
        "failed": failures,
        "liver_dice": summary["liver"]["dice_per_case"],
        "tumour_dice": summary["tumour"]["dice_per_case"],
        "exit_code": EXIT_FAILED if failures else EXIT_DONE,
    }


def _describe_move(moved: Path, folder: Path) -> str:
    """Say where the results of other weights or settings were moved, with their main figures."""
    summary = json.loads((moved / SUMMARY).read_text(encoding="utf-8"))
    dice = ", ".join(
        f"{name} Dice {format_ratio(summary[name]['dice_per_case'])}"
        for name in ("liver", "tumour")
    )
    return (
        f"earlier results of other weights or settings are kept in {moved} ({dice}); to compare: "
        f"liverseg compare {quoted(moved)} {quoted(folder)}"
    )


def _with_scan_note(details: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The details with a note about scans that have warnings, or that --force let through."""
    notes = [details["note"]] if "note" in details else []
    for key, phrase in (
        ("forced", "segmented by --force although the audit refuses them"),
        ("", "with warnings"),
    ):
        names = []
        for case in cases:
            codes = sorted(
                {finding["code"] for finding in warnings_of(case.get("scan_findings", ()))}
            )
            if codes and bool(case.get("forced")) == bool(key):
                names.append(f"{case['case_id']} ({', '.join(codes)})")
        if names:
            notes.append(f"{phrase}: {', '.join(names)}")
    return {**details, "note": "; ".join(notes)} if notes else details


def _read_ledger(ledger: Ledger, wanted: set[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Scores and failures of these cases; waits for what other nodes wrote to be seen here."""
    end = time.monotonic() + SHARED_DISK_PATIENCE_S
    while True:
        cases = [case for case in ledger.read_all() if case["case_id"] in wanted]
        failures = {name: text for name, text in ledger.failures().items() if name in wanted}
        missing = sorted(wanted - {case["case_id"] for case in cases} - set(failures))
        if not missing:
            return cases, failures
        if time.monotonic() > end:
            raise RunFailed(
                f"{ledger.folder}: no entry for {', '.join(missing[:5])}; run the same line again"
            )
        time.sleep(0.5)


def _details(
    args: argparse.Namespace, runs: list[LoadedRun], part: str, inputs: CaseInputs, seen: Seen
) -> dict[str, Any]:
    """What the report states about the evaluation: nothing in it depends on ranks, time or machine."""
    settings = runs[0].settings.model_dump(mode="json")
    run_name = printable(args.run.resolve().name)
    data_set = str(inputs.store.root["name"] or Path(inputs.store.path).name)
    inference = runs[0].settings.inference
    details: dict[str, Any] = {
        "title": f"{run_name}: evaluation on the {PART_WORDS[part]} of {data_set}",
        "run": run_name,
        "data_set": data_set,
        "store": Path(inputs.store.path).resolve().name,
        "postprocessing": describe_postprocessing(inference, args.run),
        "part": part,
        "fold": runs[0].settings.data.fold,
        "input": input_kind(inputs),
        "weights": args.weights,
        "weights_sha256": [run.weights_sha256 for run in runs],
    }
    notes = []
    if inputs.sources is None:
        notes.append(
            "64-slice slabs, placed with the help of the truth; outside them all is background"
        )
    if part == "validation" and (args.run / POSTPROCESS).is_file():
        notes.append("post-processing was chosen on these cases: expect a little less on others")
    if seen:
        notes.append(f"{format_leakage_warning(seen)}: expect less on others")
    if notes:
        details["note"] = "; ".join(notes)
    details |= {
        name: settings[name] for name in ("inference", "data", "convert", "model", "loss", "train")
    }
    details["data"].pop("store")  # where it lies is no part of the result
    details["audit"] = audit_summary(inputs.store.audit)
    return details


def _training_curves(runs: list[LoadedRun]) -> dict[str, Curves]:
    """Training curves by run name; runs of one name are numbered, a run that was given twice appears once."""
    folders = dict.fromkeys(run.path.resolve() for run in runs)
    names = [folder.name for folder in folders]
    return {
        name if names.count(name) == 1 else f"{name} ({number})": read_curves(folder)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True), start=1)
    }


def _say(summary: dict[str, Any], cases: list[dict[str, Any]], folder: Path) -> None:
    kind = summary["details"]["input"]
    aided = (
        ", placed with the help of the truth (--source: whole scans, the score to publish)"
        if kind == "slab"
        else ""
    )
    print(f"{summary['n_cases']} cases, {kind}s{aided}, on the scans' own voxels")
    print(f"post-processing: {summary['details']['postprocessing']}")
    for line in format_summary(summary):
        print(line)
    for note in list_distance_notes(cases):
        print(f"note: {note}")
    if summary["failed"]:
        print(f"failed: {', '.join(summary['failed'])}")
    print(f"report: {folder / 'report.html'}", flush=True)
