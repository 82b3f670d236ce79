"""Shapes, recomputed activations, names, and that a U-Net can learn."""

import pytest
import torch
from torch import Tensor

from liverseg_dist.config import ModelConfig
from liverseg_dist.model import (
    OutputChannels,
    build_model,
    class_probabilities,
    labels_from_logits,
)
from liverseg_dist.model.topology import resolve_topology

PATCH = (16, 32, 32)


def config(**changes: object) -> ModelConfig:
    return resolve_topology(
        ModelConfig(**{"features": (4, 8, 12), **changes}), PATCH, (3.0, 3.0, 3.0)
    )


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
@pytest.mark.parametrize(("regions", "channels"), [(False, 3), (True, 2)])
def test_outputs_are_full_resolution_first(architecture: str, regions: bool, channels: int) -> None:
    model = build_model(
        config(architecture=architecture, regions=regions, features=(4, 6, 8, 8), preset="S")
    )
    image = torch.randn(2, 1, *PATCH)
    outputs = model(image)
    assert [tuple(o.shape) for o in outputs] == [
        (2, channels, 16, 32, 32),
        (2, channels, 8, 16, 16),
    ]
    with torch.no_grad():
        assert tuple(model.eval()(image).shape) == (2, channels, *PATCH)


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
@pytest.mark.parametrize("levels", [(0,), (1, 2), (0, 1, 2)])
def test_recomputed_activations_give_the_same_gradients(
    architecture: str, levels: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = build_model(config(architecture=architecture))
    image = torch.randn(1, 1, *PATCH)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        outputs = model(image)
        sum(
            o.square().mean() for o in (outputs if isinstance(outputs, list) else [outputs])
        ).backward()
        return [p.grad.clone() for p in model.parameters()]

    def kept_bytes() -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(image)
        return total

    plain, plain_bytes, names = gradients(), kept_bytes(), list(model.state_dict())
    model.set_checkpointing(levels)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert kept_bytes() < plain_bytes
    assert list(model.state_dict()) == names


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"levels \[7\] do not exist"):
        build_model(config()).set_checkpointing([7])


def test_same_seed_gives_same_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_model(config()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_every_parameter_is_trained() -> None:
    model = build_model(config(features=(4, 6, 8, 8)))
    sum(o.square().sum() for o in model(torch.randn(1, 1, *PATCH))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_probabilities_and_labels() -> None:
    logits = torch.randn(2, 3, 4, 4, 4)
    assert torch.allclose(class_probabilities(logits, False).sum(1), torch.ones(2, 4, 4, 4))
    assert torch.equal(
        labels_from_logits(class_probabilities(logits, False), OutputChannels()).long(),
        logits.argmax(1),
    )
    regions = torch.tensor([[0.9, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.1]]).view(4, 2, 1, 1, 1)
    painted = labels_from_logits(regions, OutputChannels(regions=True))
    assert painted.flatten().tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
@pytest.mark.parametrize("levels", [(), (0,)])
def test_compiled_network_gives_the_same_results(
    architecture: str, levels: tuple[int, ...]
) -> None:
    """Traced as for all backends; `aot_eager` then runs PyTorch's own kernels."""
    torch.manual_seed(0)
    model = build_model(config(architecture=architecture))
    model.set_checkpointing(levels)
    image = torch.randn(2, 1, *PATCH)

    def outcome() -> list[Tensor]:
        model.zero_grad()
        found = model(image)
        outputs = found if isinstance(found, list) else [found]
        sum(o.square().mean() for o in outputs).backward()
        return [*(o.detach() for o in outputs), *(p.grad.clone() for p in model.parameters())]

    plain = outcome()
    names = list(model.state_dict())
    model.compile(backend="aot_eager")
    for result, reference in zip(outcome(), plain, strict=True):
        torch.testing.assert_close(
            result, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max())
        )
    assert list(model.state_dict()) == names
    torch.compiler.reset()
