"""Build the components of a run from its settings: store, model, loss, strategy."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liverseg_dist.config import Settings
from liverseg_dist.config.base import Section
from liverseg_dist.config.convert import DATA_URI
from liverseg_dist.data.loading import fill_in_data_settings
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.collectives import broadcast_from_rank0
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.distributed.strategies.parallelize import check_strategy, parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import UserError
from liverseg_dist.model import build_model
from liverseg_dist.model.losses import SegmentationLoss, build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.pretrained import apply_nnunet_settings, load_initial_weights
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.planning.memory_fit import choose_checkpointed_levels
from liverseg_dist.training.data_description import complete_settings, list_data_conflicts
from liverseg_dist.training.fine_tuning import freeze_parameters, parameter_groups
from liverseg_dist.training.threads import choose_threads

_logger = logging.getLogger(__name__)
NOT_RECORDED_IN_STORE = {"workers", "labels_from", "spacing_table", "file", "patients"}
"""Settings of a conversion that a store does not record: file names, number of workers."""


@dataclass(frozen=True)
class TrainingComponents:
    """The components of a training run."""

    settings: Settings
    store: CaseStore
    train_ids: tuple[str, ...]
    validation_ids: tuple[str, ...]
    strategy: Strategy
    loss: SegmentationLoss


def resolve_settings(settings: Settings, store: CaseStore) -> Settings:
    """Fill in the settings that the store determines: spacing, intensity, labels, channels,
    cleaning, topology, and the number of the network's channels.

    With the resolved settings, the model can be rebuilt and new scans prepared without the store.
    """
    data = fill_in_data_settings(settings.data, store)
    given = apply_nnunet_settings(settings.model)
    model = resolve_topology(given, data.patch_size, store.spacing_mm)
    settings = settings.model_copy(update={"data": data, "model": model, "convert": store.convert})
    return complete_settings(settings)


def settings_conflicting_with_store(settings: Settings, store: CaseStore) -> list[str]:
    """List the settings that differ from those the store was made with, one line each."""
    found = _list_differences(settings.convert, store.convert, "convert")
    for key, recorded in (("spacing_mm", store.spacing_mm), ("intensity", store.intensity)):
        given = getattr(settings.data, key)
        if given not in (None, recorded):
            found.append(f"data.{key} is {recorded}, not {given}")
    return found + list_data_conflicts(settings, store.labels, store.channels)


def _list_differences(given: Section, recorded: Section, prefix: str) -> list[str]:
    found = []
    # Only keys that the user has set: defaults of this version may differ from those of the store.
    for key in sorted(given.model_fields_set - NOT_RECORDED_IN_STORE):
        value, recorded_value = getattr(given, key), getattr(recorded, key)
        if isinstance(value, Section):
            found += _list_differences(value, recorded_value, f"{prefix}.{key}")
        elif value != recorded_value:
            found.append(f"{prefix}.{key} is {_shorten(recorded_value)}, not {_shorten(value)}")
    return found


def _shorten(value: object) -> str:
    return "a file" if str(value).startswith(DATA_URI) else str(value)


def open_store(settings: Settings) -> CaseStore:
    """Open the store that `data.store` names. Raises `UserError`."""
    if settings.data.store is None:
        raise UserError(
            "data.store is not set; convert a data set with tools/to_zarr and set data.store=STORE"
        )
    return CaseStore.open(settings.data.store)


def build_components(
    settings: Settings, store: CaseStore, world: World, recorded_threads: int = 0
) -> TrainingComponents:
    """Build the components of a run. Deterministic for a `seed` and a number of threads.

    Args:
        settings: resolved settings.
        recorded_threads: CPU threads of this rank in earlier starts of the run; 0 without one.
    """
    train = settings.train
    check_strategy(train, world.world_size, world.device)
    threads = world.requested_threads(train.threads) or recorded_threads
    torch.set_num_threads(threads or world.cores)
    _set_arithmetic(settings)
    train_ids = store.ids("train", settings.data.fold)
    if not train_ids:
        raise UserError(
            f"{settings.data.store}: fold {settings.data.fold} has no labelled training case"
        )
    # Directly before the weights are drawn, so that they depend on the seed only.
    torch.manual_seed(settings.seed)
    model = build_model(settings.model)
    if settings.model.pretrained is not None:
        _logger.info("%s", load_initial_weights(model, settings.model))
    # All ranks decide alike: requested and recorded numbers are the same for all ranks of a run.
    if world.device.type == "cpu" and broadcast_from_rank0(not threads and world.cores > 1):
        torch.set_num_threads(choose_threads(model, settings, world.cores))
    freeze_parameters(model, train.fine_tune.freeze)
    _check_batch_dice(settings, store, train_ids, world.world_size)
    outputs = OutputChannels(settings.data.label_scheme, settings.model.regions)
    loss = build_loss(settings.loss, outputs, store.class_voxels, store.spacing_mm)
    loss.to(world.device)
    levels = choose_checkpointed_levels(settings, world.world_size, world.device)
    if train.activation_checkpointing == "auto":
        shown = list(levels) or "none"
        _logger.info("levels recomputed in backward to meet the memory budget: %s", shown)
    strategy = parallelize_model(
        model, world.device, train, levels, lambda _: parameter_groups(model, train.fine_tune)
    )
    return TrainingComponents(
        settings, store, train_ids, store.ids("validation", settings.data.fold), strategy, loss
    )


def _check_batch_dice(
    settings: Settings, store: CaseStore, train_ids: Sequence[str], ranks: int
) -> None:
    """Refuse batch Dice over parts of a batch in which other structures may be annotated."""
    train = settings.train
    is_whole = ranks == 1 and train.micro_batch_size >= train.global_batch_size
    if not settings.loss.batch_dice or is_whole:
        return
    structures = set(settings.data.label_scheme.structure_names)
    for case_id in train_ids:
        missing = structures - set(store.meta(case_id).annotated)
        if missing:
            raise UserError(
                f"loss.batch_dice over several ranks or micro-batches: case {case_id} has no "
                f"annotation of {min(missing)}; set loss.batch_dice=false, or use one rank and "
                f"train.micro_batch_size={train.global_batch_size}"
            )


def _set_arithmetic(settings: Settings) -> None:
    """Set torch's global switches for precision and determinism."""
    precision = settings.train.precision
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = not settings.train.deterministic
    # Some CUDA kernels have no deterministic version: torch warns once and continues.
    torch.use_deterministic_algorithms(settings.train.deterministic, warn_only=True)
    # Otherwise torch fills new memory with NaN, which takes a tenth of a step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
