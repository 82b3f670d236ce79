"""Segment scans: one mask per scan, with the scan's own shape and affine, whatever its orientation and spacing.

  liverseg predict runs/first SCAN.nii.gz --out masks/
  liverseg predict runs/first imagesTs/ --out masks/ inference.mirror=true
  liverseg predict runs/fold0 --ensemble runs/fold1 --ensemble runs/fold2 imagesTs/ --out masks/
  torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 \\
      -m liverseg_dist predict runs/first imagesTs/ --out masks/

A mask is called as its scan, without the channel number `_0000` (liver_1_0000.nii.gz becomes liver_1.nii.gz).
Labels: 0 background, 1 liver, 2 tumour. volumes.csv gets liver and tumour volume (ml) and tumour burden of each scan.
Run the same line again after a stop: finished scans are not segmented again (--again does).

Every scan passes the audit of `convert`: what that excludes (MR, grey values, a missing offset of 1024, broken voxels,
too few slices) is refused, the other scans go on, and the exit code is 1. --force segments refused scans and marks them
`forced` in volumes.csv. What the audit warns of, in the scan or in the mask, is printed and stands in the column
`warnings`.
"""

import argparse
import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.commands.case_progress import case_progress
from liverseg_dist.commands.options import add_inference, window_threads
from liverseg_dist.commands.run_cases import load_runs
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, RunFailed, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.inference.load_run import build_predictor, fingerprint_runs
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.predict_scans import ScanPredictor
from liverseg_dist.inference.scan_checks import (
    ScanRefused,
    fingerprint_scan_checks,
    format_warnings,
    select_warnings,
)
from liverseg_dist.inference.scan_files import describe_skipped_files, find_scans
from liverseg_dist.inference.work_division import divide_work
from liverseg_dist.texts.names import clean_text
from liverseg_dist.texts.paths import expand_path, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="scans (.nii, .nii.gz) or folders of them; then inference.KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the masks"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write float32 probabilities of liver and tumour",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="segment scans that the audit refuses as well, and mark them",
    )
    parser.add_argument("--again", action="store_true", help="segment again what is done")
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    world = World.from_environment(args.device)
    if not world.is_main:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - for the process's life; rank 0 does the talking
    torch.set_num_threads(
        1
    )  # windows are computed side by side instead: the same bits for any number of threads
    keep_freed_memory()
    overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    inputs = [_input_path(text) for text in args.inputs if text not in overrides]
    named = find_scans(inputs, args.out)
    if not named:
        raise UserError("no scan is given; name .nii.gz files or a folder of them after RUN")
    if world.is_main:
        for line in describe_skipped_files(inputs):
            print(f"warning: {line}", file=sys.stderr)
    files = list(named.values())
    new = [path for path in _written(args.out) if not path.exists()]
    job = replace(
        _job(args, overrides, world), scan_ids={file: name for name, file in named.items()}
    )
    result = run_distributed(
        world, args.timeout, args.out, lambda watch: _predict(args, job, files, world, watch)
    )
    if world.is_main and result.get("masks") == [] and result["exit_code"] == EXIT_USER:
        _remove(new)
    return result


def _input_path(text: str) -> Path:
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def _written(out: Path) -> list[Path]:
    """What a call writes, inner folders first: the folder itself may be made with its parents."""
    return [out / "ledger", out / "volumes.csv", out / "probabilities", out, *out.parents]


def _remove(paths: list[Path]) -> None:
    """Where no scan could be read, nothing is left of a call: neither a table of errors nor an empty folder."""
    for path in paths:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if path.name == "ledger":
                shutil.rmtree(path)
            elif path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


def _predict(
    args: argparse.Namespace,
    job: ScanPredictor,
    files: list[Path],
    world: World,
    watch: HeartbeatMonitor,
) -> dict[str, Any]:
    failed = _work(job, files, world, watch)
    watch.mark(-1, "writing the table")
    barrier()
    table = broadcast_from_rank0(str(job.write_volume_table()) if world.is_main else None)
    marks = broadcast_from_rank0(
        _marks(job, [job.get_scan_id(file) for file in files]) if world.is_main else None
    )
    all_mistakes = len(failed) == len(files) and all(failed.values())
    if not all_mistakes:
        print(f"table: {table}", flush=True)
    return {
        "out": str(args.out),
        "table": table,
        "masks": [
            str(job.get_mask_file(job.get_scan_id(file)))
            for file in files
            if job.get_scan_id(file) not in failed
        ],
        "failed": sorted(failed),
        **marks,
        "exit_code": EXIT_DONE if not failed else EXIT_USER if all_mistakes else EXIT_FAILED,
    }


def _job(args: argparse.Namespace, overrides: list[str], world: World) -> ScanPredictor:
    runs = load_runs(args, world, overrides)
    settings = runs[0].settings
    (args.out / "probabilities" if args.probabilities else args.out).mkdir(
        parents=True, exist_ok=True
    )
    ledger = Ledger(
        args.out / "ledger", fingerprint_runs(runs) | {"gate": fingerprint_scan_checks(settings)}
    )
    return ScanPredictor(
        build_predictor(runs, world.device, window_threads(args, world)),
        settings,
        args.out,
        ledger,
        args.probabilities,
        args.force,
        args.again,
    )


def _work(
    job: ScanPredictor, files: list[Path], world: World, watch: HeartbeatMonitor
) -> dict[str, bool]:
    """Segment this rank's share; returns for each scan that failed, on any rank, whether it was the user's mistake."""
    before = set() if job.recompute else broadcast_from_rank0(job.ledger.done())
    known = [file for file in files if job.get_scan_id(file) in before]
    size = {
        str(file): file.stat().st_size if file.is_file() else 0
        for file in files
        if file not in known
    }
    failed: dict[str, bool] = {}
    fresh = divide_work(size, world.global_rank, world.world_size)
    team = WindowParallel(world.device)
    shared = replace(
        job,
        predictor=job.predictor.with_window_mapper(team.map_windows),
        window_scope=team.case_scope,
    )
    alone = [*known[world.global_rank :: world.world_size], *map(Path, fresh.whole)]
    with case_progress("predict", len(files), world, watch) as line:
        for file in (*map(Path, fresh.shared), *alone):
            watch.mark(-1, f"segmenting {clean_text(file.name)}")
            try:
                if str(file) in fresh.shared and not world.is_main:
                    shared.compute_shared_windows(file)
                else:
                    record, is_known = (shared if str(file) in fresh.shared else job).segment_file(
                        file
                    )
                    print(_line(record, is_known), flush=True)
                    for text in format_warnings(record["case_id"], record["findings"]):
                        print(text, file=sys.stderr, flush=True)
            except (UserError, RunFailed) as error:
                if (
                    world.is_main or str(file) not in fresh.shared
                ):  # a helper's failure fails the scan on rank 0, too
                    failed[job.get_scan_id(file)] = isinstance(error, UserError)
                is_helper = str(file) in fresh.shared and not world.is_main
                # The failed rank prints its own reason; of a refusal rank 0 has the same one.
                is_reported_elsewhere = isinstance(error, PeerFailed) or (
                    is_helper and isinstance(error, ScanRefused)
                )
                if not is_reported_elsewhere:
                    report_case_failure(error, world, job.out, clean_text(file.name))
            line.advance(note=clean_text(file.name), shared=str(file) in fresh.shared)
        watch.mark(-1, "waiting for the others' scans")
        everything = gather_from_ranks(failed)
        line.complete(len(files))
    return {name: mistake for part in everything for name, mistake in part.items()}


def _marks(job: ScanPredictor, names: list[str]) -> dict[str, Any]:
    """Of this call's scans: which were refused, which were forced, and the codes of their warnings."""
    records = {
        record["case_id"]: record for record in job.ledger.read_all() if record["case_id"] in names
    }
    refused = job.ledger.failure_details()
    codes = {
        name: [f["code"] for f in select_warnings(record["findings"])]
        for name, record in records.items()
    }
    return {
        "refused": [name for name in names if name in refused],
        "forced": [name for name in names if name in records and records[name]["forced"]],
        "warnings": {name: found for name, found in codes.items() if found},
    }


def _line(record: dict[str, Any], known: bool) -> str:
    burden = "" if record["burden"] is None else f", burden {100 * record['burden']:.2f} %"
    note = "  (done before)" if known else ""
    note += "  (forced)" if record["forced"] else ""
    volumes = f"liver {record['liver_ml']:.1f} ml, tumour {record['tumour_ml']:.2f} ml in {record['tumours']}"
    return f"{record['case_id']}: {volumes}{burden}{note}"
