"""Each loss against MONAI's of the same name, or PyTorch's; padding, micro-batches, gradients."""

from typing import get_args

import monai.losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.metrics import f1_score
from torch import Tensor

from liverseg_dist.config import LossConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.model.losses import SegmentationLoss, build_loss, frequency_weights
from liverseg_dist.model.losses.boundary import surface_distance
from liverseg_dist.model.losses.terms import one_hot
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.training_dice import dice_from_counts, overlap_counts

SHAPE = (3, 6, 8, 10)
NAMES = get_args(LossConfig.model_fields["name"].annotation)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(SHAPE[0], 3, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def label() -> Tensor:
    return torch.randint(0, 3, SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def make(regions: bool = False, **changes: object) -> SegmentationLoss:
    return build_loss(LossConfig(**changes), OutputChannels(regions=regions), (1000, 100, 10))


@pytest.mark.parametrize("batch", [False, True])
def test_dice_equals_monai(logits: Tensor, label: Tensor, batch: bool) -> None:
    reference = monai.losses.DiceLoss(
        include_background=False,
        softmax=True,
        to_onehot_y=True,
        batch=batch,
        smooth_nr=2e-5,
        smooth_dr=2e-5,
    )
    result = make(name="dice", batch_dice=batch)(logits, label).total
    assert torch.allclose(result, reference(logits, label.unsqueeze(1)), atol=1e-6)


def test_tversky_equals_monai(logits: Tensor, label: Tensor) -> None:
    reference = monai.losses.TverskyLoss(
        include_background=False,
        softmax=True,
        to_onehot_y=True,
        alpha=0.3,
        beta=0.7,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    result = make(name="tversky_ce")(logits, label).parts["dice"]
    assert torch.allclose(result, reference(logits, label.unsqueeze(1)), atol=1e-6)


def test_weighted_cross_entropy_equals_torch_per_sample(logits: Tensor, label: Tensor) -> None:
    weight = torch.tensor([1.0, 2.0, 5.0])
    result = make(name="ce", class_weights=(1.0, 2.0, 5.0))(logits, label).total
    samples = [
        F.cross_entropy(logits[i : i + 1], label[i : i + 1].long(), weight=weight)
        for i in range(SHAPE[0])
    ]
    assert torch.allclose(result, torch.stack(samples).mean(), atol=1e-6)


def test_focal_equals_monai(logits: Tensor, label: Tensor) -> None:
    reference = monai.losses.FocalLoss(
        gamma=2.0, to_onehot_y=True, use_softmax=True, reduction="none"
    )
    per_voxel = reference(logits, label.unsqueeze(1)).sum(
        1
    )  # only the true class's channel is not zero
    result = make(name="dice_focal")(logits, label).parts["ce"]
    assert torch.allclose(result, per_voxel.mean(), atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_focal_has_a_gradient_for_certain_predictions(
    gamma: float, regions: bool, label: Tensor
) -> None:
    channels = 2 if regions else 3
    sure = (
        30 * one_hot(label, OutputChannels(regions=regions).channel_values) - 15 * regions
    ).requires_grad_()
    make(name="focal", focal_gamma=gamma, regions=regions)(sure, label).total.backward()
    assert sure.shape[1] == channels
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_regions_equal_monai_with_sigmoids(logits: Tensor, label: Tensor) -> None:
    target = torch.stack([(label > 0), (label == 2)], dim=1).float()
    dice = monai.losses.DiceLoss(sigmoid=True, smooth_nr=2e-5, smooth_dr=2e-5)(
        logits[:, :2], target
    )
    entropy = F.binary_cross_entropy_with_logits(logits[:, :2], target)
    result = make(regions=True, name="dice_ce")(logits[:, :2], label)
    assert torch.allclose(result.parts["dice"], dice, atol=1e-6)
    assert torch.allclose(result.parts["ce"], entropy, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [False, True])
def test_padding_has_no_influence(logits: Tensor, label: Tensor, name: str, regions: bool) -> None:
    label = label.clone()
    label[:, :2] = IGNORE
    inside = logits[:, : 2 if regions else 3].clone().requires_grad_()
    loss = make(regions=regions, name=name, class_weights=(1.0, 2.0, 5.0))
    whole = loss(inside, label).total
    whole.backward()
    assert inside.grad[:, :, :2].abs().max() == 0
    assert torch.allclose(whole, loss(inside[:, :, 2:], label[:, 2:]).total, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_micro_batches_equals_the_batch(logits: Tensor, label: Tensor, name: str) -> None:
    loss = make(name=name, class_weights="auto")
    parts = [loss(logits[i : i + 1], label[i : i + 1]).total for i in range(SHAPE[0])]
    assert torch.allclose(torch.stack(parts).mean(), loss(logits, label).total, atol=1e-6)


def test_deep_supervision_halves_the_weight_at_each_level(logits: Tensor, label: Tensor) -> None:
    loss = make(name="dice_ce")
    lower = torch.randn(SHAPE[0], 3, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    expected = (
        loss(logits, label).total * 1.0 + loss(lower, label[:, ::2, ::2, ::2]).total * 0.5
    ) / 1.5
    assert torch.allclose(loss([logits, lower], label).total, expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [False, True])
def test_gradients_pass_gradcheck(label: Tensor, name: str, regions: bool) -> None:
    small = label[:2, :2, :3, :2].clone()
    small[0, 0, 0, 0] = IGNORE
    logits = torch.randn(2, 2 if regions else 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = make(name=name, regions=regions)
    assert torch.autograd.gradcheck(lambda x: loss(x, small).total, logits)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.8, 0.8)])
def test_distance_equals_scipy(spacing: tuple[float, ...]) -> None:
    solid = (
        ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 12, 20, 18)), (0, 2, 3, 3))
        > 0.02
    )
    finest = min(spacing)
    expected = [
        np.where(
            mask,
            ndimage.distance_transform_edt(mask, sampling=spacing),
            ndimage.distance_transform_edt(~mask, sampling=spacing),
        )
        for mask in solid
    ]
    target = torch.from_numpy(solid).float().unsqueeze(0)
    known = torch.ones(1, 1, *solid.shape[1:], dtype=torch.bool)
    result = surface_distance(target, known, 6, spacing)[0]
    reference = torch.from_numpy(np.stack(expected) / finest / 6).clamp(max=1).float()
    assert reference.min() < 0.2
    assert reference.max() == 1
    torch.testing.assert_close(result, reference)


def test_boundary_gradient_equals_that_of_the_paper(label: Tensor) -> None:
    """Kervadec's loss is the mean of signed distance (negative inside) * probability."""
    logits = torch.randn(SHAPE[0], 2, *SHAPE[1:], requires_grad=True)
    target = torch.stack([label > 0, label == TUMOUR], dim=1).float()
    known = torch.ones(SHAPE[0], 1, *SHAPE[1:], dtype=torch.bool)
    signed = surface_distance(target, known, 8, (1, 1, 1)) * (1 - 2 * target)
    reference = torch.autograd.grad((signed * torch.sigmoid(logits)).mean(), logits)[0]
    loss = make(regions=True, name="dice_ce_boundary", dice_weight=0.0, ce_weight=0.0)
    result = torch.autograd.grad(loss(logits, label).total, logits)[0]
    torch.testing.assert_close(result, reference)
    perfect = loss((target * 2 - 1) * 40, label).parts["boundary"]
    assert float(perfect) == pytest.approx(0, abs=1e-6)


def test_dice_from_counts_equals_scikit_learns_f1(logits: Tensor, label: Tensor) -> None:
    label = label.clone()
    label[0, 0] = IGNORE
    counts = overlap_counts([logits, logits[..., ::2]], label, OutputChannels())
    known, predicted = label != IGNORE, logits.argmax(1)
    for row, values in zip(counts, ((LIVER, TUMOUR), (TUMOUR,)), strict=True):
        truth, result = (np.isin(t[known].numpy(), values) for t in (label, predicted))
        assert float(dice_from_counts(row)) == pytest.approx(f1_score(truth, result))
    assert dice_from_counts(torch.zeros(2, 3)).isnan().all()


@pytest.mark.parametrize("regions", [False, True])
def test_loss_of_absent_classes_and_padding_is_finite(regions: bool) -> None:
    logits = torch.full(
        (1, 2 if regions else 3, 4, 4, 4), 30.0, dtype=torch.bfloat16, requires_grad=True
    )
    for value in (0, IGNORE):
        result = make(regions=regions, name="dice_ce")(
            logits, torch.full((1, 4, 4, 4), value, dtype=torch.uint8)
        )
        result.total.backward()
        assert torch.isfinite(result.total)
        assert torch.isfinite(logits.grad).all()


def test_automatic_and_invalid_class_weights() -> None:
    weights = frequency_weights((10_000, 100, 1))
    assert sum(weights) == pytest.approx(3)
    assert weights[2] / weights[1] == pytest.approx(10)
    with pytest.raises(UserError, match="has 2 numbers"):
        make(class_weights=(1.0, 2.0))
    with pytest.raises(UserError, match="needs the store's class counts"):
        build_loss(LossConfig(class_weights="auto"), OutputChannels())
