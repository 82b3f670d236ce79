"""World: environments of torchrun, srun and a single process; incomplete ones are refused."""

import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from liverseg_dist.distributed.world import World, slurm_port
from liverseg_dist.errors import RunFailed, UserError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_NODEID": "2",
}  # fmt: skip


def test_one_process_without_a_launcher() -> None:
    world = World.from_environment("cpu", {})
    assert (world.global_rank, world.world_size, world.is_main, world.is_distributed) == (
        0,
        1,
        True,
        False,
    )


def test_torchrun() -> None:
    world = World.from_environment("cpu", TORCHRUN)
    assert (world.global_rank, world.local_rank, world.world_size, world.local_world_size) == (
        3,
        1,
        4,
        2,
    )
    assert (world.master, world.launched_by) == ("node1:29500", "torchrun")


def test_variables_set_by_hand() -> None:
    """As who starts ranks without torchrun does: rank 0 serves the store itself, on one node on loopback."""
    by_hand = {key: value for key, value in TORCHRUN.items() if "ELASTIC" not in key}
    world = World.from_environment("cpu", by_hand)
    assert (world.master, world.launched_by) == ("node1:29500", "hand")
    assert (
        World.from_environment("cpu", by_hand | {"LOCAL_WORLD_SIZE": "4"}).master
        == "127.0.0.1:29500"
    )


def test_srun_finds_its_first_host_and_a_port_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"  # stands in for SLURM's, which expands host lists
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[1-3]" ] && printf "node1\\nnode2\\nnode3\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    world = World.from_environment("cpu", SRUN)
    assert (world.global_rank, world.local_rank, world.world_size, world.local_world_size) == (
        5,
        1,
        7,
        3,
    )
    assert world.master == f"node1:{slurm_port('1234', '0')}"


def test_a_batch_script_without_srun_is_one_process() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}
    assert World.from_environment("cpu", env).world_size == 1


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"])
def test_an_incomplete_torchrun_environment_is_refused(absent: str) -> None:
    with pytest.raises(UserError, match=f"incomplete: .* without {absent}"):
        World.from_environment("cpu", {k: v for k, v in TORCHRUN.items() if k != absent})


def test_an_incomplete_srun_environment_is_refused() -> None:
    with pytest.raises(UserError, match="srun's environment is incomplete"):
        World.from_environment("cpu", {k: v for k, v in SRUN.items() if k != "SLURM_PROCID"})


@pytest.mark.parametrize(("key", "value"), [("RANK", "4"), ("RANK", "one")])
def test_invalid_values_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key):
        World.from_environment("cpu", TORCHRUN | {key: value})


def test_neighbouring_jobs_get_different_ports_below_the_ephemeral_range() -> None:
    ports = {slurm_port(str(job), str(step)) for job in range(200) for step in range(5)}
    assert len(ports) == 1000
    assert min(ports) >= 20_000
    assert max(ports) < 32_768


def test_ranks_of_torchrun_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    two = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(
        UserError, match=r"2 ranks on this node, but torch sees 1 GPU\(s\); start one rank"
    ):
        World.from_environment("auto", two | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    by_hand = {key: value for key, value in two.items() if not key.startswith("TORCHELASTIC")}
    assert World.from_environment("auto", by_hand).device.index == 0, "each may see one of its own"
    assert (
        World.from_environment("cpu", two | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).device.type
        == "cpu"
    )


def test_cores_are_divided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM may have bound each task to its own; where it has not, a rank sees the node's."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for visible, cpus_per_task, expected in ((8, "8", 8), (16, "8", 8), (8, None, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=visible: set(range(cores)))
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
        if cpus_per_task is not None:
            monkeypatch.setenv("SLURM_CPUS_PER_TASK", cpus_per_task)
        world = World(world_size=2, local_world_size=2, launched_by="srun")
        assert world.threads() == expected
        assert world.threads(3) == 3
        assert replace(world, launched_by="torchrun").threads() == visible // 2


def test_users_can_set_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    for asked, alone, under_torchrun in (("1", 1, 8), ("3", 3, 3), ("", 16, 8), ("4,2", 16, 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert World().threads() == alone
        assert World(local_world_size=2, launched_by="torchrun").threads() == under_torchrun


def test_an_unknown_or_absent_device_is_refused() -> None:
    with pytest.raises(UserError, match="one of auto, cpu, cuda"):
        World.from_environment("tpu", {})


def test_ranks_that_cannot_connect_report_it_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    world = replace(
        World.from_environment("cpu", TORCHRUN), master=f"127.0.0.1:{port}", launched_by="srun"
    )
    with (
        pytest.raises(
            RunFailed, match=f"rank 3 cannot connect to the other ranks at 127.0.0.1:{port}; "
        ),
        world.connected(1.0),
    ):
        pass
