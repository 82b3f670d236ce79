"""Losses of cases of which only some structures were annotated, against hand-written references."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liverseg_dist.config import LossConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import IGNORE, LITS_SCHEME, LabelScheme
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.training_dice import dice_from_counts, overlap_counts
from tests.data.scheme_store import make_scheme

SHAPE = (4, 6, 8)
NAMES = get_args(LossConfig.model_fields["name"].annotation)
# Organs 1 to 3, lesions 4 and 5 inside organ 1.
FIVE = make_scheme(5, lesions=2)


def draw_logits(outputs: OutputChannels, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, outputs.count, *SHAPE, generator=generator, dtype=torch.float64)


def draw_label(labels: LabelScheme, batch: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *SHAPE)
    label = torch.randint(0, labels.num_classes, shape, generator=generator, dtype=torch.uint8)
    label[:, 0, 0] = IGNORE
    return label


def soft_dice(probability: Tensor, target: Tensor) -> Tensor:
    overlap = (probability * target).sum()
    return (2 * overlap + 2e-5) / (probability.sum() + target.sum() + 2e-5)


def test_classes_that_cannot_be_told_apart_are_summed() -> None:
    """Shi et al. 2021: with organ 1 alone, {0, 2, 3} and {1, 4, 5} are one class each."""
    outputs = OutputChannels(FIVE)
    logits, label = draw_logits(outputs, 1), draw_label(FIVE, 1)
    loss = build_loss(LossConfig(name="dice_ce"), outputs)
    result = loss(logits, label, [("organ 1",)])
    probability = torch.softmax(logits, dim=1)[0]
    organ = probability[[1, 4, 5]].sum(0)
    other = probability[[0, 2, 3]].sum(0)
    is_organ = torch.isin(label[0], torch.tensor([1, 4, 5]))
    known = label[0] != IGNORE
    true_probability = torch.where(is_organ, organ, other)[known]
    torch.testing.assert_close(result.parts["ce"], -true_probability.log().mean())
    expected = 1 - soft_dice(organ * known, is_organ.double())
    torch.testing.assert_close(result.parts["dice"], expected)


def test_a_lesion_alone_is_told_from_everything_else() -> None:
    outputs = OutputChannels(LITS_SCHEME)
    logits, label = draw_logits(outputs, 1), draw_label(LITS_SCHEME, 1)
    weights = (1.0, 2.0, 5.0)
    loss = build_loss(LossConfig(name="ce", class_weights=weights), outputs)
    result = loss(logits, label, [("tumour",)])
    tumour = torch.softmax(logits, dim=1)[0, 2]
    known = label[0] != IGNORE
    is_tumour = label[0] == 2
    entropy = -torch.where(is_tumour, tumour, 1 - tumour).log()
    # Background and liver cannot be told apart: both have the weight of the background.
    weight = torch.where(is_tumour, 5.0, 1.0) * known
    torch.testing.assert_close(result.total, (entropy * weight).sum() / weight.sum())


def test_regions_that_were_not_annotated_are_left_out() -> None:
    outputs = OutputChannels(FIVE, regions=True)
    logits = draw_logits(outputs, 1).requires_grad_()
    label = draw_label(FIVE, 1)
    result = build_loss(LossConfig(name="dice_ce"), outputs)(
        logits, label, [("organ 2", "lesion 5")]
    )
    known = label != IGNORE
    rows, values = [1, 4], [2, 5]
    target = torch.stack([label == value for value in values], dim=1).double()
    entropy = F.binary_cross_entropy_with_logits(logits[:, rows], target, reduction="none")
    expected = entropy.mean(dim=1)[known].mean()
    torch.testing.assert_close(result.parts["ce"], expected.detach())
    probability = torch.sigmoid(logits[0, rows]) * known
    dice = torch.stack([soft_dice(probability[i], target[0, i]) for i in range(2)])
    torch.testing.assert_close(result.parts["dice"], (1 - dice.mean()).detach())
    result.total.backward()
    assert logits.grad is not None
    assert logits.grad[:, [0, 2, 3]].abs().max() == 0
    assert logits.grad[:, rows].abs().min(dim=1).values[known].min() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("classes", [1, 5, 16])
def test_everything_annotated_is_the_ordinary_loss(name: str, regions: bool, classes: int) -> None:
    labels = make_scheme(classes, lesions=min(2, classes - 1))
    outputs = OutputChannels(labels, regions)
    loss = build_loss(LossConfig(name=name), outputs)
    logits, label = draw_logits(outputs, 2), draw_label(labels, 2)
    ordinary = loss(logits, label).total
    assert torch.equal(loss(logits, label, [labels.structure_names] * 2).total, ordinary)
    assert torch.isfinite(ordinary)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_samples(name: str, regions: bool) -> None:
    """So the micro-batch size changes nothing, and complete cases keep their loss."""
    outputs = OutputChannels(FIVE, regions)
    loss = build_loss(LossConfig(name=name, class_weights={"organ 2": 3.0}), outputs)
    annotated = [FIVE.structure_names, ("organ 1",), (), ("organ 1",), ("organ 2", "lesion 4")]
    logits, label = draw_logits(outputs, 5), draw_label(FIVE, 5)
    lower = logits[..., ::2, ::2, ::2] * 0.5
    parts = []
    for i, names in enumerate(annotated):
        sample = slice(i, i + 1)
        value = loss([logits[sample], lower[sample]], label[sample], [names]).total
        parts.append(value)
    torch.testing.assert_close(
        loss([logits, lower], label, annotated).total, torch.stack(parts).mean()
    )
    torch.testing.assert_close(parts[0], loss([logits[:1], lower[:1]], label[:1]).total)
    assert parts[2] == 0


@pytest.mark.parametrize("regions", [False, True])
def test_what_was_not_annotated_has_no_influence(regions: bool) -> None:
    """Voxels of unannotated structures may have any label, and any prediction of them is right."""
    outputs = OutputChannels(FIVE, regions)
    loss = build_loss(LossConfig(name="dice_focal_boundary"), outputs)
    logits, label = draw_logits(outputs, 1), draw_label(FIVE, 1)
    names = [("organ 1", "lesion 4", "lesion 5")]
    reference = loss(logits, label, names).total
    relabelled = label.clone()
    relabelled[label == 2] = 3
    relabelled[label == 3] = 0
    torch.testing.assert_close(loss(logits, relabelled, names).total, reference)
    moved = logits.clone()
    if regions:
        moved[:, [1, 2]] = 7.0
    else:
        # The same probability in all for classes 0, 2 and 3.
        together = torch.logsumexp(logits[:, [0, 2, 3]], dim=1)
        moved[:, 0], moved[:, [2, 3]] = together, -200.0
    torch.testing.assert_close(loss(moved, label, names).total, reference)


@pytest.mark.parametrize("regions", [False, True])
def test_without_any_annotation_backward_still_runs(regions: bool) -> None:
    outputs = OutputChannels(LITS_SCHEME, regions)
    logits = draw_logits(outputs, 2).requires_grad_()
    label = draw_label(LITS_SCHEME, 2)
    result = build_loss(LossConfig(), outputs)(logits, label, [(), ()])
    result.total.backward()
    assert result.total == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("name", ["dice_ce", "tversky_focal", "dice_ce_boundary"])
def test_gradients_of_partly_labelled_batches_pass_gradcheck(name: str, regions: bool) -> None:
    outputs = OutputChannels(FIVE, regions)
    label = draw_label(FIVE, 2)[:, :2, :2, :2]
    logits = draw_logits(outputs, 2)[..., :2, :2, :2].clone().requires_grad_()
    loss = build_loss(LossConfig(name=name), outputs)
    names = [("organ 1", "organ 3"), ("lesion 4",)]
    assert torch.autograd.gradcheck(lambda x: loss(x, label, names).total, logits)


@pytest.mark.parametrize("regions", [False, True])
def test_training_dice_counts_annotated_structures_only(regions: bool) -> None:
    outputs = OutputChannels(FIVE, regions)
    logits, label = draw_logits(outputs, 3), draw_label(FIVE, 3)
    names = [FIVE.structure_names, ("organ 2",), ("organ 1", "organ 2")]
    counts = overlap_counts(logits, label, outputs, names)
    single = [overlap_counts(logits[i : i + 1], label[i : i + 1], outputs) for i in range(3)]
    assert torch.equal(counts[0], single[0][0] + single[2][0])
    assert torch.equal(counts[1], single[0][1] + single[1][1] + single[2][1])
    for row in (2, 3, 4):
        assert torch.equal(counts[row], single[0][row])
    nothing = overlap_counts(logits[:1], label[:1], outputs, [()])
    assert dice_from_counts(nothing).isnan().all()


def test_weights_by_name() -> None:
    outputs = OutputChannels(LITS_SCHEME)
    loss = build_loss(LossConfig(class_weights={"tumour": 3}), outputs)
    assert loss.class_weights is not None
    assert loss.class_weights.tolist() == [1, 1, 3]
    with pytest.raises(UserError) as failure:
        build_loss(LossConfig(class_weights={"tumor": 3}), outputs)
    message = str(failure.value)
    assert "names tumor; the classes are background, liver and tumour" in message
    with pytest.raises(
        UserError, match=r"2 numbers; give one each for background, .* and lesion 5"
    ):
        build_loss(LossConfig(class_weights=(1.0, 2.0)), OutputChannels(FIVE))
    with pytest.raises(UserError, match="at least one must be above 0"):
        build_loss(LossConfig(class_weights={"tumour": -1}), outputs)
