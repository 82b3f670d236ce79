"""Strides and kernels against the values nnU-Net's planner gives (get_pool_and_conv_props), entered by hand."""

import pytest

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model.topology import plan_pooling, resolve_topology

ISO = (2, 2, 2)


@pytest.mark.parametrize(
    ("patch", "spacing_mm", "strides", "kernels"),
    [
        # nnU-Net's plan of Task03_Liver: 3d_fullres, patch 128^3 at 1 x 0.77 x 0.77 mm, six levels.
        ((128, 128, 128), (1.0, 0.77, 0.77), [(1, 1, 1), *[ISO] * 5], [(3, 3, 3)] * 6),
        # Thick slices: z is not pooled or convolved until in-plane voxels have a similar size.
        (
            (64, 128, 128),
            (3.0, 0.8, 0.8),
            [(1, 1, 1), (1, 2, 2), *[ISO] * 4],
            [(1, 3, 3), *[(3, 3, 3)] * 5],
        ),
        # A flat patch: z stops at an edge of four voxels, y and x are halved further.
        (
            (8, 64, 64),
            (1.0, 1.0, 1.0),
            [(1, 1, 1), ISO, (1, 2, 2), (1, 2, 2), (1, 2, 2)],
            [(3, 3, 3)] * 5,
        ),
    ],
)
def test_pooling_follows_the_planner(
    patch: tuple, spacing_mm: tuple, strides: list, kernels: list
) -> None:
    assert plan_pooling(patch, spacing_mm, 6) == (strides, kernels)


def test_given_settings_are_kept() -> None:
    config = resolve_topology(
        ModelConfig(features=(4, 8), blocks_per_level=3), (16, 32, 32), (3, 3, 3)
    )
    assert config.features == (4, 8)
    assert config.blocks_per_level == (3, 3)
    assert config.strides == ((1, 1, 1), (2, 2, 2))
    assert resolve_topology(config, (16, 32, 32), (3, 3, 3)) == config


def test_indivisible_patch_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"\[30, 64, 64\].*use for example \[32, 64, 64\]"):
        resolve_topology(ModelConfig(preset="tiny"), (30, 64, 64), (3, 3, 3))


def test_too_many_levels_for_the_patch_are_refused() -> None:
    with pytest.raises(UserError, match="5 levels do not fit a patch of 16x16x16"):
        resolve_topology(ModelConfig(features=(4, 8, 8, 8, 8)), (16, 16, 16), (1, 1, 1))
