"""The words and grey values of `liverseg preview`."""

import pytest
import torch

from liverseg_dist.commands.preview import describe_centre, grey_range
from liverseg_dist.config import IntensityConfig
from liverseg_dist.data.intensity import normalise_intensity
from liverseg_dist.data.loading.sampling import Centre
from liverseg_dist.labels import LITS_SCHEME


@pytest.mark.parametrize(
    ("label", "component", "text"),
    [(1, 0, "on liver"), (2, 3, "on tumour 3"), (0, 0, "on background")],
)
def test_the_centre_of_a_patch_in_words(label: int, component: int, text: str) -> None:
    centre = Centre(label=label, component=component, voxel_zyx=(1, 2, 3))
    assert describe_centre(centre, LITS_SCHEME) == text


def test_a_patch_without_a_centre_is_random() -> None:
    assert describe_centre(None, LITS_SCHEME) == "at random"


def test_black_and_white_are_the_bounds_of_the_clipping() -> None:
    intensity = IntensityConfig(lower_hu=-100, upper_hu=300, mean=0.4, std=0.25)
    bounds = torch.tensor([-1000.0, -100, 300, 3000])
    values = normalise_intensity(bounds, -100, 300, 0.4, 0.25)
    black, white = grey_range(intensity)
    assert values.tolist() == pytest.approx([black, black, white, white])
