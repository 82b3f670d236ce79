"""Typed and validated settings: one module per section; `settings.py` combines them."""

from liverseg_dist.config.channels import CT_CHANNEL, CT_CHANNELS, ChannelConfig, IntensityConfig
from liverseg_dist.config.convert import CleaningConfig, ConvertConfig, SlabConfig, SplitConfig
from liverseg_dist.config.inference import InferenceConfig
from liverseg_dist.config.memory import MemoryConfig
from liverseg_dist.config.model import LossConfig, ModelConfig
from liverseg_dist.config.settings import Settings, load_settings
from liverseg_dist.config.train import (
    CheckpointConfig,
    DataConfig,
    FineTuneConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CT_CHANNEL",
    "CT_CHANNELS",
    "ChannelConfig",
    "CheckpointConfig",
    "CleaningConfig",
    "ConvertConfig",
    "DataConfig",
    "FineTuneConfig",
    "InferenceConfig",
    "IntensityConfig",
    "LossConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Settings",
    "SlabConfig",
    "SplitConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_settings",
]
