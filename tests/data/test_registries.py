"""Every name of a setting has an implementation, and an unknown name is an error, never another method."""

from typing import Any, get_args

import numpy as np
import pytest

from liverseg_dist.config import ChannelConfig, CleaningConfig, SlabConfig
from liverseg_dist.config.base import Section
from liverseg_dist.data.preprocessing.body_mask import OUTSIDE_BODY_VALUES
from liverseg_dist.data.preprocessing.denoise import NOISE_METHODS
from liverseg_dist.data.preprocessing.intensity_statistics import (
    CLIP_RULES,
    HuHistogram,
    clip_range_hu,
)
from liverseg_dist.data.preprocessing.pipeline import CLEANING_STEPS, clean_scan
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.data.preprocessing.slab import SLAB_POLICIES, place_slabs
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume

GRID = Grid((70, 12, 12), np.eye(4))
SCAN = Volume(np.zeros(GRID.shape, np.int16), GRID)
HISTOGRAM = HuHistogram.from_voxels(np.arange(50, 150, dtype=np.int16))


def allowed_values(section: type[Section], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


def with_unknown_name(config: Section, field: str) -> Any:
    """The settings with a name that pydantic would refuse: as if it had been added to the Literal only."""
    return config.model_copy(update={field: "wavelet"})


def test_every_name_in_the_settings_has_an_implementation() -> None:
    assert allowed_values(CleaningConfig, "noise") == {"none", *NOISE_METHODS}
    assert allowed_values(CleaningConfig, "outliers") == set(CLIP_RULES)
    assert allowed_values(CleaningConfig, "outside_body") == set(OUTSIDE_BODY_VALUES)
    assert allowed_values(SlabConfig, "policy") == set(SLAB_POLICIES)


@pytest.mark.parametrize("field", ["noise", "outside_body"])
def test_an_unknown_cleaning_method_is_an_error(field: str) -> None:
    with pytest.raises(UserError, match=rf"convert\.cleaning\.{field}: unknown .* 'wavelet'"):
        clean_scan(SCAN, with_unknown_name(CleaningConfig(), field))


def test_an_unknown_clip_rule_is_an_error() -> None:
    with pytest.raises(UserError, match=r"convert\.cleaning\.outliers: unknown rule 'wavelet'"):
        clip_range_hu(HISTOGRAM, with_unknown_name(CleaningConfig(), "outliers"))


@pytest.mark.parametrize("label", [None, SCAN])
def test_an_unknown_slab_policy_is_an_error(label: Volume | None) -> None:
    with pytest.raises(UserError, match=r"convert\.slab\.policy: unknown policy 'wavelet'"):
        place_slabs(GRID, label, None, with_unknown_name(SlabConfig(), "policy"))


def test_an_unknown_kind_of_resampling_is_an_error() -> None:
    kind: Any = "wavelet"
    with pytest.raises(ValueError, match="unknown kind 'wavelet'"):
        resample_to_grid(SCAN, GRID.with_spacing((2, 2, 2)), kind)


def test_a_step_added_to_the_registry_runs_and_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add_ten(
        volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig
    ) -> tuple[Volume, dict[str, object]]:
        return volume.with_voxels(volume.voxels + np.int16(10)), {"added_hu": 10}

    monkeypatch.setitem(CLEANING_STEPS, "add_ten", add_ten)
    clean = clean_scan(SCAN, CleaningConfig())
    assert (clean.volume.voxels == 10).all()
    assert list(clean.provenance) == ["orientation", "broken", "noise", "added_hu"]
