"""Train a small denoiser on noisy CTs; no clean images are needed.

  liverseg denoiser Task03_Liver --out denoiser.safetensors
  tools/to_zarr Task03_Liver store.zarr \\
      convert.cleaning.noise=autoencoder convert.cleaning.denoiser=denoiser.safetensors

SRC is a data set in the MSD layout, or NIfTI files. 1500 steps take a few minutes on one CPU core. The noise of
soft tissue before and after is printed. The content of the file is stored with the settings of stores and runs.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liverseg_dist.console import write_lines
from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.preprocessing.denoise import estimate_noise
from liverseg_dist.data.preprocessing.denoiser_training import DenoiserTraining, train_denoiser
from liverseg_dist.data.preprocessing.denoising_autoencoder import apply_denoiser
from liverseg_dist.data.preprocessing.invalid_voxels import fill_invalid_voxels
from liverseg_dist.errors import UserError
from liverseg_dist.files import write_bytes
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.volume import CANONICAL_ORIENTATION

_logger = logging.getLogger(__name__)
# Neighbouring slices are nearly copies of each other. Few slices of many scans teach more than all
# slices of few.
SLICES_PER_SCAN = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path_argument,
        nargs="+",
        metavar="SRC",
        help="folder of a data set, or NIfTI files",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="file for the denoiser, e.g. denoiser.safetensors",
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--scans", type=int, default=20, help="use at most this many scans (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of all random numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to train (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.steps < 1 or args.scans < 1:
        raise UserError("--steps and --scans must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; omit the option to train on the CPU")
    # Checked before the scans are read and the network is trained, which takes minutes.
    if not args.out.parent.is_dir():
        raise UserError(
            f"{args.out.parent}: no such folder; --out must name a file in an existing folder"
        )
    scans = read_scans(_list_files(args.source), args.scans, args.seed)
    training = DenoiserTraining(steps=args.steps, seed=args.seed)
    with show_progress("denoiser", args.steps) as line:
        denoiser = train_denoiser(
            scans,
            training,
            torch.device(args.device),
            lambda step, loss: line.advance(note=f"loss {loss:.4f}"),
        )
    write_bytes(args.out, denoiser.to_bytes())
    # The noise before and after is measured on the scans of the training. It shows that the
    # denoiser works, not how well it does on other scans.
    before_hu = float(np.mean([estimate_noise(scan) for scan in scans]))
    after_hu = float(np.mean([estimate_noise(apply_denoiser(scan, denoiser)) for scan in scans]))
    write_lines(
        f"{args.out}: from {len(scans)} scans; noise of soft tissue {before_hu:.1f} HU before, "
        f"{after_hu:.1f} HU after"
    )
    return {
        "denoiser": str(args.out),
        "scans": len(scans),
        "noise_before_hu": before_hu,
        "noise_after_hu": after_hu,
    }


def read_scans(files: list[Path], max_scans: int, seed: int) -> list[np.ndarray]:
    """Read up to `SLICES_PER_SCAN` neighbouring slices of randomly drawn scans. Unreadable scans are left out.

    Args:
        max_scans: number of scans to read.

    Returns:
        Arrays (slices, y, x) in HU.
    """
    rng = np.random.default_rng(seed)
    scans: list[np.ndarray] = []
    for number in rng.permutation(len(files)):
        if len(scans) == max_scans:
            break
        try:
            voxels, _ = fill_invalid_voxels(
                read_nifti(files[number]).reoriented(CANONICAL_ORIENTATION).voxels
            )
        except ScanFileError as error:
            _logger.info("left out: %s", error)
            continue
        # A random block of slices: always the first ones would show the pelvis or the lungs only.
        start = int(rng.integers(max(1, len(voxels) - SLICES_PER_SCAN + 1)))
        scans.append(np.ascontiguousarray(voxels[start : start + SLICES_PER_SCAN]))
    if not scans:
        raise UserError("no scan could be read; give the folder of a data set, or NIfTI files")
    return scans


def _list_files(sources: list[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            dataset = read_dataset(source)
            files += [
                case.image for case in (*dataset.training, *dataset.test) if case.image.is_file()
            ]
        else:
            files.append(source)
    # Sorted: the order of a folder's entries depends on the file system, and the seed must choose
    # the same scans everywhere.
    return sorted(files)
