"""Settings of a training run (`run.*`, `data.*`, `train.*`, `checkpoint.*`, `validation.*`)."""

from typing import Annotated, Literal

from pydantic import Field

from liverseg_dist.config.base import Section
from liverseg_dist.texts.paths import UserPath, UserPathOrUrl

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PatchEdge = Annotated[int, Field(ge=1, le=4096)]


class RunConfig(Section):
    dir: UserPath | None = None
    """The run's folder; made when missing, continued when there."""


class IntensityConfig(Section):
    """The stored HU -> network input affine: clip to [lower_hu, upper_hu], map to [0, 1], then (v - mean) / std."""

    lower_hu: float
    upper_hu: float
    mean: float
    """Of the [0, 1] values of the training cases' foreground."""
    std: float = Field(gt=0)


class DataConfig(Section):
    store: UserPathOrUrl | None = None
    """Path or fsspec URL of the Zarr store."""
    fold: int | Literal["all"] = 0
    """Validation fold; all: train on every case outside the test set."""
    patch_size: tuple[PatchEdge, PatchEdge, PatchEdge] = (64, 128, 128)
    """z, y, x in voxels of the store."""
    oversample_foreground: float = Field(default=0.33, ge=0, le=1)
    """Share of each batch centred on liver or tumour (nnU-Net's meaning: guaranteed, not drawn). In whole samples, so
    that of a batch of 2 it is one above 0.25 and below 0.75."""
    augmentation: Literal["none", "light", "nnunet", "strong"] = "nnunet"
    mirror_axes: tuple[Literal["z", "y", "x"], ...] | None = None
    """Axes along which augmentation mirrors; null: all three; none with augmentation=none."""
    workers: int = Field(default=1, ge=0)
    """Loader threads per rank (reading releases the GIL); 0 reads between the steps."""
    prefetch: int = Field(default=4, ge=1)
    """Batches read ahead per worker."""
    stall_timeout_s: float = Field(default=300.0, gt=0)
    """A batch that takes longer stops the run and names the case."""
    cache_gib: float = Field(default=0.0, ge=0)
    """Memory per node for decoded cases shared by its ranks; 0: read straight from the store."""
    cache_dir: UserPath | None = None
    """Where these are kept, readable by every rank of the node; null: shared memory (/dev/shm)."""
    unreadable: Literal["fail", "skip"] = "fail"
    """What to do about a chunk that cannot be read: stop, or skip the sample and log it."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Filled in from the store: the voxel size (z, y, x) the network sees."""
    intensity: IntensityConfig | None = None
    """Filled in from the store."""


class ScheduleConfig(Section):
    name: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    power: float = 0.9
    """Exponent of the poly schedule (nnU-Net: 0.9)."""


class FineTuneConfig(Section):
    """How gently weights that were there before (`model.pretrained`) are changed."""

    freeze: Literal["none", "encoder", "all_but_heads"] = "none"
    """What is not trained at all."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a level over that of the one nearer to the output; 1: the same everywhere."""


class TrainConfig(Section):
    max_steps: Positive = 250_000
    """Optimizer steps of the whole run. May change while a run exists: from the present step on the learning rate
    follows the schedule for the new number (train.schedule)."""
    stop_at_step: int = Field(default=0, ge=0)
    """Save and stop here, to go on later with a higher value (the rungs of a sweep); 0: run to max_steps."""
    learning_rate: float = Field(default=1e-2, gt=0)
    global_batch_size: Positive = 2
    """Samples per optimizer step over all ranks; what ranks and micro_batch_size cannot hold at once is accumulated."""
    micro_batch_size: Positive = 1
    """Samples a rank computes at once."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """SGD only (Nesterov)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=3e-5, ge=0)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    clip_grad_norm: float = Field(default=12.0, ge=0)
    """0: no clipping."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Exponential moving average of the weights, exported as the model when on; 0: off."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    fsdp_shard_ranks: int = Field(default=0, ge=0)
    """FSDP only: cut over this many ranks, with a copy in each such group; the GPUs of a node keep gathering off the
    network between nodes. 0: cut over all ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed only."""
    offload_optimizer: bool = False
    """DeepSpeed only: optimizer state in CPU memory."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Literal["none", "all", "auto"] | tuple[int, ...] = "none"
    """Which U-Net levels recompute their activations in backward: [0, 1] are the two finest; all costs a third more
    time; auto: as few as meet memory.budget_gib."""
    channels_last: bool = False
    compile: bool = False
    """torch.compile, with strategies ddp and deepspeed; on a CPU it needs a C++ compiler."""
    deterministic: bool = True
    """Bit-identical results for the same seed; on CUDA this costs speed."""
    deterministic_reduction: bool = False
    """Sum gradients sample by sample in a fixed order: the same bits on any number of ranks (ddp, slower)."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or Inf loss: stop and name the samples, or skip the step."""
    fine_tune: FineTuneConfig = Field(default_factory=FineTuneConfig)
    log_every_steps: Positive = 10
    profile_steps: tuple[int, int] | None = None
    """[first, last] steps (from 1) of which rank 0 writes RUN/profile/*.json, for https://ui.perfetto.dev."""
    threads: int = Field(default=0, ge=0)
    """CPU threads per rank; 0: OMP_NUM_THREADS (under torchrun if more than 1, which is torchrun's own), or those of
    the run's last start with as many ranks, or the fastest number up to the rank's share of the node's cores, which a
    new run measures. Another number changes the order of float sums, and so the last bits of the weights."""


class CheckpointConfig(Section):
    every_steps: Positive = 1000
    every_minutes: float = Field(default=30.0, gt=0)
    """Also after this much time, whichever comes first."""
    keep_last: Positive = 2
    keep_best: bool = True


class ValidationConfig(Section):
    every_steps: int = Field(default=2500, ge=0)
    """0: never."""
    max_cases: int = Field(default=0, ge=0)
    """At most this many validation cases each time; 0: all."""
    pictures: int = Field(default=2, ge=0)
    """Cases whose middle tumour slice goes to TensorBoard."""
