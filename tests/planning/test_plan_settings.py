"""Given and decided settings of a plan, and the arithmetic of a strategy's memory."""

from pathlib import Path

import pytest

from liverseg_dist.config import load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.planning.experiment_rules import Decision
from liverseg_dist.planning.memory_estimate import optimizer_shards, state_bytes
from liverseg_dist.planning.memory_fit import candidate_levels, configured_levels, resolve_model
from liverseg_dist.planning.plan_file import format_value, write_plan
from liverseg_dist.planning.plan_settings import GIVEN, build_settings, list_given, replace_given

PARAMETERS = 1_000_000
BYTES = 4


def test_settings_are_built_from_dotted_keys() -> None:
    settings = build_settings(
        {"data.patch_size": [32, 64, 64], "model.preset": "S", "train.learning_rate": 0.5}
    )
    assert settings.data.patch_size == (32, 64, 64)
    assert (settings.model.preset, settings.train.learning_rate) == ("S", 0.5)


def test_given_settings_are_found_again() -> None:
    given = {"data.patch_size": [32, 64, 64], "train.max_steps": 7}
    assert list_given(build_settings(given)) == given
    assert list_given(load_settings([])) == {}


def test_given_settings_replace_decisions_and_come_last() -> None:
    decisions = [Decision("train.max_steps", 5, "a rule"), Decision("seed", 1, "another rule")]
    kept = replace_given(decisions, {"train.max_steps": 7})
    assert [(one.key, one.value, one.reason) for one in kept] == [
        ("seed", 1, "another rule"),
        ("train.max_steps", 7, GIVEN),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("adamw", "adamw"),
        ("yes", '"yes"'),
        ("123", '"123"'),
        ("a b", '"a b"'),
        ([1, 2], "[1, 2]"),
        (0.5, "0.5"),
        (True, "true"),
        (None, "null"),
    ],
)
def test_values_are_written_as_yaml_reads_them(value: object, text: str) -> None:
    assert format_value(value) == text


def test_a_plan_that_cannot_be_read_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        write_plan(tmp_path / "plan.yaml", [Decision("train.max_steps", -3, "no such number")])


@pytest.mark.parametrize(
    ("overrides", "shards"),
    [
        ((), 1),
        (("train.strategy=fsdp",), 8),
        (("train.strategy=fsdp", "train.fsdp_shard_ranks=4"), 4),
        (("train.strategy=deepspeed", "train.zero_stage=0"), 1),
        (("train.strategy=deepspeed", "train.zero_stage=2"), 8),
    ],
)
def test_optimizer_state_is_divided_by_the_strategy(
    overrides: tuple[str, ...], shards: int
) -> None:
    train = load_settings([], list(overrides)).train
    assert optimizer_shards(train, ranks=8) == shards


@pytest.mark.parametrize(("optimizer", "tensors"), [("sgd", 1), ("adamw", 2)])
@pytest.mark.parametrize("ranks", [1, 8])
def test_data_parallel_state_is_that_of_the_zero_paper(
    optimizer: str, tensors: int, ranks: int
) -> None:
    """https://arxiv.org/abs/1910.02054, section 5: every rank holds everything."""
    train = load_settings([], [f"train.optimizer={optimizer}", "train.ema_decay=0"]).train
    parts = state_bytes(train, PARAMETERS, largest_group=0, ranks=ranks)
    assert parts["weights"] == parts["gradients"] == BYTES * PARAMETERS
    assert parts["optimizer"] == tensors * BYTES * PARAMETERS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_more_with_each_stage(stage: int) -> None:
    overrides = ["train.strategy=deepspeed", f"train.zero_stage={stage}", "train.optimizer=adamw"]
    train = load_settings([], overrides).train
    parts = state_bytes(train, PARAMETERS, largest_group=0, ranks=8)
    whole, shard = BYTES * PARAMETERS, BYTES * PARAMETERS // 8
    # Two moments and the sharded copy of the weights.
    assert parts["optimizer"] == 3 * shard
    assert parts["gradients"] == (whole if stage == 1 else shard)
    assert parts["weights"] == (whole if stage < 3 else shard + whole)


def test_offload_leaves_no_optimizer_state_on_the_device() -> None:
    overrides = ["train.strategy=deepspeed", "train.zero_stage=2", "train.offload_optimizer=true"]
    parts = state_bytes(load_settings([], overrides).train, PARAMETERS, 0, ranks=8)
    assert parts["optimizer"] == 0


def test_the_average_of_weights_needs_a_copy() -> None:
    train = load_settings([], ["train.ema_decay=0.99"]).train
    assert state_bytes(train, PARAMETERS, 0, ranks=1)["average"] == BYTES * PARAMETERS


def small_settings(levels: str) -> object:
    settings = load_settings(
        [],
        [
            "model.features=[4,8,16]",
            "data.patch_size=[16,16,16]",
            f"train.activation_checkpointing={levels}",
        ],
    )
    return resolve_model(settings, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("levels", "expected"), [("none", ()), ("all", (0, 1, 2)), ("[0,2]", (0, 2))]
)
def test_configured_levels(levels: str, expected: tuple[int, ...]) -> None:
    assert tuple(configured_levels(small_settings(levels))) == expected  # type: ignore[arg-type]


def test_a_level_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="level 3 does not exist; this network has levels 0 to 2"):
        configured_levels(small_settings("[0,3]"))  # type: ignore[arg-type]


def test_candidates_are_neighbouring_levels_and_end_with_all() -> None:
    settings = small_settings("auto")
    found = list(candidate_levels(settings, 100.0, 1, "cuda"))  # type: ignore[arg-type]
    assert (0, 1, 2) in found
    for levels in found:
        assert levels == tuple(range(levels[0], levels[-1] + 1))
    assert len(set(found)) == len(found) == 6, "all ranges of three levels"


def test_a_small_budget_leaves_only_what_could_fit() -> None:
    settings = small_settings("auto")
    found = list(candidate_levels(settings, 1e-6, 1, "cuda"))  # type: ignore[arg-type]
    assert found == [(0, 1, 2)]
