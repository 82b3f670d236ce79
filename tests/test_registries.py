"""Each choice of the settings has one registry, and a name without an entry is an error."""

from typing import Any, get_args

import pytest
import torch
from torch import nn

from liverseg_dist.config import (
    DataConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    Settings,
    TrainConfig,
)
from liverseg_dist.data.augment.presets import PRESETS as AUGMENTATION_PRESETS
from liverseg_dist.data.augment.presets import build_preset
from liverseg_dist.distributed.strategies.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    fill_optimizer_state,
)
from liverseg_dist.distributed.strategies.parallelize import (
    STRATEGIES,
    check_strategy,
    parallelize_model,
)
from liverseg_dist.errors import UserError
from liverseg_dist.inference.load_run import CUDA_ARITHMETIC
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.window_averaging import AVERAGES
from liverseg_dist.inference.window_rows import PADDINGS
from liverseg_dist.inference.windows import WINDOW_WEIGHTS, compute_window_weights
from liverseg_dist.model import build_model
from liverseg_dist.model.architectures import ARCHITECTURES
from liverseg_dist.model.blocks import NORMS
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.losses.registry import LOSSES
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import PRESETS as WIDTH_PRESETS
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.planning.memory_estimate import state_bytes
from liverseg_dist.planning.scaling_model import Machine, predict_step_time
from liverseg_dist.precision import AUTOCAST_DTYPES, autocast

CPU = torch.device("cpu")
PATCH, SPACING = (16, 32, 32), (1.0, 1.0, 1.0)


def allowed_names(section: type, key: str) -> set[str]:
    """The names that a setting's `Literal` allows."""
    return set(get_args(section.model_fields[key].annotation))


@pytest.mark.parametrize(
    ("section", "key", "registry"),
    [
        (LossConfig, "name", LOSSES),
        (TrainConfig, "optimizer", OPTIMIZERS),
        (TrainConfig, "strategy", STRATEGIES),
        (TrainConfig, "precision", AUTOCAST_DTYPES),
        (InferenceConfig, "precision", AUTOCAST_DTYPES),
        (InferenceConfig, "precision", CUDA_ARITHMETIC),
        (InferenceConfig, "average", AVERAGES),
        (InferenceConfig, "window_weights", WINDOW_WEIGHTS),
        (InferenceConfig, "padding", PADDINGS),
        (ModelConfig, "architecture", ARCHITECTURES),
        (ModelConfig, "preset", WIDTH_PRESETS),
        (ModelConfig, "norm", NORMS),
        (DataConfig, "augmentation", AUGMENTATION_PRESETS),
    ],
)
def test_registry_has_exactly_the_names_of_the_setting(
    section: type, key: str, registry: dict[str, Any]
) -> None:
    assert set(registry) == allowed_names(section, key)


def test_every_architecture_has_blocks_for_every_preset() -> None:
    for architecture in ARCHITECTURES.values():
        assert set(architecture.preset_blocks) == set(WIDTH_PRESETS)


def replace_name(section: Any, key: str) -> Any:
    """The settings as if the `Literal` had one more name, `new_one`, without an implementation."""
    return section.model_construct(**{**dict(section), key: "new_one"})


def small_model() -> tuple[ModelConfig, nn.Module]:
    config = resolve_topology(ModelConfig(features=(4, 8)), PATCH, SPACING)
    return config, build_model(config)


def parameter_groups(model: nn.Module) -> list[dict]:
    return [{"params": list(model.parameters())}]


def test_unknown_loss_is_an_error() -> None:
    with pytest.raises(UserError, match=r"loss\.name=new_one is not available; choose one of dice"):
        build_loss(replace_name(LossConfig(), "name"), OutputChannels())


def test_unknown_optimizer_is_an_error() -> None:
    _, model = small_model()
    train = replace_name(Settings().train, "optimizer")
    with pytest.raises(UserError, match=r"train\.optimizer=new_one .* sgd, adamw"):
        build_optimizer(train, parameter_groups(model))
    with pytest.raises(UserError, match=r"train\.optimizer=new_one"):
        state_bytes(train, 100, 10, 2)


def test_state_of_an_unregistered_optimizer_is_an_error() -> None:
    _, model = small_model()
    with pytest.raises(TypeError, match="Adagrad is not in OPTIMIZERS"):
        fill_optimizer_state(torch.optim.Adagrad(model.parameters()))


def test_unknown_strategy_is_an_error() -> None:
    _, model = small_model()
    train = replace_name(Settings().train, "strategy")
    message = r"train\.strategy=new_one .* ddp, fsdp, deepspeed"
    with pytest.raises(UserError, match=message):
        check_strategy(train, 1, CPU)
    with pytest.raises(UserError, match=message):
        parallelize_model(model, CPU, train, (), parameter_groups)
    with pytest.raises(UserError, match=message):
        state_bytes(train, 100, 10, 2)
    with pytest.raises(UserError, match="strategy=new_one"):
        predict_step_time("new_one", 1.0, 100, 2, 2, Machine())


@pytest.mark.parametrize("key", ["architecture", "preset"])
def test_unknown_topology_is_an_error(key: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{key}=new_one"):
        resolve_topology(replace_name(ModelConfig(), key), PATCH, SPACING)


@pytest.mark.parametrize("key", ["architecture", "norm"])
def test_unknown_network_is_an_error(key: str) -> None:
    config, _ = small_model()
    with pytest.raises(UserError, match=rf"model\.{key}=new_one"):
        build_model(replace_name(config, key))


def test_unknown_augmentation_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data\.augmentation=new_one"):
        build_preset(replace_name(DataConfig(), "augmentation"))


def test_unknown_precision_is_an_error() -> None:
    with pytest.raises(UserError, match="precision=new_one"):
        autocast("cpu", "new_one")


def test_unknown_average_is_an_error() -> None:
    _, model = small_model()
    config = replace_name(InferenceConfig(), "average")
    with pytest.raises(UserError, match=r"inference\.average=new_one .* probabilities, logits"):
        SlidingWindowPredictor(model, PATCH, OutputChannels(), config=config, device=CPU)


def test_unknown_window_weights_are_an_error() -> None:
    with pytest.raises(UserError, match=r"inference\.window_weights=new_one"):
        compute_window_weights(8, "new_one")  # type: ignore[arg-type]
