"""Settings: order of precedence, one clear line for each kind of mistake, and a round trip through the run's file."""

from pathlib import Path

import pytest

from launch.sweep.config import SweepSettings
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def test_defaults_then_files_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {learning_rate: 0.1, max_steps: 5}\nseed: 4\n")
    (tmp_path / "b.yaml").write_text("train: {learning_rate: 0.2}\n")
    settings = load_settings([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["train.max_steps=7", "data.fold=all"])
    assert (settings.train.learning_rate, settings.train.max_steps, settings.seed) == (0.2, 7, 4)
    assert settings.data.fold == "all"
    assert settings.train.momentum == 0.99


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_that_is_shipped_is_valid(path: Path) -> None:
    assert path.read_text().startswith("#"), "its first lines say what it is for"
    kind = SweepSettings if path.name.startswith("sweep") else Settings
    load_settings_as(kind, [path])


def test_the_resolved_file_says_it_all(tmp_path: Path) -> None:
    settings = load_settings([], ["model.features=[4,8]", "train.betas=[0.8,0.9]", "data.store=x"])
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert load_settings([tmp_path / "config.yaml"]) == settings


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learing_rate=1", "unknown key train.learing_rate; did you mean train.learning_rate?"),
        ("trian.max_steps=1", "unknown key trian; did you mean train?"),
        ("train.learning_rate=fast", "train.learning_rate = 'fast': input should be a valid number"),
        ("train.max_steps=0", "train.max_steps = 0: input should be greater than or equal to 1"),
        ("data.fold=x", "data.fold = 'x'"),
        ("train=3", "train = 3"),
        ("convert.slab.slices=32", "convert.slab.slices = 32: input should be 64"),
        ("loss.name=foo", "loss.name = 'foo': input should be 'dice_ce'"),
        ("train.learning_rate=.nan", "finite"),
        ("nonsense", "an override is written key=value"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings([], [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_unlike_depth_are_refused() -> None:
    with pytest.raises(UserError, match="features has 2, strides has 1; make them the same length"):
        load_settings([], ["model.features=[4,8]", "model.strides=[[1,1,1]]"])


@pytest.mark.parametrize(
    ("content", "said"),
    [("train: [", "not valid YAML"), ("- 1\n", "a config is a mapping"), ("train: {oops: 1}\n", "a.yaml: unknown key")],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"a\.yaml") as caught:
        load_settings([tmp_path / "a.yaml"])
    assert said in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_settings([tmp_path / "absent.yaml"])
