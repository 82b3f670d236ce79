"""Inference on a scan of 400 x 512 x 512 voxels: the predictors on equal windows, and file to mask.

The network is that of the M configuration with random weights for all systems, and one 16-bit
precision: fp16, which nnU-Net's predictor always uses on a GPU.
"""

import time
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from inference_systems import PEER_PACKAGES, SYSTEMS, Options, Shape, make_scan
from torch import nn

from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.model import build_model

from .context import Context, Figures
from .data import (
    CONFIGS,
    common_overrides,
    load_preset,
    phantom_source,
    phantom_store,
    prepared_once,
    run_command,
)
from .nnunet_plans import (
    CONFIGURATION,
    DATASET_JSON,
    build_plans,
    set_environment,
    set_nnunet_variable,
)

SCAN: Shape = (400, 512, 512)
MIRRORED_SCAN: Shape = (128, 512, 512)
"""Eight copies of each window: fewer slices."""
SMALL_SCAN: Shape = (20, 40, 40)
BATCHES = (1, 2, 4, 8)
NNUNET_FILE_S = 45.0


def run(context: Context) -> None:
    set_environment(context.work)
    set_nnunet_variable("compile", "f")
    for system in SYSTEMS:
        measure_predictor(context, system, 1, is_mirrored=False)
    for system in SYSTEMS:
        measure_predictor(context, system, 1, is_mirrored=True)
    for batch in BATCHES[1:]:
        measure_predictor(context, "ours", batch, is_mirrored=False)
    for mirror in ("false", "true"):
        context.measure(
            "file to mask",
            f"liverseg predict, mirror={mirror}",
            lambda m=mirror: predict_file(context, m),
            needs_s=8,
        )
    context.measure(
        "file to mask",
        "nnU-Net's predictor, mirrored",
        lambda: predict_file_with_nnunet(context),
        packages=(*PEER_PACKAGES["nnunet"], "SimpleITK", "skimage"),
        needs_s=NNUNET_FILE_S,
    )


def measure_predictor(context: Context, system: str, batch: int, *, is_mirrored: bool) -> None:
    scan = context.choose(MIRRORED_SCAN if is_mirrored else SCAN, SMALL_SCAN)
    size = "x".join(map(str, scan))
    context.measure(
        f"windows of {size}{', mirrored' if is_mirrored else ''}",
        f"{system}, batch {batch}",
        lambda: predict_windows(context, system, scan, batch, is_mirrored),
        packages=PEER_PACKAGES.get(system, ()),
        needs_s=6,
    )


def predict_windows(
    context: Context, system: str, scan: Shape, batch: int, is_mirrored: bool
) -> Figures:
    settings = load_preset(context, "M")
    patch = settings.data.patch_size
    torch.manual_seed(0)
    model = CountedModel(build_model(settings.model)).to(context.device).eval()
    options = Options(
        mirror=is_mirrored,
        device=context.device.type,
        precision=context.choose("fp16", "fp32"),
        batch=batch,
    )
    torch.backends.cudnn.benchmark = True
    run_system = SYSTEMS[system]
    # Kernels are chosen in the first windows.
    run_system(make_scan(patch), model, patch, options)
    image = make_scan(scan)
    model.windows = 0
    is_cuda = context.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run_system(image, model, patch, options)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    found: Figures = {
        "seconds": seconds,
        "forward_windows": model.windows,
        "ms_per_window": seconds / model.windows * 1e3,
    }
    if is_cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


class CountedModel(nn.Module):
    """A network that gives its full resolution only, and counts windows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.windows = 0

    def forward(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        self.windows += len(image_BCDHW)
        outputs = self.model(image_BCDHW)
        return outputs[0] if isinstance(outputs, list) else outputs


def trained_run(context: Context) -> Path:
    """Return a run of the M configuration after one step."""
    phantom_store(context)
    path = context.work / "run_for_prediction"
    with prepared_once(path) as is_missing:
        if is_missing:
            run_command(
                "train", "--device", context.device.type, "--config", CONFIGS["M"],
                *common_overrides(context), f"run.dir={path}", "train.max_steps=1",
                "validation.every_steps=0",
            )  # fmt: skip
    return path


def scan_file(context: Context) -> Path:
    """Return a phantom that was enlarged to the voxels of a long CT, as a compressed file."""
    path = context.work / "scans" / "long_0000.nii.gz"
    with prepared_once(path) as is_missing:
        if is_missing:
            source = sorted((phantom_source(context) / "imagesTr").glob("*.nii.gz"))[0]
            scan = read_nifti(source, "image")
            voxels = torch.from_numpy(np.asarray(scan.voxels, dtype=np.float32))[None, None]
            shape = context.choose(SCAN, (40, 60, 60))
            larger = F.interpolate(voxels, size=shape, mode="trilinear")[0, 0].numpy()
            spacing_mm = [float(mm) for mm in scan.spacing_mm]
            scale = [
                n / m * mm for n, m, mm in zip(voxels.shape[2:], shape, spacing_mm, strict=True)
            ]
            # NIfTI has x first; LPS to RAS is the sign of the first two axes.
            affine = np.diag([-scale[2], -scale[1], scale[0], 1.0])
            image = nibabel.Nifti1Image(larger.round().astype(np.int16).transpose(2, 1, 0), affine)
            nibabel.save(image, path)
    return path


def predict_file(context: Context, mirror: str) -> Figures:
    """`liverseg predict`: from the compressed file to the compressed mask."""
    run_dir, file = trained_run(context), scan_file(context)
    mirror = mirror if not context.is_small else "false"
    out = context.work / f"masks_{mirror}"
    started = time.perf_counter()
    run_command(
        "predict", run_dir, file, "--out", out, "--device", context.device.type, "--again",
        "--force", f"inference.mirror={mirror}",
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started}


def predict_file_with_nnunet(context: Context) -> Figures:
    """nnU-Net's predictor with the same plan, network and (random) weights of its own network."""
    import peer_networks
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    settings = load_preset(context, "M")
    plans = build_plans(settings)
    del plans["continue_training"]
    manager = PlansManager(plans)
    network = peer_networks.build_nnunet(settings.model)
    predictor = nnUNetPredictor(device=context.device, allow_tqdm=False)
    predictor.manual_initialization(
        network, manager, manager.get_configuration(CONFIGURATION), [network.state_dict()],
        DATASET_JSON, "nnUNetTrainer", (0, 1, 2),
    )  # fmt: skip
    out = context.work / "masks_nnunet"
    out.mkdir(exist_ok=True)
    started = time.perf_counter()
    predictor.predict_from_files_sequential([[str(scan_file(context))]], [str(out / "long")])
    return {"seconds": time.perf_counter() - started}
