"""Settings: order of precedence, one clear line for each kind of mistake, and a round trip through the run's file."""

import re
from pathlib import Path

import pytest

from launch.sweep.sweep_config import SweepSettings
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def test_defaults_then_files_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {learning_rate: 0.1, max_steps: 5}\nseed: 4\n")
    (tmp_path / "b.yaml").write_text("train: {learning_rate: 0.2}\n")
    settings = load_settings(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["train.max_steps=7", "data.fold=all"]
    )
    assert (settings.train.learning_rate, settings.train.max_steps, settings.seed) == (0.2, 7, 4)
    assert settings.data.fold == "all"
    assert settings.train.momentum == 0.99


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_that_is_shipped_is_valid(path: Path) -> None:
    assert path.read_text().startswith("#"), "its first lines say what it is for"
    kind = SweepSettings if path.name.startswith("sweep") else Settings
    load_settings_as(kind, [path])


def test_the_resolved_file_gives_the_same_settings(tmp_path: Path) -> None:
    settings = load_settings([], ["model.features=[4,8]", "train.betas=[0.8,0.9]", "data.store=x"])
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert load_settings([tmp_path / "config.yaml"]) == settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.learing_rate=1",
            "unknown key train.learing_rate; did you mean train.learning_rate?",
        ),
        ("trian.max_steps=1", "unknown key trian; did you mean train?"),
        (
            "train.learning_rate=fast",
            "train.learning_rate = 'fast': not a number; expected number > 0, e.g. train.learning_rate=0.01",
        ),
        (
            "train.max_steps=0",
            "train.max_steps = 0: must be greater than or equal to 1; expected whole number >= 1",
        ),
        ("data.fold=x", "data.fold = 'x'"),
        ("train=3", "train = 3"),
        ("convert.slab.slices=32", "convert.slab.slices = 32: not one of the choices; expected 64"),
        ("loss.name=foo", "loss.name = 'foo': not one of the choices; expected dice_ce | "),
        ("train.learning_rate=nan", "finite"),
        ("nonsense", "an override is written key=value"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings([], [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_different_depth_are_refused() -> None:
    with pytest.raises(UserError, match="features has 2, strides has 1; make them the same length"):
        load_settings([], ["model.features=[4,8]", "model.strides=[[1,1,1]]"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.strides=[[2,2,2],[2,2,2]]", "the first of strides is [1, 1, 1]"),
        ("model.kernels=[[3,3,3],[2,3,3]]", "kernels have odd edges"),
        ("train.betas=[1.5,0.9]", "train.betas"),
    ],
)
def test_impossible_networks_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_settings([], [override])


def test_group_norm_needs_whole_groups() -> None:
    load_settings([], ["model.features=[4,16]", "model.norm=group"])
    with pytest.raises(
        UserError, match="norm=group divides the channels into 8 groups, but 20 is not"
    ):
        load_settings([], ["model.features=[20,40]", "model.norm=group"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("train: [", "not valid YAML"),
        ("- 1\n", "a config is a mapping"),
        ("train: {oops: 1}\n", "a.yaml: unknown key"),
    ],
)
def test_a_message_names_the_damaged_file(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"a\.yaml") as caught:
        load_settings([tmp_path / "a.yaml"])
    assert expected in str(caught.value)


def test_a_message_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file; shipped with the program: configs/"):
        load_settings([tmp_path / "absent.yaml"])


LISTS = "a0: &a0 [1,1,1]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MAPPINGS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, z: *a{n - 1}}}\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LISTS, "expands to more than 100,000 values"),
        (MAPPINGS, "expands to more than 100,000 values"),
        (MERGES, "a.yaml: "),
        ("train: &a {schedule: *a}", "nested more than 50 levels deep"),
        ("model: {features: &f [1, *f]}", "nested more than 50 levels deep"),
        ("seed: " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep"),
        ("seed: 0x" + "f" * 9000, "a whole number of more than 64 bits (about 1e10837)"),
        ("seed: " + "9" * 9000, "not valid YAML: Exceeds the limit"),
        ("seed: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("seed: !!float x", "not valid YAML: could not convert"),
        ("seed: !!timestamp x", "not valid YAML"),
        ('run: {dir: "a\\0b"}', "a zero byte"),
        ('run: {dir: "\\ud800"}', "incomplete character"),
        ("x: " + "y" * (1 << 20), "longer than 1 MiB"),
        ("? \"a\\nb\"\n: 1", "unknown key a b"),
    ],
    ids=["lists", "mappings", "merges", "mapping in itself", "list in itself", "deep", "hex", "digits", "date", "float",
         "timestamp", "zero byte", "surrogate", "long", "line break"],
)  # fmt: skip
def test_yaml_that_exhausts_memory_or_recursion_is_refused(
    tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load_settings([tmp_path / "a.yaml"])
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize("value", ["2001-99-99", "!!float x", "[1,"])
def test_an_override_that_is_not_yaml_is_a_text(value: str) -> None:
    assert load_settings([], [f"data.store={value}"]).data.store == value


@pytest.mark.parametrize(
    "override",
    ["model.features=&a [*a]", "data.fold=0x" + "f" * 9000, "data.store=\ud800", "run.dir=a\0b"],
)
def test_an_override_that_cannot_be_saved_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        load_settings([], [override])


def test_small_yaml_aliases_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "train: {max_steps: &n 7}\nseed: *n\ncheckpoint: {<<: {keep_last: 3}}\n"
    )
    settings = load_settings([tmp_path / "a.yaml"])
    assert (settings.train.max_steps, settings.seed, settings.checkpoint.keep_last) == (7, 7, 3)


@pytest.mark.parametrize(
    "override", ["model.features=[1000000000]", "model.features=[0]", "model.blocks_per_level=1000000",
                 "model.kernels=[[3,3,1000]]", "data.patch_size=[1,1,1000000]", "data.spacing_mm=[0,1,1]"],
)  # fmt: skip
def test_sizes_beyond_all_machines_are_refused(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_settings([], [override])
