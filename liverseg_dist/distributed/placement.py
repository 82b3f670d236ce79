"""CPU cores of each rank of a node, near its GPU.

A node with several sockets has several NUMA nodes: memory and PCI devices belong to one of them,
and access from another one is slower. Several ranks of a node therefore get disjoint sets of cores,
each within the NUMA node of the rank's GPU. Threads and processes of a rank inherit its set, and
Linux places memory where it is first written, so nothing else has to be bound.

Nothing is changed for a single rank per node, on nodes with one NUMA node, and where SLURM has
bound the rank already (`TaskPlugin=task/affinity` or `task/cgroup`, `--cpu-bind`). The variable
LIVERSEG_CPU_BIND=none switches it off. See also numactl(8) and, for GPUs, the `CPU Affinity` of
`nvidia-smi topo -m`.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SYS = Path("/sys")
VARIABLE = "LIVERSEG_CPU_BIND"
NONE = "none"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """CPUs of a machine, as Linux numbers them; hyper-threads count as CPUs."""

    numa_nodes: dict[int, frozenset[int]]
    """NUMA node -> its CPUs; empty if the kernel does not say."""
    cores: dict[int, int]
    """CPU -> the lowest CPU of the same physical core."""

    def nodes_of(self, cpus: frozenset[int]) -> list[int]:
        """Return the NUMA nodes that have some of the CPUs, in ascending order."""
        return [node for node, own in sorted(self.numa_nodes.items()) if own & cpus]


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format, for example `0-3,8,10-11`.

    Raises:
        ValueError: the text has another format.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read_topology(root: Path = SYS) -> Topology:
    """Read the NUMA nodes and physical cores.

    Args:
        root: where sysfs is mounted.
    """
    numa_nodes: dict[int, frozenset[int]] = {}
    for path in sorted(root.glob("devices/system/node/node[0-9]*/cpulist")):
        cpus = _read_cpu_list(path)
        # Nodes without CPUs have memory only.
        if cpus:
            numa_nodes[int(path.parent.name.removeprefix("node"))] = cpus
    cores: dict[int, int] = {}
    for node_cpus in numa_nodes.values():
        for cpu in node_cpus:
            siblings = _read_cpu_list(
                root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            )
            cores[cpu] = min(siblings, default=cpu)
    return Topology(numa_nodes, cores)


def _read_cpu_list(path: Path) -> frozenset[int]:
    """Return the CPUs that a file of sysfs lists; none if it cannot be read."""
    try:
        return parse_cpu_list(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return frozenset()


def read_pci_numa_node(address: str, root: Path = SYS) -> int | None:
    """Return the NUMA node of a PCI device, or None if it is unknown.

    Args:
        address: domain, bus, device and function, for example `0000:3b:00.0`.
        root: where sysfs is mounted.
    """
    path = root / "bus" / "pci" / "devices" / address.lower() / "numa_node"
    try:
        node = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    # Virtual machines and machines with a single node report -1.
    return node if node >= 0 else None


def find_gpu_addresses(ranks: int) -> list[str | None]:
    """Return the PCI addresses of the GPUs of the node's ranks, in the order of the local ranks.

    None where this rank does not see the GPU of another rank, or torch does not report it.
    """
    if torch.cuda.device_count() < ranks:
        return [None] * ranks
    return [find_gpu_address(index) for index in range(ranks)]


def find_gpu_address(index: int) -> str | None:
    """Return the PCI address of a GPU that this process sees; None if torch does not report it."""
    properties = torch.cuda.get_device_properties(index)
    numbers: list[int] = []
    for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"):
        number = getattr(properties, name, None)
        if number is None:
            return None
        numbers.append(number)
    domain, bus, device = numbers
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def divide_cpus(
    allowed: frozenset[int],
    topology: Topology,
    gpu_nodes: Sequence[int | None],
) -> list[frozenset[int]] | None:
    """Divide the CPUs of a node among its ranks.

    Each rank gets CPUs of one NUMA node: that of its GPU, else ranks are distributed over the NUMA
    nodes in blocks. The ranks of a NUMA node get equal numbers of physical cores, with all their
    hyper-threads.

    Args:
        allowed: CPUs that the job may use (cgroup and affinity).
        topology: of the machine.
        gpu_nodes: NUMA node of each local rank's GPU; None: unknown, or no GPU.

    Returns:
        The CPUs of each local rank. None where there is nothing to gain or not enough cores: one
        rank, one NUMA node, or a NUMA node with more ranks than cores.
    """
    nodes, ranks = topology.nodes_of(allowed), len(gpu_nodes)
    if ranks < 2 or len(nodes) < 2:
        return None
    node_of_rank: list[int] = []
    for rank, gpu_node in enumerate(gpu_nodes):
        block = nodes[rank * len(nodes) // ranks]
        node_of_rank.append(gpu_node if gpu_node in nodes else block)
    shares: dict[int, frozenset[int]] = {}
    for node in nodes:
        own_ranks = [rank for rank in range(ranks) if node_of_rank[rank] == node]
        parts = _split_cores(allowed & topology.numa_nodes[node], topology.cores, len(own_ranks))
        if parts is None:
            return None
        shares |= dict(zip(own_ranks, parts, strict=True))
    return [shares[rank] for rank in range(ranks)]


def _split_cores(
    cpus: frozenset[int], cores: Mapping[int, int], parts: int
) -> list[frozenset[int]] | None:
    """Split CPUs into equal numbers of neighbouring physical cores; None if there are too few."""
    by_core: dict[int, set[int]] = {}
    for cpu in sorted(cpus):
        by_core.setdefault(cores.get(cpu, cpu), set()).add(cpu)
    numbers = sorted(by_core)
    if len(numbers) < parts:
        return None
    split = []
    for part in range(parts):
        own = numbers[part * len(numbers) // parts : (part + 1) * len(numbers) // parts]
        found: set[int] = set()
        for core in own:
            found |= by_core[core]
        split.append(frozenset(found))
    return split


def bind_to_cpus(local_rank: int, ranks: int, *, has_gpu: bool) -> frozenset[int] | None:
    """Restrict this process to its share of the node's CPUs.

    Call it before threads and worker processes are started: they inherit the restriction.

    Args:
        local_rank: rank within the node.
        ranks: ranks of the node.
        has_gpu: whether each rank uses the GPU with its local rank.

    Returns:
        The CPUs; None if nothing was changed.
    """
    if ranks < 2 or os.environ.get(VARIABLE) == NONE:
        return None
    topology = read_topology()
    allowed = frozenset(os.sched_getaffinity(0))
    if len(topology.nodes_of(allowed)) < 2:
        return None
    gpu_nodes: list[int | None] = []
    for address in find_gpu_addresses(ranks) if has_gpu else [None] * ranks:
        gpu_nodes.append(None if address is None else read_pci_numa_node(address))
    shares = divide_cpus(allowed, topology, gpu_nodes)
    if shares is None:
        return None
    own = shares[local_rank]
    try:
        os.sched_setaffinity(0, own)
    except OSError as error:
        _logger.debug("CPUs are not bound: %s", error)
        return None
    nodes = topology.nodes_of(own)
    _logger.debug("bound to %d CPUs of NUMA node %s", len(own), nodes)
    return own
