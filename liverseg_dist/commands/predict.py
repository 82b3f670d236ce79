"""Segment scans: one mask per scan, with the scan's own shape and affine, whatever its orientation and spacing.

  liverseg predict runs/first SCAN.nii.gz --out masks/
  liverseg predict runs/first imagesTs/ --out masks/ inference.mirror=true
  liverseg predict runs/fold0 --ensemble runs/fold1 --ensemble runs/fold2 imagesTs/ --out masks/
  torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 \\
      -m liverseg_dist predict runs/first imagesTs/ --out masks/

Labels: 0 background, 1 liver, 2 tumour. volumes.csv gets liver and tumour volume (ml) and tumour burden of each scan.
Run the same line again after a stop: finished scans are not segmented again (--force does).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.commands.options import add_inference, window_threads
from liverseg_dist.commands.run_cases import load_runs
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, RunFailed, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.inference.load_run import predictor_for, runs_fingerprint
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.predict_scans import Prediction, find_scans, scan_name
from liverseg_dist.inference.work_division import divide_work
from liverseg_dist.tracking.progress import show_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="scans (.nii, .nii.gz) or folders of them; then inference.KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the masks"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write float32 probabilities of liver and tumour",
    )
    parser.add_argument("--force", action="store_true", help="segment again what is done")
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
    files = find_scans([Path(text) for text in args.inputs if text not in overrides], args.out)
    if not files:
        raise UserError("no scan is given; name .nii.gz files or a folder of them after RUN")
    job = _job(args, overrides, world)
    return run_distributed(
        world, args.timeout, args.out, lambda watch: _predict(args, job, files, world, watch)
    )


def _predict(
    args: argparse.Namespace,
    job: Prediction,
    files: list[Path],
    world: World,
    watch: HeartbeatMonitor,
) -> dict[str, Any]:
    failed = _work(job, files, world, watch)
    watch.mark(-1, "writing the table")
    barrier()
    table = broadcast_from_rank0(str(job.write_table()) if world.is_main else None)
    print(f"table: {table}", flush=True)
    all_mistakes = len(failed) == len(files) and all(failed.values())
    return {
        "out": str(args.out),
        "table": table,
        "masks": [
            str(job.mask_file(scan_name(file))) for file in files if scan_name(file) not in failed
        ],
        "failed": sorted(failed),
        "exit_code": EXIT_DONE if not failed else EXIT_USER if all_mistakes else EXIT_FAILED,
    }


def _job(args: argparse.Namespace, overrides: list[str], world: World) -> Prediction:
    runs = load_runs(args, world, overrides)
    settings = runs[0].settings
    (args.out / "probabilities" if args.probabilities else args.out).mkdir(
        parents=True, exist_ok=True
    )
    ledger = Ledger(args.out / "ledger", runs_fingerprint(runs))
    return Prediction(
        predictor_for(runs, world.device, window_threads(args, world)),
        settings,
        args.out,
        ledger,
        args.probabilities,
        args.force,
    )


def _work(
    job: Prediction, files: list[Path], world: World, watch: HeartbeatMonitor
) -> dict[str, bool]:
    """Segment this rank's share; returns for each scan that failed, on any rank, whether it was the user's mistake."""
    before = set() if job.force else broadcast_from_rank0(job.ledger.done())
    known = [file for file in files if scan_name(file) in before]
    size = {
        str(file): file.stat().st_size if file.is_file() else 0
        for file in files
        if file not in known
    }
    failed: dict[str, bool] = {}
    fresh = divide_work(size, world.global_rank, world.world_size)
    team = WindowParallel(world.device)
    shared = replace(job, predictor=job.predictor.spread_by(team.spread), together=team.case)
    alone = [*known[world.global_rank :: world.world_size], *map(Path, fresh.alone)]
    with show_progress(
        "predict", len(fresh.together) + len(alone), quiet=not world.is_main
    ) as line:
        for file in (*map(Path, fresh.together), *alone):
            watch.mark(-1, f"segmenting {file.name}")
            try:
                if str(file) in fresh.together and not world.is_main:
                    shared.help_file(file)
                else:
                    record, is_known = (shared if str(file) in fresh.together else job).run_file(
                        file
                    )
                    print(_line(record, is_known), flush=True)
            except (UserError, RunFailed) as error:
                if (
                    world.is_main or str(file) not in fresh.together
                ):  # a helper's failure fails the scan on rank 0, too
                    failed[scan_name(file)] = isinstance(error, UserError)
                if not isinstance(error, PeerFailed):  # that one was told by the rank that failed
                    report_case_failure(error, world, job.out, file.name)
            line.advance(note=file.name)
    watch.mark(-1, "waiting for the others' scans")
    return {name: mistake for part in gather_from_ranks(failed) for name, mistake in part.items()}


def _line(record: dict[str, Any], known: bool) -> str:
    burden = "" if record["burden"] is None else f", burden {100 * record['burden']:.2f} %"
    note = "  (done before)" if known else ""
    volumes = f"liver {record['liver_ml']:.1f} ml, tumour {record['tumour_ml']:.2f} ml in {record['tumours']}"
    return f"{record['case_id']}: {volumes}{burden}{note}"


def load_prediction(args: argparse.Namespace, overrides: list[str], world: World) -> Prediction:
    """The work of this command as a part of another one; call it before the ranks connect."""
    return _job(args, overrides, world)


def segment_share(
    job: Prediction, files: list[Path], world: World, watch: HeartbeatMonitor
) -> dict[str, bool]:
    """Segment this rank's share of scans while the ranks are connected; as `_work`, for other commands."""
    return _work(job, files, world, watch)
