"""The estimated memory of a step against the same step with real tensors on the CPU."""

import subprocess
import sys
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from liverseg_dist.config import LossConfig, ModelConfig
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.memory_trace import LiveBytes, TraceOptions, trace_memory
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.model.unet import UNet

PATCH = (16, 48, 48)
SPACING_MM = (2.5, 1.0, 1.0)


def config(architecture: str = "unet", preset: str = "tiny") -> ModelConfig:
    return resolve_topology(
        ModelConfig(architecture=architecture, preset=preset), PATCH, SPACING_MM
    )  # type: ignore[arg-type]


def real_step(
    model_config: ModelConfig, batch: int, levels: Collection[int], precision: str
) -> LiveBytes:
    model = UNet(model_config)
    model.set_checkpointing(levels)
    loss = build_loss(LossConfig(), OutputChannels())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as counter:
        image_BCDHW = torch.randn(batch, 1, *PATCH)
        label_BDHW = torch.zeros(batch, *PATCH, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(image_BCDHW)
        total = loss(outputs, label_BDHW).total
        del outputs
        total.backward()
    return counter


@pytest.mark.parametrize(("levels", "batch"), [((), 1), ((), 2), ((0,), 2), ((0, 1, 2, 3), 1)])
@pytest.mark.parametrize("architecture", ["unet", "resenc"])
def test_peak_equals_that_of_real_tensors(architecture: str, levels: tuple, batch: int) -> None:
    found = trace_memory(config(architecture), PATCH, batch, TraceOptions(levels, device="cpu"))
    real = real_step(config(architecture), batch, levels, "fp32").peak
    assert real <= found.peak <= (1.3 if levels else 1.05) * real


def test_peak_in_bf16_of_the_gpu_path() -> None:
    """Meta tensors use 16-bit weights instead of autocast; the reference is a real autocast step."""
    found = trace_memory(config(), PATCH, 1, TraceOptions(precision="bf16", device="cuda"))
    assert found.peak == pytest.approx(real_step(config(), 1, (), "bf16").peak, rel=0.1)


def test_bytes_kept_by_forward_equal_those_saved_by_autograd() -> None:
    model = UNet(config())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    image_BCDHW = torch.randn(1, 1, *PATCH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(image_BCDHW)
    beside = image_BCDHW.nbytes + sum(
        output.nbytes for output in outputs
    )  # alive, but not for autograd
    kept = sum(trace_memory(config(), PATCH, 1, TraceOptions(device="cpu")).kept.values())
    assert sum(saved.values()) <= kept
    assert kept == pytest.approx(sum(saved.values()) + beside, rel=0.1)


def test_recomputed_levels_keep_less_memory() -> None:
    plain, recomputed = (
        trace_memory(config(), PATCH, 1, TraceOptions(levels)) for levels in ((), (0,))
    )
    assert recomputed.kept[0] < 0.6 * plain.kept[0]
    assert recomputed.kept[1] == plain.kept[1]
    assert recomputed.flops > plain.flops


def test_flops_of_a_known_convolution_stack() -> None:
    """Two operations per weight and voxel; backward twice that, without the first input's gradient."""
    levels = ModelConfig(
        features=(4,), strides=((1, 1, 1),), kernels=((3, 3, 3),), blocks_per_level=(2,)
    )
    voxels = 4 * 8 * 8
    first, second, head = 2 * 27 * 1 * 4 * voxels, 2 * 27 * 4 * 4 * voxels, 2 * 4 * 3 * voxels
    assert trace_memory(levels, (4, 8, 8)).flops == 2 * first + 3 * second + 3 * head


RESIDENT = """
import sys
from pathlib import Path
import torch
from tests.model.test_memory_trace import *
torch.set_num_threads(1)  # each thread has a workspace
def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
big = resolve_topology(ModelConfig(preset="tiny"), (32, 128, 128), SPACING_MM)
tests = sys.modules["tests.model.test_memory_trace"]
real_step(config(), 1, (), "fp32")  # load all libraries first
Path("/proc/self/clear_refs").write_text("5")
before = peak()
tests.PATCH = (32, 128, 128)
real_step(big, 2, (), "fp32")
print((peak() - before) * 1024 / trace_memory(big, (32, 128, 128), 2, TraceOptions(device="cpu")).peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_peak_against_the_resident_memory_of_a_process() -> None:
    """The process's count also includes kernels' workspaces and the allocator's gaps.

    Gaps differ by a tenth from one process to the next, and only ever add: the least of three counts.
    """
    command = [sys.executable, "-c", RESIDENT]
    ratios = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert 0.9 < min(ratios) < 1.6, ratios
