"""Whole plans on fingerprints made by hand: small and large GPUs, CPUs, files."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from liverseg_dist.config import ChannelConfig, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.planning.cpu_plan import plan_for_cpu
from liverseg_dist.planning.experiment_memory import GpuBudget
from liverseg_dist.planning.experiment_plan import plan_experiment
from liverseg_dist.planning.experiment_rules import Decision
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.memory_estimate import estimate_memory
from liverseg_dist.planning.plan_file import format_plan, write_plan
from liverseg_dist.planning.plan_settings import list_given
from tests.planning.fingerprints import MR, ORGANS, case, dataset


def isotropic_ct(cases: int) -> DatasetFingerprint:
    return dataset(
        [
            case(n, (200, 200, 200), (1.5, 1.5, 1.5), lesions_mm=(9.0, 20.0), lesion_voxels=4000)
            for n in range(cases)
        ]
    )


def thick_mr(cases: int) -> DatasetFingerprint:
    one = [case(n, (33, 256, 256), (7.7, 1.25, 1.25)) for n in range(cases)]
    return dataset(one, MR, ORGANS)


def test_plan_stays_within_the_memory() -> None:
    for gib in (2.0, 4.0, 8.0, 24.0):
        plan = plan_experiment(isotropic_ct(30), GpuBudget(gib))
        levels = plan.settings.train.activation_checkpointing
        assert not isinstance(levels, str)
        assert estimate_memory(plan.settings, levels=levels).gib <= gib
        assert plan.summary["need_gib"] <= gib


def test_more_memory_never_gives_a_smaller_patch_of_the_same_network() -> None:
    given = {"model.preset": "M", "model.architecture": "unet"}
    sizes = []
    for gib in (1.8, 3.0):
        plan = plan_experiment(isotropic_ct(10), GpuBudget(gib), given)
        sizes.append(math.prod(plan.settings.data.patch_size))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_small_gpu_recomputes_levels() -> None:
    given = {
        "model.preset": "S",
        "model.architecture": "unet",
        "data.patch_size": [64, 128, 128],
        "train.micro_batch_size": 1,
    }
    settings = plan_experiment(isotropic_ct(10), GpuBudget(24.0), given).settings
    plain = estimate_memory(settings).gib
    least = estimate_memory(settings, levels=range(5)).gib
    assert least < plain
    # One sample fits only with recomputed levels.
    budget = (plain + least) / 2
    small = plan_experiment(isotropic_ct(10), GpuBudget(budget), given)
    levels = small.value("train.activation_checkpointing")
    assert levels == list(range(len(levels)))
    assert levels
    assert small.summary["need_gib"] <= budget
    assert small.settings.train.global_batch_size == 2


def test_large_set_on_a_large_gpu() -> None:
    plan = plan_experiment(isotropic_ct(300), GpuBudget(80.0, devices=4))
    assert plan.value("model.architecture") == "resenc"
    assert plan.value("model.preset") == "L"
    train = plan.settings.train
    assert train.global_batch_size % 4 == 0
    assert train.global_batch_size > 4
    assert train.micro_batch_size * 4 <= train.global_batch_size
    # As many samples as nnU-Net's default training.
    assert train.max_steps * train.global_batch_size == pytest.approx(500_000, rel=0.01)


def test_thick_mr_is_not_pooled_along_z_at_first() -> None:
    plan = plan_experiment(thick_mr(6), GpuBudget(8.0))
    assert plan.settings.model.strides is not None
    assert plan.settings.model.kernels is not None
    assert plan.settings.model.strides[1] == (1, 2, 2)
    assert plan.settings.model.kernels[0] == (1, 3, 3)
    assert plan.value("convert.splits.folds") == 3
    assert plan.value("convert.channels") == [
        {"name": "MRI", "modality": "MR", "intensity": "zscore"}
    ]
    assert plan.value("convert.cleaning.outliers") is None


def test_left_and_right_structures_are_not_mirrored_along_x() -> None:
    one = [case(n, (33, 256, 256), (7.7, 1.25, 1.25)) for n in range(4)]
    sided = scheme_from_labels({"background": 0, "Right_kidney": 1, "left_Kidney": 2, "liver": 3})
    plan = plan_experiment(dataset(one, MR, sided), GpuBudget(8.0))
    assert plan.value("data.mirror_axes") == ["z", "y"]
    # A structure of one side only cannot be confused, and `bright` names no side.
    single = scheme_from_labels({"background": 0, "right kidney": 1, "bright spot": 2})
    mirrored = {"data.augmentation": "nnunet"}
    short = plan_for_cpu(dataset(one, MR, sided), 5.0, 2, mirrored)
    assert short.value("data.mirror_axes") == ["z", "y"]
    other = plan_for_cpu(dataset(one, MR, single), 5.0, 2, mirrored)
    assert other.value("data.mirror_axes") is None
    # The short training without augmentation mirrors nothing.
    plain = plan_for_cpu(dataset(one, MR, sided), 5.0, 2)
    assert plain.value("data.mirror_axes") is None


def test_memory_is_that_of_all_structures_and_channels() -> None:
    labels = {"background": 0} | {f"organ {n}": n for n in range(1, 31)}
    one = [case(n, (60, 256, 256), (4.0, 1.5, 1.5)) for n in range(4)]
    channels = tuple(ChannelConfig(name=f"T{n}", modality="MR", intensity="zscore") for n in (1, 2))
    few = plan_experiment(dataset(one), GpuBudget(24.0))
    two = [replace(case, intensities=2 * case.intensities) for case in one]
    many = plan_experiment(dataset(two, channels, scheme_from_labels(labels)), GpuBudget(24.0))
    assert many.settings.data.patch_size == few.settings.data.patch_size
    assert many.settings.model.out_channels == 31
    assert many.summary["need_gib"] > few.summary["need_gib"]
    assert not {d.key for d in many.decisions} & {"model.in_channels", "model.out_channels"}


def test_given_settings_are_kept_and_written() -> None:
    given = list_given(
        load_settings([], ["model.preset=tiny", "convert.cleaning.spacing_mm=[3,2,2]", "seed=5"])
    )
    plan = plan_experiment(isotropic_ct(10), GpuBudget(8.0), given)
    assert plan.value("model.preset") == "tiny"
    assert plan.value("convert.cleaning.spacing_mm") == [3.0, 2.0, 2.0]
    assert plan.value("seed") == 5
    assert plan.settings.model.features is not None
    assert plan.settings.model.features[0] == 8
    keys = [decision.key for decision in plan.decisions]
    assert len(keys) == len(set(keys))


def test_given_batch_and_levels_decide_the_memory() -> None:
    given = {"model.preset": "S", "train.global_batch_size": 6}
    plain = plan_experiment(isotropic_ct(10), GpuBudget(8.0), given)
    assert plain.settings.train.global_batch_size == 6
    assert plain.value("train.max_steps") == round(50_000 / 6)
    levels = {"train.activation_checkpointing": "all", "train.micro_batch_size": 2}
    frugal = plan_experiment(isotropic_ct(10), GpuBudget(8.0), given | levels)
    assert frugal.value("train.activation_checkpointing") == "all"
    assert frugal.settings.train.micro_batch_size == 2
    assert frugal.summary["need_gib"] < plain.summary["need_gib"]


def test_given_labels_are_one_value(tmp_path: Path) -> None:
    labels = '{"my.lesion": {"from": ["tumour"], "kind": "lesion"}, "*": "drop"}'
    settings = load_settings([], [f"convert.labels={labels}"])
    given = list_given(settings)
    assert list(given) == ["convert.labels"]
    plan = plan_experiment(isotropic_ct(10), GpuBudget(8.0), given)
    write_plan(tmp_path / "plan.yaml", plan.decisions)
    assert load_settings([tmp_path / "plan.yaml"]).convert.labels == settings.convert.labels


def test_given_patch_that_does_not_fit_is_refused() -> None:
    given = {"data.patch_size": [64, 512, 512], "model.preset": "M"}
    with pytest.raises(UserError, match=r"--gpu-memory-gib 2: one sample of 64x512x512 needs"):
        plan_experiment(isotropic_ct(10), GpuBudget(2.0), given)


def test_no_memory_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"use a smaller model\.preset, or --cpu-minutes"):
        plan_experiment(isotropic_ct(10), GpuBudget(0.5))


def test_cpu_plan_scales_with_time() -> None:
    short, long = (plan_for_cpu(isotropic_ct(10), minutes, 2) for minutes in (5, 20))
    assert long.settings.train.max_steps == pytest.approx(4 * short.settings.train.max_steps, 0.02)
    assert math.prod(short.settings.data.patch_size) <= 1.1 * 32 * 48 * 48
    assert short.value("model.preset") == "tiny"
    fixed = plan_for_cpu(isotropic_ct(10), 5, 2, {"train.max_steps": 12})
    assert fixed.settings.train.max_steps == 12
    assert fixed.settings.validation.every_steps == 6


@pytest.mark.parametrize("data", [isotropic_ct(3), thick_mr(1), thick_mr(12)])
def test_file_is_read_back_as_the_plan(data: DatasetFingerprint, tmp_path: Path) -> None:
    plan = plan_experiment(data, GpuBudget(8.0))
    write_plan(tmp_path / "plan.yaml", plan.decisions, ["for a test"])
    read = load_settings([tmp_path / "plan.yaml"])
    assert list_given(read) == {decision.key: decision.value for decision in plan.decisions}
    text = (tmp_path / "plan.yaml").read_text()
    lines = text.splitlines()
    settings = [n for n, line in enumerate(lines) if not line.strip().startswith("#")]
    for number in settings:
        is_section = lines[number].endswith(":")
        assert is_section or lines[number - 1].strip().startswith("# "), lines[number]


def test_values_stay_what_they_are_in_the_file(tmp_path: Path) -> None:
    decisions = [
        Decision("run.dir", "2024-11-30", "text that YAML would read as a date"),
        Decision("train.precision", "bf16", "two\nlines"),
    ]
    write_plan(tmp_path / "plan.yaml", decisions)
    assert str(load_settings([tmp_path / "plan.yaml"]).run.dir) == "2024-11-30"
    assert "# two?lines" in format_plan(decisions)
