"""Class values from probabilities: thresholds against a loop over voxels, and their encoding."""

import itertools

import numpy as np
import pytest
import torch

from liverseg_dist.inference.label_assignment import (
    add_background,
    assign_labels,
    assign_most_likely,
    list_thresholded_organs,
    sum_structure_probability,
)
from liverseg_dist.inference.label_codes import THRESHOLDS, LabelCodes
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.model.outputs import OutputChannels

SHAPE = (3, 5, 7)

KIDNEYS = LabelScheme(
    ((0, "background"), (1, "kidney"), (2, "tumour"), (3, "cyst"), (4, "spleen")),
    (
        Structure("kidney", (1, 2, 3)),
        Structure("tumour", (2,), "lesion", "kidney"),
        Structure("cyst", (3,), "lesion", "kidney"),
        Structure("spleen", (4,)),
    ),
)
"""Two lesion structures in one organ, and an organ without any."""
FREE_LESION = LabelScheme(
    ((0, "background"), (1, "liver"), (2, "metastasis")),
    (Structure("liver", (1,)), Structure("metastasis", (2,), "lesion")),
)
"""A lesion that lies in no organ."""
SCHEMES = {"lits": LITS_SCHEME, "kidneys": KIDNEYS, "free lesion": FREE_LESION}


def make_probabilities(outputs: OutputChannels, seed: int) -> torch.Tensor:
    """Foreground probabilities (F, D, H, W) that a network could give."""
    made = torch.Generator().manual_seed(seed)
    channels = outputs.count
    logits = 2 * torch.randn(channels, *SHAPE, generator=made)
    if outputs.regions:
        return torch.sigmoid(logits)
    return torch.softmax(logits, dim=0)[1:]


@pytest.mark.parametrize("name", SCHEMES)
def test_the_most_likely_class_is_argmax(name: str) -> None:
    outputs = OutputChannels(SCHEMES[name])
    foreground = make_probabilities(outputs, seed=1)
    background = 1 - foreground.sum(dim=0, keepdim=True)
    expected = torch.cat([background, foreground]).argmax(dim=0)
    assert torch.equal(assign_most_likely(foreground, outputs).long(), expected)


def test_the_background_completes_the_classes() -> None:
    outputs = OutputChannels(KIDNEYS)
    foreground = make_probabilities(outputs, seed=2)
    every = add_background(foreground, outputs)
    assert every.shape == (outputs.count, *SHAPE)
    torch.testing.assert_close(every.sum(dim=0), torch.ones(SHAPE))
    assert torch.equal(every[1:], foreground)


def test_regions_have_no_background() -> None:
    outputs = OutputChannels(KIDNEYS, regions=True)
    foreground = make_probabilities(outputs, seed=2)
    assert add_background(foreground, outputs) is foreground


@pytest.mark.parametrize("regions", [False, True])
def test_an_organ_includes_its_lesions(regions: bool) -> None:
    outputs = OutputChannels(KIDNEYS, regions)
    foreground = make_probabilities(outputs, seed=3)
    kidney = KIDNEYS.structure("kidney")
    expected = foreground[0] if regions else foreground[0] + foreground[1] + foreground[2]
    torch.testing.assert_close(sum_structure_probability(foreground, kidney, outputs), expected)


def assign_by_loop(foreground: torch.Tensor, threshold: float) -> np.ndarray:
    """LiTS with a threshold: tumour in a liver from the threshold on, background outside."""
    values = foreground.numpy()
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for place in itertools.product(*map(range, SHAPE)):
        liver, tumour = values[(0, *place)], values[(1, *place)]
        if liver + tumour >= 0.5:
            labels[place] = 2 if tumour >= threshold else 1
    return labels


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9])
def test_a_threshold_equals_a_loop_over_voxels(threshold: float) -> None:
    outputs = OutputChannels()
    foreground = make_probabilities(outputs, seed=4)
    found = assign_labels(foreground, outputs, {"tumour": threshold})
    assert np.array_equal(found.numpy(), assign_by_loop(foreground, threshold))


def test_a_lower_threshold_never_removes_a_lesion() -> None:
    outputs = OutputChannels(KIDNEYS)
    foreground = make_probabilities(outputs, seed=5)
    before = np.zeros(SHAPE, dtype=bool)
    for threshold in sorted(THRESHOLDS, reverse=True):
        labels = assign_labels(foreground, outputs, {"tumour": threshold})
        lesion = labels.numpy() == 2
        assert (lesion | ~before).all()
        before = lesion
    assert before.any()


@pytest.mark.parametrize("name", SCHEMES)
def test_without_thresholds_nothing_is_changed(name: str) -> None:
    outputs = OutputChannels(SCHEMES[name])
    foreground = make_probabilities(outputs, seed=6)
    assert torch.equal(
        assign_labels(foreground, outputs, {}), assign_most_likely(foreground, outputs)
    )


def test_a_lesion_without_a_threshold_stays_where_it_is_most_likely() -> None:
    outputs = OutputChannels(KIDNEYS)
    foreground = make_probabilities(outputs, seed=7)
    inside = foreground[0] + foreground[1] + foreground[2] >= 0.5
    plain = assign_most_likely(foreground, outputs)
    found = assign_labels(foreground, outputs, {"tumour": 0.99})
    is_cyst = inside & (plain == 3) & (foreground[1] < 0.99)
    assert is_cyst.any()
    assert (found[is_cyst] == 3).all()


def test_a_threshold_does_not_touch_other_organs() -> None:
    outputs = OutputChannels(KIDNEYS)
    foreground = make_probabilities(outputs, seed=8)
    plain = assign_most_likely(foreground, outputs)
    found = assign_labels(foreground, outputs, {"tumour": 0.2, "cyst": 0.2})
    is_spleen = (plain == 4) & (foreground[0] + foreground[1] + foreground[2] < 0.5)
    assert is_spleen.any()
    assert (found[is_spleen] == 4).all()


def test_thresholded_organs_are_those_of_the_named_lesions() -> None:
    (group,) = list_thresholded_organs(OutputChannels(KIDNEYS), ["cyst"])
    assert group.organ == KIDNEYS.structure("kidney")
    assert [lesion.name for lesion in group.lesions] == ["cyst"]
    (free,) = list_thresholded_organs(OutputChannels(FREE_LESION), ["metastasis"])
    assert free.organ is None


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_give_the_labels_of_every_threshold(name: str, regions: bool) -> None:
    """The search for post-processing decodes what the predictor would assign."""
    outputs = OutputChannels(SCHEMES[name], regions)
    foreground = make_probabilities(outputs, seed=9)
    codes = LabelCodes(outputs)
    encoded = codes.encode(foreground)
    assert encoded.dtype == codes.dtype
    lesions = [lesion.name for lesion in outputs.labels.lesions]
    choices = [None, 0.2, 0.5, 0.8]
    for chosen in itertools.product(choices, repeat=len(lesions)):
        thresholds = {}
        for lesion, threshold in zip(lesions, chosen, strict=True):
            if threshold is not None:
                thresholds[lesion] = threshold
        expected = assign_labels(foreground, outputs, thresholds).numpy()
        assert np.array_equal(codes.decode(encoded, thresholds), expected), thresholds


def test_one_byte_encodes_the_labels_of_lits() -> None:
    codes = LabelCodes(OutputChannels())
    assert codes.dtype is np.uint8
    assert codes.radices == [3, 3, len(THRESHOLDS) + 1]
