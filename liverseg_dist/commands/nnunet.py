"""Make a run folder of a network that nnU-Net v2 trained, for predict, evaluate and fine-tuning.

  liverseg nnunet results/Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0 runs/nnunet
  liverseg predict runs/nnunet SCAN.nii.gz --out masks/
  liverseg train ... model.pretrained=runs/nnunet       (or the folder of nnU-Net itself)

plans.json and dataset.json decide network, voxel size, normalisation, labels and mirroring. A fold
makes one run; `predict --ensemble` averages several. The checkpoint is read without running code of
it. Not supported: cascades, 2D networks, networks other than PlainConvUNet and ResidualEncoderUNet,
and images that are not normalised as CT. Scans are read in RAS orientation, as in the Medical
Segmentation Decathlon and TotalSegmentator. The licence of the weights is printed and kept in
source.json.
"""

import argparse
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_lines
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256, write_json, write_text
from liverseg_dist.inference.nnunet_run import build_run_settings
from liverseg_dist.model import build_model
from liverseg_dist.model.nnunet_folder import NO_LICENCE, NnunetFolder, is_nnunet_folder
from liverseg_dist.model.pretrained import copy_tensors
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.training.run_folder import RunFolder

SOURCE_FILE = "source.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_argument,
        metavar="FOLDER",
        help="result folder of nnU-Net v2 with plans.json, or one of its fold_*",
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="new folder for the run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the folder, print what it is, and exit"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not is_nnunet_folder(args.folder):
        raise UserError(
            f"{args.folder}: no plans.json in it; give the result folder of a training of nnU-Net "
            "v2, such as Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres"
        )
    folder = NnunetFolder.open(args.folder)
    settings = build_run_settings(folder)
    model = build_model(settings.model)
    report = copy_tensors(model, folder.rename_tensors(settings.model), folder.checkpoint)
    if report.missing:
        raise UserError(
            f"{folder.checkpoint}: has no {report.missing[0]}"
            f" (and {len(report.missing) - 1} more tensors of the network)"
        )
    licence = folder.licence or NO_LICENCE
    spacing = " x ".join(f"{mm:.3g}" for mm in settings.data.spacing_mm or ())
    write_lines(
        f"{folder.name}: {settings.model.architecture}, features "
        f"{list(settings.model.features or ())}, {spacing} mm (z, y, x), "
        f"{', '.join(settings.data.label_scheme.structure_names)}",
        f"licence of its training data: {licence}",
    )
    if args.dry_run:
        return {"run": str(args.run), "licence": licence, "dry_run": True}
    source = {
        "program": "nnU-Net v2",
        "network": folder.name,
        "checkpoint": folder.checkpoint.name,
        "checkpoint_sha256": file_sha256(folder.checkpoint),
        "licence": licence,
    }
    _write_run(args.run, settings.to_yaml(), model.state_dict(), source)
    write_lines(f"{args.run}: a run; `liverseg predict {args.run} SCAN --out DIR` applies it")
    return {"run": str(args.run), "licence": licence, "dry_run": False}


def _write_run(path: Path, config: str, weights: dict[str, Any], source: dict[str, Any]) -> None:
    """Write the run folder; the weights come last, because a folder without them is no run."""
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path}: is not empty; choose a new folder")
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    write_text(folder.config, config)
    write_json(path / SOURCE_FILE, source)
    folder.export(folder.model, weights)
