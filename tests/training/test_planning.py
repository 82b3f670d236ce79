"""Plans: memory per strategy, levels chosen for a budget, patches, and the step-time model."""

import json
import math
from pathlib import Path

import pytest
import torch

from liverseg_dist.commands.main import main
from liverseg_dist.config import Settings, TrainConfig, load_settings
from liverseg_dist.distributed.strategies.base import fill_optimizer_state
from liverseg_dist.errors import EXIT_DONE, EXIT_USER, UserError
from liverseg_dist.model import build_model
from liverseg_dist.planning.memory_estimate import BYTES, GIB, estimate_memory, state_bytes
from liverseg_dist.planning.memory_fit import (
    best_option,
    candidate_patches,
    check_fit,
    estimate_strategies,
    levels_for,
    plan_patch,
    resolve_checkpointing,
    resolve_model,
    with_keys,
)
from liverseg_dist.planning.scaling_model import (
    Machine,
    collective_s,
    predict_step_time,
    scaling_table,
)

SPACING_MM = (2.5, 1.0, 1.0)
CPU = torch.device("cpu")


def settings(*overrides: str) -> Settings:
    given = ("model.preset=tiny", "data.patch_size=[16,64,64]", "memory.margin_gib=0", *overrides)
    return resolve_model(load_settings([], given), SPACING_MM)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_of_one_rank_equals_real_tensors(optimizer: str) -> None:
    model = build_model(settings().model)
    kinds = {"sgd": lambda p: torch.optim.SGD(p, momentum=0.9), "adamw": torch.optim.AdamW}
    made = kinds[optimizer](model.parameters())
    fill_optimizer_state(made)
    held = {"weights": sum(p.nbytes for p in model.parameters())}
    held["gradients"] = held["weights"]
    held["optimizer"] = sum(
        v.nbytes
        for state in made.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor) and v.dim()
    )
    parameters = sum(p.numel() for p in model.parameters())
    assert state_bytes(TrainConfig(optimizer=optimizer), parameters, 1, 1) == held  # type: ignore[arg-type]


def test_sharding_divides_what_it_should() -> None:
    parameters, ranks = 8_000_000, 4
    whole, shard = BYTES * parameters, BYTES * parameters // ranks

    def of(strategy: str, stage: int) -> dict[str, int]:
        config = TrainConfig(optimizer="adamw", strategy=strategy, zero_stage=stage)  # type: ignore[arg-type]
        return state_bytes(config, parameters, 1000, ranks)

    assert of("ddp", 1)["optimizer"] == 2 * whole
    assert (of("fsdp", 1)["weights"], of("fsdp", 1)["optimizer"]) == (shard, 2 * shard)
    in_pairs = TrainConfig(optimizer="adamw", strategy="fsdp", fsdp_shard_ranks=2)
    assert state_bytes(in_pairs, parameters, 1000, ranks)["optimizer"] == whole
    gradients = [of("deepspeed", stage)["gradients"] for stage in range(4)]
    assert gradients == [whole, whole, shard, shard]
    assert [of("deepspeed", stage)["optimizer"] for stage in range(4)] == [
        2 * whole,
        *(3 * [3 * shard]),
    ]


def test_auto_takes_no_more_levels_than_the_budget_asks_for() -> None:
    plain = estimate_memory(settings(), device="cpu")
    ample = settings("train.activation_checkpointing=auto", f"memory.budget_gib={plain.gib * 1.01}")
    assert levels_for(ample, 1, CPU) == ()
    tight = settings("train.activation_checkpointing=auto", f"memory.budget_gib={plain.gib * 0.92}")
    levels = levels_for(tight, 1, CPU)
    assert levels
    assert estimate_memory(tight, device="cpu", levels=levels).gib <= plain.gib * 0.92
    with pytest.raises(UserError, match=r"memory\.budget_gib = 0\.001: at least"):
        levels_for(
            settings("train.activation_checkpointing=auto", "memory.budget_gib=0.001"), 1, CPU
        )
    with pytest.raises(UserError, match=r"needs memory\.budget_gib"):
        levels_for(settings("train.activation_checkpointing=auto"), 1, CPU)


@pytest.mark.parametrize(("given", "levels"), [("none", ()), ("all", (0, 1, 2, 3)), ("[1]", (1,))])
def test_named_levels(given: str, levels: tuple[int, ...]) -> None:
    assert levels_for(settings(f"train.activation_checkpointing={given}"), 1, CPU) == levels


def test_fits_says_yes_just_above_the_need_and_no_just_below() -> None:
    wanted = settings("train.micro_batch_size=2", "train.precision=bf16")
    gib = estimate_memory(wanted).gib
    assert check_fit(wanted, SPACING_MM, gib * 1.001).fits
    refused = check_fit(wanted, SPACING_MM, gib * 0.999)
    assert not refused.fits
    assert "batch 2 of 16x64x64 needs" in refused.reason
    assert check_fit(wanted, SPACING_MM, gib * 0.999, ranks=2).fits, (
        "a rank then has one sample only"
    )


def test_more_memory_never_makes_a_smaller_plan() -> None:
    wanted = settings("train.global_batch_size=4")
    voxels, batches = [], []
    for budget in (0.05, 0.1, 0.3, 1.0):
        options = [
            plan_patch(wanted, patch, SPACING_MM, budget, 1)
            for patch in candidate_patches((16, 128, 96))
        ]
        best = best_option(options, SPACING_MM, budget)
        assert best is None or best.need.gib <= budget
        voxels.append(math.prod(best.patch_size) if best else 0)
        batches.append(options[0].micro_batch)
    assert voxels == sorted(voxels)
    assert batches == sorted(batches)
    assert voxels[-1] == 16 * 128 * 96
    assert batches[-1] == 4


def test_each_strategy_is_told() -> None:
    found = estimate_strategies(with_keys(settings(), levels=()), ranks=2)
    assert set(found) == {"ddp", "fsdp", *(f"deepspeed zero_stage={n}" for n in range(4))}
    assert all(n.gib * GIB > n.parts["activations"] for n in found.values())


def test_settled_is_the_smallest_where_nothing_fits() -> None:
    wanted = settings("train.activation_checkpointing=auto")
    least = resolve_checkpointing(wanted, 1e-6, 1, "cpu")
    assert least.gib <= estimate_memory(wanted, device="cpu").gib


# --- the command --------------------------------------------------------------------------------------------------


def test_plan_writes_settings_that_train_takes(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fits.yaml"
    assert (
        main(
            [
                "plan",
                str(phantom_store),
                "--gpu-memory",
                "4",
                "--out",
                str(out),
                "--json",
                "model.preset=tiny",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["need_gib"] <= 4
    assert found["need_gib"] == pytest.approx(sum(found["parts_gib"].values()), abs=0.01)
    line = [
        "train",
        "--config",
        str(out),
        f"data.store={phantom_store}",
        f"run.dir={tmp_path / 'run'}",
        "--dry-run",
    ]
    assert main([*line, "train.activation_checkpointing=auto"]) == EXIT_DONE
    assert "memory budget: none" in capsys.readouterr().out
    assert (
        main([*line, "train.activation_checkpointing=auto", "memory.budget_gib=0.01"]) == EXIT_USER
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu-memory", "0.5"], "--gpu-memory 0.5: one sample of"),
        (["--gpu-memory", "-1"], "must be above 0"),
        (["--gpus", "8"], "add train.global_batch_size=8"),
        (["data.patch_size=[15,33,33]"], "each edge must be a multiple"),
        (["--scale", "--run", "nowhere"], "give --step-seconds"),
    ],
)
def test_plan_refuses_in_one_line(
    arguments: list[str], expected: str, phantom_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(phantom_store), *arguments]) == EXIT_USER
    err = capsys.readouterr().err.strip()
    assert expected in err
    assert "\n" not in err


def test_scale_from_a_measured_run(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "speed/step_s_median": 0.2}\n')
    assert (
        main(["plan", str(phantom_store), "--scale", "--run", str(tmp_path), "--json"]) == EXIT_DONE
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step_s"] == 0.2
    assert [p["gpus"] for p in found["strategies"]["ddp"]][-1] == 1024


# --- step time ----------------------------------------------------------------------------------------------------


def test_step_time_model() -> None:
    rows = scaling_table(0.1, 30_000_000, 6, Machine(), (1, 2, 8, 16, 256, 1024))
    for predictions in rows.values():
        efficiency = [p.efficiency for p in predictions]
        assert efficiency[0] == 1
        assert efficiency == sorted(efficiency, reverse=True)
        assert all(p.step_s == pytest.approx(0.1 + p.exposed_s + p.waiting_s) for p in predictions)
    assert rows["ddp"][-1].exposed_s <= rows["deepspeed1"][-1].exposed_s, "hidden behind backward"
    within, across = rows["fsdp in nodes"], rows["fsdp"]
    assert [p.step_s for p in within[:3]] == pytest.approx([p.step_s for p in across[:3]]), (
        "8 GPUs are one node"
    )
    slow = scaling_table(0.001, 30_000_000, 6, Machine(), (64,))
    assert slow["fsdp in nodes"][0].exposed_s < slow["fsdp"][0].exposed_s, (
        "weights are not gathered between nodes"
    )


def test_ring_all_reduce_in_closed_form() -> None:
    """2 (N - 1) / N V / B: every rank sends and receives that much (https://arxiv.org/abs/1802.05799)."""
    machine = Machine(gpus_per_node=4, intra_gb_s=1, intra_latency_us=0, spread=0, overlap=False)
    volume = 4 * 1_000_000
    assert 2 * collective_s(volume, 1, 4, machine) == pytest.approx(2 * 3 / 4 * volume / 1e9)
    assert predict_step_time("ddp", 0.5, 1_000_000, 1, 4, machine).step_s == pytest.approx(
        0.5 + 2 * 3 / 4 * volume / 1e9
    )
