"""Segment scans: one mask per scan, with the shape and affine of the scan.

  liverseg predict runs/first SCAN.nii.gz --out masks/
  liverseg predict runs/first imagesTs/ --out masks/ inference.mirror=true
  liverseg predict runs/fold0 --ensemble runs/fold1 --ensemble runs/fold2 imagesTs/ --out masks/
  torchrun --standalone --nproc-per-node=4 -m liverseg_dist predict runs/first imagesTs/ --out masks/

A mask has the name of its scan without the channel number `_0000`: liver_1_0000.nii.gz becomes liver_1.nii.gz.
Its values are those of the run; dataset.json beside the masks names them. volumes.csv lists the
volume of each structure (ml), and the number and burden of lesions.

For a run of several channels, the files of a scan end in _0000, _0001, ... in the order of the
channels, or one 4D file has all of them, or --channel names each one:
  liverseg predict runs/ct_mr --channel CT=ct.nii.gz --channel T2=t2.nii.gz --out masks/
A channel may be missing if the run was trained for that (train.modality_dropout, or training cases
without it); volumes.csv lists the channels that were used.

A DICOM series is a folder, a ZIP or a list of files; a folder of several studies has one scan in each subfolder.
Its mask is named scan_ and a keyed hash, because folders often contain the name of a patient (--names folder keeps
it). NAME.seg.dcm and NAME.sr.dcm beside the mask are the DICOM segmentation and the report for a PACS; these carry
the patient of the source. With several series in a folder, --series selects one:
  liverseg predict runs/first study/ --series 4 --out masks/

Run the same line again after a stop: finished scans are not segmented again, unless --again is given.

Every scan passes the audit of `convert`. A scan that the audit excludes (MR, grey values, a missing offset of
1024, broken voxels, too few slices) is refused with exit code 1 while the other scans continue. --force segments
refused scans and marks them `forced` in volumes.csv. Warnings about a scan or its mask are printed and listed in
the column `warnings`.
"""

import argparse
import contextlib
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.commands.dicom_options import (
    add_dicom,
    add_dicom_results,
    dicom_options,
    dicom_results,
)
from liverseg_dist.commands.options import add_channels, add_inference, window_threads
from liverseg_dist.commands.run_cases import load_runs
from liverseg_dist.commands.run_distributed import run_distributed
from liverseg_dist.commands.segment_scans import segment_scans
from liverseg_dist.config import Settings
from liverseg_dist.console import write_lines
from liverseg_dist.distributed.collectives import barrier
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.inference.load_run import LoadedRun, build_predictor, fingerprint_runs
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.mask_table import (
    DATASET_FILE,
    check_dataset_file,
)
from liverseg_dist.inference.predict_scans import PROBABILITIES, ScanPredictor
from liverseg_dist.inference.scan_checks import (
    fingerprint_scan_checks,
    select_warnings,
)
from liverseg_dist.inference.scan_files import (
    ScanFiles,
    describe_skipped_files,
    find_named_channels,
    find_scans,
)
from liverseg_dist.logging_setup import ONCE
from liverseg_dist.texts.paths import expand_user_path, path_argument

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder of training")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE",
        help="scans (.nii, .nii.gz, DICOM folders or ZIPs) or folders of scans; then inference.KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the masks"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write the probabilities of each structure (float32)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also segment scans that the audit refuses, and mark them",
    )
    parser.add_argument("--again", action="store_true", help="also segment finished scans again")
    parser.add_argument(
        "--stages",
        choices=("auto", "parallel", "serial"),
        default="auto",
        help="parallel: read the next scan and write the last one while one is computed, which "
        "needs the memory of three scans (auto: on a GPU); the masks are the same",
    )
    add_channels(parser)
    add_dicom(parser)
    add_dicom_results(parser)
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Segment the scans on all ranks; rank 0 writes the table of volumes."""
    world = start_rank(args.device)
    # Several windows run at the same time instead, so that the result does not depend on the number
    # of threads.
    torch.set_num_threads(1)
    keep_freed_memory()
    overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    inputs = [expand_user_path(text) for text in args.inputs if text not in overrides]
    runs = load_runs(args, world, overrides)
    scans = find_scans_of_run(args, inputs, args.out, runs[0].settings)
    # Listed before the work starts: only what this call creates may be removed if nothing could be
    # read.
    new = [path for path in _output_paths(args.out) if not path.exists()]
    prediction = _build_prediction(args, runs, world)
    result = run_distributed(
        world,
        args.timeout,
        args.out,
        lambda monitor: _predict(args, prediction, scans, world, monitor),
    )
    # A wrong path should leave no trace, so that a corrected call starts clean.
    if result.get("masks") == [] and result["exit_code"] == EXIT_USER:
        world.call_on_rank0(partial(_remove, new))
    return result


def _output_paths(out: Path) -> list[Path]:
    """What a call creates, inner folders first. The parents of `out` may be new as well."""
    inside = [out / name for name in ("ledger", "volumes.csv", DATASET_FILE, PROBABILITIES)]
    return [*inside, out, *out.parents]


def _remove(paths: list[Path]) -> None:
    """Remove the output of a call that could not read any scan: a table of errors and empty folders."""
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
    prediction: ScanPredictor,
    scans: list[ScanFiles],
    world: World,
    monitor: HeartbeatMonitor,
) -> dict[str, Any]:
    # On a CPU the windows use all cores already, and the stages would only need more memory.
    in_stages = args.stages == "parallel" or (args.stages == "auto" and world.device.type == "cuda")
    failed = segment_scans(prediction, scans, world, monitor, in_stages)
    barrier()
    names = [scan.scan_id for scan in scans]
    table = share_from_rank0(lambda: str(prediction.write_volume_table()))
    marks = share_from_rank0(lambda: _collect_marks(prediction, names))
    # If all failures are mistakes of the call, nothing was computed and no table is worth naming.
    all_are_mistakes = len(failed) == len(scans) and all(failed.values())
    if not all_are_mistakes:
        write_lines(f"table: {table}")
    exit_code = EXIT_DONE
    if failed:
        exit_code = EXIT_USER if all_are_mistakes else EXIT_FAILED
    return {
        "out": str(args.out),
        "table": table,
        "masks": [str(prediction.get_mask_file(name)) for name in names if name not in failed],
        "dicom": [str(file) for file in prediction.list_dicom_files(names)],
        "failed": sorted(failed),
        **marks,
        "exit_code": exit_code,
    }


def find_scans_of_run(
    args: argparse.Namespace, inputs: list[Path], out: Path, settings: Settings
) -> list[ScanFiles]:
    """The scans that a command is given for a run, with the run's channels.

    Args:
        args: options with `channel`.
        inputs: files and folders.
        out: folder of the masks.
        settings: settings of the run.

    Raises:
        UserError: there is no scan, or the files are not those of the run's channels.
    """
    channels = settings.data.image_channels
    if args.channel:
        if inputs:
            raise UserError("--channel names the files itself; give no other scans with it")
        named = find_named_channels(args.channel, out, channels, dicom_options(args))
        return list(named.values())
    scans = list(find_scans(inputs, out, channels, dicom_options(args)).values())
    if not scans:
        # The two cases differ: a folder without scans is a mistake, skipped files in it are
        # normal.
        raise UserError(
            "no scan is given; name .nii.gz files, DICOM series or folders of them after RUN"
        )
    for line in describe_skipped_files(inputs, len(channels)):
        _logger.warning("%s", line, extra=ONCE)
    return scans


def _build_prediction(
    args: argparse.Namespace, runs: list[LoadedRun], world: World
) -> ScanPredictor:
    settings = runs[0].settings
    # Before anything is computed: the folder may have masks of other labels.
    check_dataset_file(args.out, settings.data.label_scheme)
    # Before the folder is made: the runs may not fit each other or the settings.
    predictor = build_predictor(runs, world.device, window_threads(args, world))
    # Probabilities take much more space than masks, so they are written on request only.
    folder = args.out / PROBABILITIES if args.probabilities else args.out
    folder.mkdir(parents=True, exist_ok=True)
    # The rules of the audit are part of the fingerprint: with other limits a refused scan may be
    # accepted.
    fingerprint = fingerprint_runs(runs) | {"gate": fingerprint_scan_checks(settings)}
    ledger = Ledger(args.out / "ledger", fingerprint)
    return ScanPredictor(
        predictor=predictor,
        settings=settings,
        out=args.out,
        ledger=ledger,
        dicom=dicom_results(args, ledger.fingerprint),
        with_probabilities=args.probabilities,
        force=args.force,
        recompute=args.again,
    )


def load_prediction(
    args: argparse.Namespace,
    overrides: list[str],
    inputs: list[Path],
    world: World,
    names: Mapping[Path, str] | None = None,
) -> tuple[ScanPredictor, list[ScanFiles]]:
    """Prepare segmentation as a part of another command. Call it before the ranks connect.

    Args:
        args: options of that command, with those of `predict`.
        overrides: settings `inference.*`.
        inputs: files and folders of scans.
        names: ids of the scans where their file names are not unique; each file is then a scan.

    Returns:
        What segments the scans, and the scans.
    """
    defaults = {"again": False, "force": False, "channel": [], "dicom_results": "none"}
    options = argparse.Namespace(**{**defaults, **vars(args)})
    runs = load_runs(options, world, overrides)
    if names is None:
        scans = find_scans_of_run(options, inputs, options.out, runs[0].settings)
    else:
        channels = len(runs[0].settings.data.image_channels)
        scans = [ScanFiles(name, (file,), channels) for file, name in names.items()]
    return _build_prediction(options, runs, world), scans


def _collect_marks(prediction: ScanPredictor, names: list[str]) -> dict[str, Any]:
    """Of the scans of this call: refused ones, forced ones, and the codes of their warnings."""
    records = {}
    for record in prediction.ledger.read_all():
        if record["case_id"] in names:
            records[record["case_id"]] = record
    refused = prediction.ledger.failure_details()
    warnings = {}
    for name, record in records.items():
        codes = [finding["code"] for finding in select_warnings(record["findings"])]
        if codes:
            warnings[name] = codes
    return {
        "refused": [name for name in names if name in refused],
        "forced": [name for name in names if name in records and records[name]["forced"]],
        "warnings": warnings,
    }
