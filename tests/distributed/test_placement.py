"""CPUs of the ranks of a node, from sysfs trees of known machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liverseg_dist.distributed.placement import (
    Topology,
    divide_cpus,
    parse_cpu_list,
    read_pci_numa_node,
    read_topology,
)
from liverseg_dist.distributed.world import World


def make_sysfs(root: Path, nodes: dict[int, str], threads_apart: int = 0) -> Path:
    """A sysfs tree; CPU n and n + `threads_apart` are hyper-threads of one core."""
    for node, cpus in nodes.items():
        folder = root / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
        for cpu in parse_cpu_list(cpus):
            core = cpu % threads_apart if threads_apart else cpu
            siblings = f"{core},{core + threads_apart}" if threads_apart else str(core)
            topology = root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    return root


def add_pci_device(root: Path, address: str, node: int) -> None:
    folder = root / "bus" / "pci" / "devices" / address
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(f"{node}\n")


def test_lists_of_the_kernel() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("\n") == frozenset()
    with pytest.raises(ValueError):
        parse_cpu_list("all")


def test_two_sockets_with_hyperthreads_and_eight_gpus(tmp_path: Path) -> None:
    """A DGX A100-like node: hyper-threads of socket 0 are 0-15 and 32-47."""
    root = make_sysfs(tmp_path, {0: "0-15,32-47", 1: "16-31,48-63"}, threads_apart=32)
    topology = read_topology(root)
    assert topology.numa_nodes[1] == set(range(16, 32)) | set(range(48, 64))
    shares = divide_cpus(frozenset(range(64)), topology, [0, 0, 0, 0, 1, 1, 1, 1])
    assert shares is not None
    # Each rank: four physical cores with both hyper-threads.
    assert shares[0] == {0, 1, 2, 3, 32, 33, 34, 35}
    assert shares[7] == {28, 29, 30, 31, 60, 61, 62, 63}
    assert frozenset().union(*shares) == frozenset(range(64))
    assert sum(len(share) for share in shares) == 64


def test_gpus_decide_the_socket_and_their_order_does_not_matter(tmp_path: Path) -> None:
    topology = read_topology(make_sysfs(tmp_path, {0: "0-3", 1: "4-7"}))
    shares = divide_cpus(frozenset(range(8)), topology, [1, 0, 1, 1])
    assert shares == [{4}, {0, 1, 2, 3}, {5}, {6, 7}]


def test_without_gpus_neighbouring_ranks_share_a_socket(tmp_path: Path) -> None:
    topology = read_topology(make_sysfs(tmp_path, {0: "0-3", 1: "4-7"}))
    allowed = frozenset(range(8))
    assert divide_cpus(allowed, topology, [None] * 2) == [set(range(4)), set(range(4, 8))]
    assert divide_cpus(allowed, topology, [None] * 4) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


def test_only_cpus_of_the_job_are_used(tmp_path: Path) -> None:
    """A cgroup or an affinity that SLURM or taskset has set."""
    topology = read_topology(make_sysfs(tmp_path, {0: "0-3", 1: "4-7"}))
    assert divide_cpus(frozenset({2, 3, 4}), topology, [1, 0]) == [{4}, {2, 3}]
    # A GPU whose node has no CPU of the job.
    assert divide_cpus(frozenset({0, 1, 4, 5}), topology, [3, None]) == [{0, 1}, {4, 5}]


@pytest.mark.parametrize(
    ("nodes", "allowed", "gpu_nodes"),
    [
        ({0: "0-3", 1: "4-7"}, range(8), [0]),  # one rank
        ({0: "0-7"}, range(8), [None, None]),  # one NUMA node
        ({0: "0-3", 1: "4-7"}, range(4), [None, None]),  # one NUMA node of the job
        ({0: "0-3", 1: "4-7"}, (0, 4), [0, 0]),  # more ranks than cores
        ({}, range(8), [None, None]),  # unknown
    ],
)
def test_nothing_changes_where_nothing_is_gained(
    nodes: dict[int, str], allowed: range, gpu_nodes: list[int | None], tmp_path: Path
) -> None:
    topology = read_topology(make_sysfs(tmp_path, nodes))
    assert divide_cpus(frozenset(allowed), topology, gpu_nodes) is None


def test_numa_node_of_a_pci_device(tmp_path: Path) -> None:
    add_pci_device(tmp_path, "0000:3b:00.0", 1)
    add_pci_device(tmp_path, "0000:af:00.0", -1)
    assert read_pci_numa_node("0000:3B:00.0", tmp_path) == 1
    assert read_pci_numa_node("0000:af:00.0", tmp_path) is None
    assert read_pci_numa_node("0000:00:00.0", tmp_path) is None


RANK = """
import os, sys
from pathlib import Path
from liverseg_dist.distributed import placement
from liverseg_dist.distributed.world import World
cpu = min(os.sched_getaffinity(0))
topology = placement.Topology({0: frozenset([cpu]), 1: frozenset(os.sched_getaffinity(0)) - {cpu}}, {})
placement.read_topology = lambda: topology
world = World.from_environment("cpu").with_cpu_binding()
print(sorted(os.sched_getaffinity(0)), world.cores, world.bound_cpus is not None)
"""
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


def run_rank(rank: int, **environment: str) -> str:
    ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": "29500", **TORCHRUN}
    done = subprocess.run(
        [sys.executable, "-c", RANK],
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_processes_are_bound_unless_it_is_switched_off() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    assert run_rank(0) == f"[{cpus[0]}] 1 True"
    assert run_rank(1) == f"{cpus[1:]} {max(1, len(cpus) - 1)} True"
    assert run_rank(1, LIVERSEG_CPU_BIND="none") == f"{cpus} {max(1, len(cpus) // 2)} False"


def test_ranks_that_slurm_has_bound_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("bound a second time")

    monkeypatch.setattr("liverseg_dist.distributed.world.bind_to_cpus", refuse)
    monkeypatch.setattr("liverseg_dist.distributed.world.usable_cores", lambda: 4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    world = World(local_world_size=2, world_size=2, launched_by="srun")
    assert world.with_cpu_binding() is world
    assert world.cores == 4


def test_topology_of_this_machine() -> None:
    """The real sysfs, where it has NUMA nodes."""
    topology = read_topology()
    assert isinstance(topology, Topology)
    for cpus in topology.numa_nodes.values():
        assert all(topology.cores[cpu] <= cpu for cpu in cpus)
