"""Memory of a training step, measured with tensors that have shapes but no memory.

`trace_memory` runs the real network, loss and backward on fake tensors and counts the bytes that
are alive: what forward stores per level, and the peak. It takes half a second, needs no GPU and
works for any patch. It counts tensors only, not what libraries allocate for themselves (workspaces,
CUDA's context) and not the gaps of the allocator. Parameters, gradients and optimizer state are not
included: they depend on the strategy (`planning.memory_estimate`).
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
from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.model.losses import SegmentationLoss, build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.unet import UNet
from liverseg_dist.precision import find_autocast_dtype

NO_LEVEL = -1
"""The "level" of tensors outside of levels: input, heads, loss."""
LossFunction = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Footprint:
    """Memory and operations of one micro-batch, without parameters, gradients, optimizer state."""

    parameters: int
    """Number of parameters of the network."""
    largest_group: int
    """Parameters of the largest module of `UNet.shard_groups()`."""
    kept: dict[int, int]
    """Bytes alive between forward and loss, by the level that created them.

    0 is the full resolution, -1 is outside of levels.
    """
    peak: int
    """Most bytes alive at any time in forward, loss and backward."""
    flops: int
    """Floating-point operations of forward and backward, with recomputation.

    A multiplication and an addition are two operations.
    """


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were created in this context and are alive, by a label.

    The label may change inside the context.
    """

    def __init__(self, collect_garbage: bool = False) -> None:
        """Create a counter.

        Args:
            collect_garbage: collect reference cycles before each new peak; tensors without memory
                are in cycles that real tensors do not have.
        """
        super().__init__()
        self.collect_garbage = collect_garbage
        self.label = NO_LEVEL
        self.live: Counter[int] = Counter()
        self.peak = 0
        self._total = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            _storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, Tensor)
                and (key := _storage_key(leaf)) not in given
                and key not in self._known
            ):
                self._add_storage(key, leaf.untyped_storage())
        return out

    def _add_storage(self, key: int, storage: torch.UntypedStorage) -> None:
        size, label = storage.nbytes(), self.label
        # An in-place operation returns a known storage, which must not be counted again.
        self._known.add(key)
        self.live[label] += size
        self._total += size
        if self._total > self.peak and self.collect_garbage:
            gc.collect()
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._remove_storage, key, size, label).atexit = False

    def _remove_storage(self, key: int, size: int, label: int) -> None:
        self._known.discard(key)
        self.live[label] -= size
        self._total -= size


@dataclass(frozen=True)
class TraceOptions:
    """How a step is run."""

    levels: tuple[int, ...] = ()
    """Levels whose activations are recomputed in backward."""
    precision: str = "fp32"
    device: str = "cuda"
    """cpu or cuda, whose code paths differ; the device need not exist."""
    channels_last: bool = False
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def is_cpu(self) -> bool:
        """Whether the step runs on a CPU."""
        return self.device == "cpu"

    @property
    def is_16_bit(self) -> bool:
        """Whether activations have 16 bits."""
        return find_autocast_dtype(self.precision) is not None


def trace_memory(
    config: ModelConfig,
    patch_size: Sequence[int],
    batch: int = 1,
    options: TraceOptions | None = None,
) -> Footprint:
    """Measure forward, loss and backward of one micro-batch.

    Args:
        config: settings `model.*` with the topology filled in.
        patch_size: (z, y, x) in voxels.
        batch: samples of the micro-batch.
        options: how the step is run.
    """
    options = options or TraceOptions()
    _warm_up_pytorch(options.is_cpu)
    return _trace_step(config, patch_size, batch, options, collect_garbage=True)


def _trace_step(
    config: ModelConfig,
    patch_size: Sequence[int],
    batch: int,
    options: TraceOptions,
    collect_garbage: bool,
) -> Footprint:
    with ExitStack() as stack:
        # Objects that exist already are not searched at each collection.
        gc.freeze()
        stack.callback(gc.unfreeze)
        if options.is_cpu:
            stack.enter_context(FakeTensorMode())
        # Meta tensors use the code paths of GPUs.
        stack.enter_context(torch.device("cpu" if options.is_cpu else "meta"))
        model = UNet(config)
        # Meta tensors have no autocast; 16-bit weights give the same activations.
        has_16_bit_weights = options.is_16_bit and not options.is_cpu
        if has_16_bit_weights:
            model.to(torch.bfloat16)
        model.set_checkpointing(options.levels)
        memory_format = torch.channels_last_3d if options.channels_last else torch.contiguous_format
        loss = _build_loss(options.loss, config.regions, model.out_channels)
        for parameter in model.parameters():
            # DDP's buckets exist before the step, too.
            parameter.grad = torch.zeros_like(parameter)
        counter, work = LiveBytes(collect_garbage), FlopCounterMode(display=False)
        with work, counter, label_levels(model, counter):
            shape = (batch, model.in_channels, *patch_size)
            image_BCDHW = torch.empty(shape).contiguous(memory_format=memory_format)
            input_type = torch.bfloat16 if has_16_bit_weights else torch.float32
            network_input = image_BCDHW.to(input_type)
            label_BDHW = torch.empty(batch, *patch_size, dtype=torch.uint8)
            is_autocast = options.is_16_bit and options.is_cpu
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                outputs = model(network_input)
            kept = dict(counter.live)
            total = loss(outputs, label_BDHW).total
            # As in the trainer: the outputs are free before backward.
            del outputs
            total.backward()
            del image_BCDHW, network_input, label_BDHW, total
        groups = [sum(p.numel() for p in group.parameters()) for group in model.shard_groups()]
        parameters = sum(p.numel() for p in model.parameters())
    # Autocast's 16-bit copies of the weights, which are stored until backward.
    copies = 2 * parameters if has_16_bit_weights else 0
    kept[NO_LEVEL] = kept.get(NO_LEVEL, 0) + copies
    return Footprint(parameters, max(groups), kept, counter.peak + copies, work.get_total_flops())


def _build_loss(config: LossConfig, regions: bool, channels: int) -> SegmentationLoss:
    """Build a loss for a number of channels of any meaning."""
    classes = channels + 1 if regions else channels
    values = [(value, f"class {value}") for value in range(classes)]
    structures = [Structure(name, (value,)) for value, name in values[1:]]
    outputs = OutputChannels(LabelScheme(tuple(values), tuple(structures)), regions)
    if config.class_weights != "none":
        # The weights need the same memory with any values and names.
        config = config.model_copy(update={"class_weights": "auto"})
    return build_loss(config, outputs, class_voxels=[1] * classes)


@cache
def _warm_up_pytorch(cpu: bool) -> None:
    """Let PyTorch load its modules for tensors without memory before `gc.freeze`."""
    ones = ((1, 1, 1), (1, 1, 1))
    config = ModelConfig(features=(1, 1), strides=ones, kernels=ones, blocks_per_level=(1, 1))
    _trace_step(
        config,
        (4, 4, 4),
        1,
        TraceOptions(levels=(0,), device="cpu" if cpu else "cuda"),
        collect_garbage=False,
    )


@contextmanager
def label_levels(model: UNet, counter: LiveBytes) -> Iterator[None]:
    """Label the bytes that are created during forward of a level with its number."""
    handles = []
    for stages in (model.encoder, model.decoder):
        for level, stage in enumerate(stages):
            handles.append(stage.register_forward_pre_hook(_create_label_hook(counter, level)))
            handles.append(stage.register_forward_hook(_create_label_hook(counter, NO_LEVEL)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _create_label_hook(counter: LiveBytes, label: int) -> Callable[..., None]:
    def set_label(module: nn.Module, *inputs_and_output: object) -> None:
        counter.label = label

    return set_label


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
