"""Renamed settings: old keys work in files and overrides with one warning; recorded bytes stay."""

import json
import logging
from pathlib import Path

import pytest
import yaml

from liverseg_dist.config import ConvertConfig, Settings, load_settings
from liverseg_dist.config import aliases as aliases_module
from liverseg_dist.config.aliases import RENAMED_KEYS
from liverseg_dist.config.describe import describe_keys
from liverseg_dist.data.conversion.settings_match import (
    list_setting_differences,
    settings_that_must_match,
)
from liverseg_dist.errors import UserError

VALUES = {
    "convert.cleaning.thick_order": 0,
    "data.unreadable": "skip",
    "train.nonfinite": "skip",
    "inference.tumour_threshold": 0.4,
    "inference.tumour_reach_mm": 5.0,
    "inference.tumour_cut_mm": 0.0,
    "inference.min_tumour_ml": 0.2,
}


@pytest.fixture(autouse=True)
def _forget_reported_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases_module, "_reported", set())


def read_setting(settings: Settings, key: str) -> object:
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_renamed_key_has_a_value_in_this_test() -> None:
    keys = {key for key, _ in describe_keys(Settings, {})}
    assert RENAMED_KEYS.keys() == VALUES.keys()
    assert set(RENAMED_KEYS.values()) <= keys


@pytest.mark.parametrize("old", RENAMED_KEYS)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "override"])
def test_an_old_key_works_with_one_warning(
    old: str, in_file: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree: object = VALUES[old]
    for part in reversed(old.split(".")):
        tree = {part: tree}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree))
    files, overrides = ([file], []) if in_file else ([], [f"{old}={VALUES[old]}"])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            settings = load_settings(files, overrides)
    assert read_setting(settings, RENAMED_KEYS[old]) == VALUES[old]
    assert len(caplog.messages) == 1
    assert f"{old} is deprecated, use {RENAMED_KEYS[old]}" in caplog.messages[0]
    written = json.dumps(yaml.safe_load(settings.to_yaml()))
    assert f'"{old.rpartition(".")[2]}":' not in written


def test_an_override_with_the_new_key_replaces_an_old_key_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("train: {nonfinite: skip}\n")
    settings = load_settings([tmp_path / "old.yaml"], ["train.on_nonfinite=stop"])
    assert settings.train.on_nonfinite == "stop"


def test_both_names_in_one_file_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("data: {unreadable: skip, on_read_error: fail}\n")
    with pytest.raises(UserError, match=r"data\.unreadable is the old name of data\.on_read_error"):
        load_settings([tmp_path / "both.yaml"])


def test_a_wrong_value_under_an_old_key_is_reported_with_the_new_key() -> None:
    with pytest.raises(UserError, match=r"data\.on_read_error = 'perhaps': not one of the choices"):
        load_settings([], ["data.unreadable=perhaps"])


def test_files_that_the_program_wrote_are_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text("data: {unreadable: skip}\n")
    settings = load_settings([tmp_path / "config.yaml"], warn_of_old_keys=False)
    assert settings.data.on_read_error == "skip"
    assert not caplog.messages


def test_the_settings_that_a_store_records_keep_their_first_names() -> None:
    recorded = settings_that_must_match("liver", ConvertConfig())
    cleaning = recorded["convert"]["cleaning"]
    assert cleaning["thick_order"] == 1
    assert "order_z" not in cleaning
    changed = load_settings([], ["convert.cleaning.order_z=0"]).convert
    assert ConvertConfig.model_validate({"cleaning": {"thick_order": 0}}) == changed
    assert list_setting_differences(recorded, settings_that_must_match("liver", changed)) == [
        "convert.cleaning.order_z was 1, is 0"
    ]
