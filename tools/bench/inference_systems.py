"""Sliding-window prediction by this project, MONAI and nnU-Net, on equal inputs with equal options.

Used by `inference.py` (overhead and memory on a CPU) and `gpu` (a real network on a GPU).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.precision import autocast

PEER_PACKAGES = {"monai": ("monai",), "nnunet": ("nnunetv2", "acvl_utils")}
"""Modules that each needs."""
OVERLAP = 0.5
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """How all systems predict."""

    average: Any = "probabilities"
    """probabilities or logits; nnU-Net always averages logits."""
    mirror: bool = False
    """Average over the eight copies that are mirrored along z, y and x."""
    device: str = "cpu"
    precision: str = "fp32"
    """nnU-Net's predictor uses fp16 on a GPU."""
    batch: int = 1
    """Windows at once; nnU-Net takes one."""


class Cheap(nn.Module):
    """Three logits from each voxel and its place in the window; keeps count of its own CPU time."""

    def __init__(self, patch: Shape) -> None:
        super().__init__()
        z, y, x = (torch.linspace(-1, 1, n) for n in patch)
        self.place = (z[:, None, None] + y[:, None] * 0.5 - x * 0.7)[None, None]
        self.spent_s, self.windows = 0.0, 0

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        begin = time.process_time()
        liver = image_BCDHW * 2 + self.place
        result = torch.cat([-liver, liver, image_BCDHW * 3 - 2], dim=1)
        self.spent_s += time.process_time() - begin
        self.windows += len(image_BCDHW)
        return result


def make_scan(shape: Shape) -> np.ndarray:
    """Smooth structure and noise, float32, normalised."""
    rng = np.random.default_rng(0)
    plane = np.kron(
        rng.standard_normal((-(-shape[1] // 32), -(-shape[2] // 32))), np.ones((32, 32))
    )
    image = np.empty(shape, dtype=np.float32)
    for z in range(shape[0]):
        image[z] = plane[: shape[1], : shape[2]] + 0.3 * rng.standard_normal(shape[1:])
    return image


def run_ours(image: np.ndarray, model: nn.Module, patch: Shape, options: Options) -> None:
    """Stream the probabilities, as the commands do; nothing holds those of the whole scan."""
    if options.device == "cpu":
        keep_freed_memory()
    for _ in build_our_predictor(model, patch, options).stream_probabilities(image):
        pass


def build_our_predictor(model: nn.Module, patch: Shape, options: Options) -> SlidingWindowPredictor:
    config = InferenceConfig(
        overlap=OVERLAP,
        average=options.average,
        mirror=options.mirror,
        precision=options.precision,  # type: ignore[arg-type]
        batch_size=options.batch,
    )
    return SlidingWindowPredictor(
        model, patch, OutputChannels(), config=config, device=torch.device(options.device)
    )


def run_monai(image: np.ndarray, model: nn.Module, patch: Shape, options: Options) -> np.ndarray:
    """MONAI's inferer; it leaves mirroring and the softmax to the caller's function."""
    from monai.inferers import sliding_window_inference

    def compute(batch: Tensor) -> Tensor:
        with autocast(options.device, options.precision):
            return model(batch).float()

    def predict(batch: Tensor) -> Tensor:
        total = compute(batch) if options.average == "logits" else compute(batch).softmax(1)
        copies = 1
        for count in (1, 2, 3) if options.mirror else ():
            for axes in combinations((2, 3, 4), count):
                logits = compute(batch.flip(axes)).flip(axes)
                total = total + (logits if options.average == "logits" else logits.softmax(1))
                copies += 1
        return total / copies

    with torch.inference_mode():
        result = sliding_window_inference(
            torch.from_numpy(image)[None, None].to(options.device),
            roi_size=patch,
            sw_batch_size=options.batch,
            predictor=predict,
            overlap=OVERLAP,
            mode="gaussian",
            sigma_scale=0.125,
        )
        return (result.softmax(1) if options.average == "logits" else result)[0].cpu().numpy()


def run_nnunet(image: np.ndarray, model: nn.Module, patch: Shape, options: Options) -> np.ndarray:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=OVERLAP,
        use_mirroring=options.mirror,
        device=torch.device(options.device),
        allow_tqdm=False,
    )
    predictor.network = model
    predictor.configuration_manager = SimpleNamespace(patch_size=patch)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=3)
    predictor.allowed_mirroring_axes = (0, 1, 2) if options.mirror else None
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)[None])
    return logits.cpu().numpy()


SYSTEMS: dict[str, Callable[[np.ndarray, nn.Module, Shape, Options], np.ndarray | None]] = {
    "ours": run_ours,
    "monai": run_monai,
    "nnunet": run_nnunet,
}
