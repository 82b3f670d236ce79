"""Memory of a training step, found by walking through it with tensors that have shapes but no memory.

`trace_memory` runs the real network, loss and backward on fake tensors and counts the bytes that are alive: what forward keeps
per level, and the peak. It costs half a second, needs no GPU, and holds for any patch, a slab included. Counted are
tensors; what libraries allocate for themselves (workspaces, CUDA's context) and the allocator's gaps are not.
Parameters, gradients and optimizer state are left out as well: they depend on the strategy (`training.planning`).
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from liverseg_dist.config import LossConfig, ModelConfig
from liverseg_dist.labels import NUM_CLASSES
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.unet import UNet

OUTSIDE = -1
"""The "level" of what belongs to none: input, heads, loss."""
LossFunction = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch, and its work. Parameters, gradients and optimizer state are not among them."""

    parameters: int
    """How many numbers the network has."""
    largest_group: int
    """Of these, in the largest module of `UNet.shard_groups()`."""
    kept: dict[int, int]
    """Bytes alive between forward and loss, by the level (0: full resolution) that made them; -1: outside of levels."""
    peak: int
    """Most bytes alive at once in forward, loss and backward."""
    flops: int
    """Floating-point operations of forward and backward, recomputation included (2 for multiply and add)."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still alive, by a label that may change on the way."""

    def __init__(self, sweep: bool = False) -> None:
        """`sweep`: tensors without memory hang in reference cycles that real ones do not have; collect these first."""
        super().__init__()
        self.sweep = sweep
        self.label = OUTSIDE
        self.live: Counter[int] = Counter()
        self.peak = 0
        self._total = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, Tensor)
                and (key := _key(leaf)) not in given
                and key not in self._known
            ):
                self._add(key, leaf.untyped_storage())
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size, label = storage.nbytes(), self.label
        self._known.add(key)
        self.live[label] += size
        self._total += size
        if self._total > self.peak and self.sweep:
            gc.collect()
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._remove, key, size, label).atexit = False

    def _remove(self, key: int, size: int, label: int) -> None:
        self._known.discard(key)
        self.live[label] -= size
        self._total -= size


@dataclass(frozen=True)
class TraceOptions:
    """How a step is run: see `trace_memory`."""

    levels: tuple[int, ...] = ()
    precision: str = "fp32"
    device: str = "cuda"
    channels_last: bool = False
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def half(self) -> bool:
        return self.precision in ("bf16", "fp16")


def trace_memory(
    config: ModelConfig, patch_size: Sequence[int], batch: int = 1, walk: TraceOptions | None = None
) -> Footprint:
    """The memory of forward, loss and backward of `batch` samples of `patch_size` voxels (z, y, x).

    `config` has its topology filled in; `walk.levels` are recomputed in backward. `walk.device`: cpu or cuda, whose
    code paths differ; none has to be there. bf16 and fp16 count as autocast's 16-bit tensors.
    """
    walk = walk or TraceOptions()
    _start(walk.cpu)
    return _walk(config, patch_size, batch, walk, sweep=True)


def _walk(
    config: ModelConfig, patch_size: Sequence[int], batch: int, walk: TraceOptions, sweep: bool
) -> Footprint:
    with ExitStack() as stack:
        gc.freeze()  # what is there already need not be looked at
        stack.callback(gc.unfreeze)
        if walk.cpu:
            stack.enter_context(FakeTensorMode())
        stack.enter_context(
            torch.device("cpu" if walk.cpu else "meta")
        )  # meta tensors take the path of GPUs
        model = UNet(config)
        if (
            walk.half and not walk.cpu
        ):  # no autocast for meta tensors; 16-bit weights make the same activations
            model.to(torch.bfloat16)
        model.set_checkpointing(walk.levels)
        form = torch.channels_last_3d if walk.channels_last else torch.contiguous_format
        term = build_loss(walk.loss, config, class_voxels=[1] * NUM_CLASSES)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(
                parameter
            )  # where DDP's buckets are: there before the step
        counter, work = LiveBytes(sweep), FlopCounterMode(display=False)
        with work, counter, label_levels(model, counter):
            image_BCDHW = torch.empty(batch, 1, *patch_size).contiguous(memory_format=form)
            given = image_BCDHW.to(torch.bfloat16) if walk.half and not walk.cpu else image_BCDHW
            label_BDHW = torch.empty(batch, *patch_size, dtype=torch.uint8)
            with torch.autocast("cpu", torch.bfloat16, enabled=walk.half and walk.cpu):
                outputs = model(given)
            kept = dict(counter.live)
            total = term(outputs, label_BDHW).total
            del outputs
            total.backward()
            del image_BCDHW, given, label_BDHW, total
        groups = [sum(p.numel() for p in group.parameters()) for group in model.shard_groups()]
        parameters = sum(p.numel() for p in model.parameters())
    copies = (
        2 * parameters if walk.half and not walk.cpu else 0
    )  # autocast's 16-bit weights, kept until backward
    kept[OUTSIDE] = kept.get(OUTSIDE, 0) + copies
    return Footprint(parameters, max(groups), kept, counter.peak + copies, work.get_total_flops())


@cache
def _start(cpu: bool) -> None:
    """Have PyTorch load what it needs for tensors without memory, so that it is there before `gc.freeze`."""
    ones = ((1, 1, 1), (1, 1, 1))
    config = ModelConfig(features=(1, 1), strides=ones, kernels=ones, blocks_per_level=(1, 1))
    _walk(
        config,
        (4, 4, 4),
        1,
        TraceOptions(levels=(0,), device="cpu" if cpu else "cuda"),
        sweep=False,
    )


@contextmanager
def label_levels(model: UNet, counter: LiveBytes) -> Iterator[None]:
    """Bytes made while a level of `model` runs forward carry its number."""
    handles = []
    for stages in (model.encoder, model.decoder):
        for level, stage in enumerate(stages):
            handles.append(stage.register_forward_pre_hook(_setter(counter, level)))
            handles.append(stage.register_forward_hook(_setter(counter, OUTSIDE)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _setter(counter: LiveBytes, label: int) -> Callable[..., None]:
    def put(module: nn.Module, *inputs_and_output: object) -> None:
        counter.label = label

    return put


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
