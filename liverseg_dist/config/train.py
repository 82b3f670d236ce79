"""Settings of a training run (`run.*`, `data.*`, `train.*`, `checkpoint.*`, `validation.*`)."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from liverseg_dist.config.base import Section
from liverseg_dist.config.channels import CT_CHANNELS, ChannelConfig, IntensityConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.texts.paths import UserPath, UserPathOrUrl

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PatchEdge = Annotated[int, Field(ge=1, le=4096)]
AugmentationPreset = Literal["none", "light", "nnunet", "strong"]


class RunConfig(Section):
    dir: UserPath | None = None
    """Folder of the run. A new folder starts a run, an existing one continues it."""


class DataConfig(Section):
    store: UserPathOrUrl | None = None
    """Path or fsspec URL of the Zarr store."""
    fold: int | Literal["all"] = 0
    """Validation fold; all: train on every case outside the test set."""
    patch_size: tuple[PatchEdge, PatchEdge, PatchEdge] = (64, 128, 128)
    """z, y, x in voxels of the store."""
    oversample_foreground: float = Field(default=0.33, ge=0, le=1)
    """Fraction of each batch centred on foreground, rounded to whole samples (as in nnU-Net: a
    fixed number, not a probability). In a batch of 2, values between 0.25 and 0.75 mean one
    sample."""
    augmentation: AugmentationPreset = "nnunet"
    mirror_axes: tuple[Literal["z", "y", "x"], ...] | None = None
    """Axes along which augmentation mirrors; null: all three; none with augmentation=none."""
    workers: int = Field(default=1, ge=0)
    """Loader threads per rank (reading releases the GIL); 0: read between the steps."""
    prefetch: int = Field(default=4, ge=1)
    """Batches that each worker reads ahead."""
    stall_timeout_s: float = Field(default=300.0, gt=0)
    """If reading a batch takes longer, the run stops with an error that names the case."""
    cache_gib: float = Field(default=0.0, ge=0)
    """Memory per node for a cache of decoded cases that its ranks share; 0: no cache."""
    cache_dir: UserPath | None = None
    """Folder of that cache, readable by every rank of the node; null: shared memory (/dev/shm)."""
    on_read_error: Literal["fail", "skip"] = "fail"
    """When a chunk cannot be read: fail: stop the run; skip: replace the sample by one of another
    case and log it."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Voxel size (z, y, x) of the network's input; filled in from the store."""
    intensity: IntensityConfig | tuple[IntensityConfig | None, ...] | None = None
    """Voxel values to network input, one for each channel; null for a channel that is normalised
    by its own scan. Filled in from the store."""
    channels: tuple[ChannelConfig, ...] | None = None
    """Channels of the images; filled in from the store. null: one channel of CT."""
    optional_channels: tuple[str, ...] | None = None
    """Channels that some training case lacks, so that a scan may lack them as well; filled in from
    the store. null: none."""
    labels: dict[str, Any] | None = None
    """Label values and structures (`LabelScheme.to_json`); filled in from the store. null: those of
    LiTS."""

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                LabelScheme.from_json(value)
            except UserError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def label_scheme(self) -> LabelScheme:
        """The scheme of the labels; LiTS for runs that were made before there was a choice."""
        return LITS_SCHEME if self.labels is None else LabelScheme.from_json(self.labels)

    @property
    def image_channels(self) -> tuple[ChannelConfig, ...]:
        """The channels of the images; one CT channel for runs without an entry."""
        return CT_CHANNELS if self.channels is None else self.channels

    @property
    def intensities(self) -> tuple[IntensityConfig | None, ...]:
        """The normalisation of each channel; None where each scan has its own, or not filled in."""
        if isinstance(self.intensity, tuple):
            return self.intensity
        if self.intensity is None:
            return (None,) * len(self.image_channels)
        return (self.intensity,)


class ScheduleConfig(Section):
    name: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    power: float = 0.9
    """Exponent of the poly schedule (nnU-Net: 0.9)."""


class FineTuneConfig(Section):
    """How weights from `model.pretrained` are trained."""

    freeze: Literal["none", "encoder", "all_but_heads"] = "none"
    """Parts of the network that are not trained."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a level divided by that of the next level towards the output; 1: the same
    for all levels."""


class TrainConfig(Section):
    max_steps: Positive = 250_000
    """Optimizer steps of the run. An existing run can be continued with another number: from its
    present step on, the learning rate follows the schedule (train.schedule) for the new number."""
    stop_at_step: int = Field(default=0, ge=0)
    """Save and stop after this step; a higher value continues (the rungs of a sweep). 0: run to
    max_steps."""
    learning_rate: float = Field(default=1e-2, gt=0)
    global_batch_size: Positive = 2
    """Samples per optimizer step over all ranks; gradients are accumulated if it exceeds ranks *
    micro_batch_size."""
    micro_batch_size: Positive = 1
    """Samples in one forward and backward of a rank."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """For optimizer=sgd: Nesterov momentum."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """For optimizer=adamw."""
    weight_decay: float = Field(default=3e-5, ge=0)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    clip_grad_norm: float = Field(default=12.0, ge=0)
    """Maximum norm of the gradient; 0: no clipping."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then validated and exported;
    0: off."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    fsdp_shard_ranks: int = Field(default=0, ge=0)
    """FSDP only: shard over groups of this many ranks and replicate between groups. With the GPUs
    of a node as the group, parameters are gathered within the node. 0: shard over all ranks."""
    fsdp_reshard_after_forward: bool = True
    """FSDP only: release gathered parameters after forward and gather them again in backward.
    false: gather them once per micro-batch and keep the whole network in memory meanwhile."""
    ddp_static_graph: bool = False
    """DDP only: the same parameters are used in each step, so DDP plans the exchange of gradients
    once."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """Number format in which ddp and fsdp exchange gradients; bf16 halves the bytes and rounds the
    sums to 8 bits."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed only."""
    offload_optimizer: bool = False
    """DeepSpeed only: optimizer state in CPU memory."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Literal["none", "all", "auto"] | tuple[int, ...] = "none"
    """U-Net levels that recompute their activations in backward: [0, 1] are the two finest; all:
    takes a third more time; auto: the fewest levels that fit memory.budget_gib."""
    channels_last: bool = False
    """Memory format channels_last_3d of the input."""
    compile: bool = False
    """Use torch.compile, for strategies ddp and deepspeed; on a CPU it needs a C++ compiler."""
    deterministic: bool = True
    """Bit-identical results for the same seed; slower on CUDA."""
    deterministic_reduction: bool = False
    """Sum gradients sample by sample in a fixed order: identical bits for any number of ranks (ddp
    only, slower)."""
    collective_timeout_s: float = Field(default=100.0, gt=0)
    """Time for which ranks wait for one that hangs or is lost, after the first step. Start-up,
    validation and saving may take longer (`train --timeout`)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss is NaN or infinite: stop: fail and name the samples; skip: skip the step."""
    modality_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability for each channel of a sample to be set to 0, as if the scan lacked it, but never
    all of a sample's channels: trains a network for scans without some channel. 0: off."""
    fine_tune: FineTuneConfig = Field(default_factory=FineTuneConfig)
    log_every_steps: Positive = 10
    """Steps between two entries of the metrics."""
    profile_steps: tuple[int, int] | None = None
    """[first, last] step (from 1) to profile: rank 0 writes RUN/profile/*.json for
    https://ui.perfetto.dev."""
    threads: int = Field(default=0, ge=0)
    """CPU threads per rank. 0: OMP_NUM_THREADS (under torchrun only if more than 1, because
    torchrun itself sets 1); else the number of the run's last start with as many ranks; else the
    fastest number up to the rank's share of the node's cores, measured at the start of the run.
    Another number changes the order of float sums, and so the last bits of the weights."""


class CheckpointConfig(Section):
    every_steps: Positive = 1000
    """Steps between two checkpoints."""
    every_minutes: float = Field(default=30.0, gt=0)
    """Also save when this much time has passed since the last checkpoint."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also export the weights with the best validation score."""


class ValidationConfig(Section):
    every_steps: int = Field(default=2500, ge=0)
    """Steps between two validations; 0: never."""
    max_cases: int = Field(default=0, ge=0)
    """Maximum number of cases per validation; 0: all."""
    pictures: int = Field(default=2, ge=0)
    """Number of cases of which the slice with most lesion (of schemes without lesions: with most
    foreground) is written to TensorBoard."""
