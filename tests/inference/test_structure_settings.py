"""Settings by structure: former keys, one value for all, and names."""

import logging
from pathlib import Path

import pytest
import yaml

from liverseg_dist.config import InferenceConfig, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.inference.postprocess_operations import (
    build_config,
    list_operations,
    select_active_operations,
    write_choice,
)
from liverseg_dist.inference.structure_settings import dump_inference, resolve_structure_settings
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure

KIDNEYS = LabelScheme(
    ((0, "background"), (1, "kidney"), (2, "mass"), (3, "cyst"), (4, "spleen")),
    (
        Structure("kidney", (1, 2, 3)),
        Structure("mass", (2,), "lesion", "kidney"),
        Structure("cyst", (3,), "lesion", "kidney"),
        Structure("spleen", (4,)),
    ),
)
FORMER = {
    "tumour_threshold": 0.4,
    "largest_component": True,
    "fill_holes": True,
    "tumour_reach_mm": 5.0,
    "tumour_cut_mm": None,
    "min_tumour_ml": 0.1,
}


def test_former_keys_load_and_keep_their_meaning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"inference": FORMER}))
    with caplog.at_level(logging.WARNING):
        settings = load_settings([file], ["inference.min_tumour_ml=0.2"])
    assert "inference.tumour_threshold is deprecated, use inference.lesion_threshold" in caplog.text
    expected = {**FORMER, "min_tumour_ml": 0.2}
    dumped = dump_inference(settings.inference, LITS_SCHEME)
    # The fingerprints of earlier evaluations depend on these keys and values.
    assert {key: dumped[key] for key in FORMER} == expected
    assert list(dumped) == [
        "overlap", "window_weights", "average", "mirror", "batch_size", "precision", *FORMER
    ]  # fmt: skip
    resolved = resolve_structure_settings(settings.inference, KIDNEYS)
    assert resolved.lesion_threshold == {"mass": 0.4, "cyst": 0.4}
    assert resolved.largest_component == resolved.fill_holes == ("kidney",)
    assert resolved.reach_mm == {"mass": 5.0, "cyst": 5.0}
    assert resolved.cut_mm == {}
    assert resolved.min_volume_ml == {"mass": 0.2, "cyst": 0.2}


def test_names_and_one_value_give_the_same_fingerprint_for_task03() -> None:
    short = load_settings([], ["inference.min_volume_ml=0.1", "inference.largest_component=true"])
    named = load_settings(
        [], ["inference.min_volume_ml={tumour: 0.1}", "inference.largest_component=[liver]"]
    )
    dotted = load_settings(
        [], ["inference.min_volume_ml.tumour=0.1", "inference.largest_component=[liver]"]
    )
    dumps = [dump_inference(one.inference, LITS_SCHEME) for one in (short, named, dotted)]
    assert dumps[0] == dumps[1] == dumps[2]
    active = select_active_operations(named.inference, LITS_SCHEME)
    assert active == {"largest_component": True, "min_tumour_ml": 0.1}


def test_a_choice_is_saved_by_structure_and_replaces_that_of_training(tmp_path: Path) -> None:
    chosen = {"lesion_threshold.cyst": 0.3, "largest_component.kidney": True, "reach_mm.mass": 0.0}
    assert set(chosen) <= set(list_operations(KIDNEYS))
    config = build_config(KIDNEYS, chosen)
    assert select_active_operations(config, KIDNEYS) == chosen
    write_choice(tmp_path / "postprocess.yaml", KIDNEYS, chosen, "two\nlines")
    training = tmp_path / "config.yaml"
    training.write_text(
        "inference: {min_volume_ml: {cyst: 3, spleen: 1}, lesion_threshold: 0.7, fill_holes: true}"
    )
    loaded = load_settings([training, tmp_path / "postprocess.yaml"])
    assert select_active_operations(loaded.inference, KIDNEYS) == chosen
    assert resolve_structure_settings(InferenceConfig(), KIDNEYS).min_volume_ml == {}


@pytest.mark.parametrize(
    "override",
    ["inference.largest_component=[liver]", "inference.min_volume_ml={liver: 1}",
     "inference.reach_mm={spleen: 1}", "inference.lesion_threshold={kidney: 0.3}"],
)  # fmt: skip
def test_names_of_other_structures_are_refused(override: str) -> None:
    settings = load_settings([], [override])
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        resolve_structure_settings(settings.inference, KIDNEYS)
