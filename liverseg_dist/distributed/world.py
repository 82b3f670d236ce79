"""`World`: the rank, the device and the rendezvous of this process.

They are read from the environment that torchrun or srun (also through submitit) sets; without it
the process is the only one. An incomplete environment is an error: a process that runs alone by
mistake would leave the other ranks waiting in their first collective call.

Whether a process is rank 0 is asked here only. Other packages pass both variants to
`select_for_rank`, or an action to `call_on_rank0`, and log through `logging_setup`.
"""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from liverseg_dist.cores import cgroup_quota, usable_cores
from liverseg_dist.distributed.descriptors import connect_gloo_lazily, raise_descriptor_limit
from liverseg_dist.distributed.placement import bind_to_cpus
from liverseg_dist.distributed.process_groups import (
    abort_process_groups,
    destroy_process_groups,
)
from liverseg_dist.distributed.tcp_store import (
    LOOPBACK,
    PRIVATE_RENDEZVOUS_VARIABLE,
    connection_error_message,
    key_value_store,
    store_of_attempt,
)
from liverseg_dist.errors import RunFailed, UserError

TORCHRUN_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_KEYS = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
)
FIRST_SLURM_PORT, SLURM_PORT_COUNT = 20_000, 12_000
"""Ports of SLURM jobs. They are below Linux's ephemeral range (32768 upwards), from which the
system assigns ports to other programs."""
OPEN_RENDEZVOUS = (
    "this rendezvous of torchrun is open on all networks of the node; on a shared machine use "
    "--rdzv-backend=liverseg --rdzv-endpoint=localhost:0 (several nodes: NODE0:PORT, and "
    "--rdzv-conf=rank=K on each)"
)
T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    global_rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master: str = ""
    """`host:port` of rank 0's rendezvous; empty for a single process."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launched_by: str = "none"
    """torchrun, srun, hand (the variables were set by another program) or none (one process)."""
    bound_cpus: frozenset[int] | None = None
    """CPUs to which `with_cpu_binding` has restricted this process; None: not restricted by it."""

    @property
    def serves_store(self) -> bool:
        """Whether this process serves the store of the ranks; under torchrun its agent does."""
        return self.global_rank == 0 and self.launched_by != "torchrun"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and messages of the job."""
        return self.global_rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def select_for_rank(self, on_rank0: Callable[[], T], elsewhere: Callable[[], T]) -> T:
        """Call the function for this rank and return its result.

        For an object that differs between ranks, such as a writer or a null writer, and for work
        that rank 0 finishes while the other ranks only compute their share.
        """
        return on_rank0() if self.is_main else elsewhere()

    def call_on_rank0(self, action: Callable[[], T]) -> T | None:
        """Call `action` on rank 0 and return its result; None on the other ranks.

        No communication: use `rank_zero.share_from_rank0` if the other ranks need the result or
        have to stop with an error of rank 0.
        """
        return action() if self.is_main else None

    @property
    def _is_one_node(self) -> bool:
        """Whether all ranks are known to be on one node.

        With variables set by hand, LOCAL_WORLD_SIZE may be missing; then it is not known.
        """
        known = self.launched_by == "srun" or "LOCAL_WORLD_SIZE" in os.environ
        return known and self.world_size == self.local_world_size

    @classmethod
    def from_environment(
        cls, device: str = "auto", environment: Mapping[str, str] | None = None
    ) -> "World":
        """Read the rank and choose the device of this process.

        Args:
            device: auto, cpu or cuda.
            environment: variables; the process's own if None.

        Raises:
            UserError: the environment is incomplete, or there is no GPU for this rank.
        """
        env = os.environ if environment is None else environment
        if "RANK" in env or "LOCAL_RANK" in env or "TORCHELASTIC_RUN_ID" in env:
            return _from_torchrun(env, device)
        # srun sets it for each task; a batch script or a shell in salloc does not have it.
        if "SLURM_STEP_NUM_TASKS" in env:
            return _from_slurm(env, device)
        return cls(device=_choose_device(device, 0))

    @contextmanager
    def connected(self, timeout_s: float = 1800.0) -> Iterator["World"]:
        """Keep the process group open while the block runs; no process group for a single process.

        The backend is NCCL for CUDA tensors and gloo for CPU tensors. Ranks of one node connect on
        loopback unless GLOO_SOCKET_IFNAME is set; ranks of several nodes connect to the address of
        the first one. NCCL chooses its own interfaces (NCCL_SOCKET_IFNAME).

        Args:
            timeout_s: how long a collective call waits for a lost rank before it raises.

        Raises:
            RunFailed: the ranks cannot connect.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # Keeps the store of rank 0 open after the process group is aborted: the other ranks read
        # the reason of a failure from it.
        store: dist.Store | None = None
        if self.is_distributed:
            raise_descriptor_limit(self.world_size)
            connect_gloo_lazily()
            if self._is_one_node:
                # Otherwise gloo resolves the host name, whose address may not be reachable.
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            try:
                store = self._join_process_group(timedelta(seconds=timeout_s))
                _logger.debug(
                    "connected at %s, backend %s, timeout %g s",
                    self.master,
                    backend_for(self.device),
                    timeout_s,
                )
            except RuntimeError as error:
                raise RunFailed(
                    connection_error_message(f"rank {self.global_rank}", self.master, error)
                ) from error
        local_rank = os.environ.get("LOCAL_RANK")
        try:
            yield self
        except BaseException:
            # The other ranks may wait for this one in a collective call. A regular end would wait
            # for them.
            abort_process_groups()
            raise
        finally:
            # DeepSpeed may have changed it.
            os.environ.pop("LOCAL_RANK", None)
            if local_rank is not None:
                os.environ["LOCAL_RANK"] = local_rank
        destroy_process_groups()
        del store

    def _join_process_group(self, timeout: timedelta) -> dist.Store:
        host, _, port = self.master.rpartition(":")
        # torchrun's own process serves the store already.
        if self.launched_by == "torchrun":
            if self.is_main and PRIVATE_RENDEZVOUS_VARIABLE not in os.environ:
                _logger.warning(OPEN_RENDEZVOUS)
            # The process group itself waits for all ranks, so the store need not.
            store = dist.TCPStore(host, int(port), timeout=timeout, wait_for_workers=False)
        else:
            store = key_value_store(host, int(port), self.world_size, timeout, serve=self.is_main)
        dist.init_process_group(
            backend_for(self.device),
            store=store_of_attempt(store),
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        return store

    def threads(self, wanted: int = 0) -> int:
        """Return the CPU threads for this rank: as requested, else its share of the node's
        cores."""
        return self.requested_threads(wanted) or self.cores

    def requested_threads(self, wanted: int = 0) -> int:
        """Return the CPU threads that the user requested: `wanted`, or OMP_NUM_THREADS, or 0.

        torchrun sets OMP_NUM_THREADS to 1 for several ranks if the user has not set it. That 1 is
        not a request of the user.
        """
        if wanted:
            return wanted
        variable = os.environ.get("OMP_NUM_THREADS", "")
        default = 1 if self.launched_by == "torchrun" else 0
        if variable.isdecimal() and int(variable) > default:
            return int(variable)
        return 0

    @property
    def cores(self) -> int:
        """This rank's share of the node's CPU cores, at least 1.

        If SLURM binds tasks to cores (TaskPlugin=task/affinity or task/cgroup), the cores that the
        rank sees are already its share.
        """
        visible = usable_cores()
        if self.bound_cpus is not None:
            quota = cgroup_quota()
            # The quota is that of all ranks of the node.
            share = visible if quota is None else int(quota) // self.local_world_size
            return max(1, min(visible, share))
        return max(1, visible // (1 if self._is_bound_by_slurm else self.local_world_size))

    @property
    def _is_bound_by_slurm(self) -> bool:
        cores_per_task = int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
        return self.launched_by == "srun" and usable_cores() <= cores_per_task

    def with_cpu_binding(self) -> "World":
        """Restrict this process to CPU cores near its GPU, and return its world with them.

        Only with several ranks on a node of several NUMA nodes, and not where SLURM has bound the
        ranks (see `placement`).
        """
        if self._is_bound_by_slurm:
            return self
        has_gpu = self.device.type == "cuda"
        cpus = bind_to_cpus(self.local_rank, self.local_world_size, has_gpu=has_gpu)
        return self if cpus is None else replace(self, bound_cpus=cpus)


def backend_for(device: torch.device) -> str:
    """Return the backend of the process group; with CUDA, gloo still serves tensors on the CPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _from_torchrun(env: Mapping[str, str], device: str) -> World:
    remedy = "start with torchrun, or unset them to run as one process"
    values = _require_all(env, TORCHRUN_KEYS, "torchrun's", remedy)
    rank, world_size, local_rank = (_read_integer(values, key) for key in TORCHRUN_KEYS[:3])
    local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world_size}")
    launched_by = "torchrun" if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "hand"
    is_one_node = "LOCAL_WORLD_SIZE" in env and local_world_size == world_size
    host = LOOPBACK if launched_by == "hand" and is_one_node else values["MASTER_ADDR"]
    master = f"{host}:{values['MASTER_PORT']}"
    chosen = _choose_device(device, local_rank)
    gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    # Ranks started by hand may each see other GPUs: their number is not a limit.
    if launched_by == "torchrun" and chosen.type == "cuda" and local_world_size > gpus:
        raise UserError(
            f"{local_world_size} ranks on this node, but torch sees {gpus} GPU(s); start one rank "
            "per GPU"
        )
    return World(rank, local_rank, world_size, local_world_size, master, chosen, launched_by)


def _from_slurm(env: Mapping[str, str], device: str) -> World:
    values = _require_all(env, SLURM_KEYS, "srun's", "start with srun")
    rank, world_size, local_rank = (_read_integer(values, key) for key in SLURM_KEYS[:3])
    local_world_size = _tasks_on_this_node(env, world_size)
    # A single task needs no rendezvous.
    if world_size == 1:
        return World(device=_choose_device(device, 0), launched_by="srun")
    if local_world_size == world_size:
        address = LOOPBACK
    else:
        address = env.get("MASTER_ADDR") or _first_host(values["SLURM_STEP_NODELIST"])
    port = env.get("MASTER_PORT")
    if not port:
        port = str(slurm_port(values["SLURM_JOB_ID"], env.get("SLURM_STEP_ID", "0")))
    return World(
        rank,
        local_rank,
        world_size,
        local_world_size,
        f"{address}:{port}",
        _choose_device(device, local_rank),
        "srun",
    )


def slurm_port(job_id: str, step_id: str) -> int:
    """Return a rendezvous port that differs between jobs, and between steps of a job, on a node."""
    # Consecutive job ids are 7 ports apart, which leaves ports for the steps of each job.
    return FIRST_SLURM_PORT + (int(job_id) * 7 + int(step_id)) % SLURM_PORT_COUNT


def _first_host(nodelist: str) -> str:
    try:
        # Node lists are compressed (node[1-3,7]); scontrol expands them.
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split()
        return names[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"scontrol cannot name the first host of {nodelist} ({error}); set MASTER_ADDR and "
            "MASTER_PORT instead"
        ) from None


def _tasks_on_this_node(env: Mapping[str, str], world_size: int) -> int:
    """Parse srun's `4(x2),3` (4 tasks on 2 nodes, 3 on one) for the number of this node."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        count, _, repeat = part.partition("(x")
        # srun writes equal consecutive counts as one entry with a repetition.
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _require_all(
    env: Mapping[str, str], keys: tuple[str, ...], launcher: str, remedy: str
) -> dict[str, str]:
    """Return the values of `keys`; an error if one is missing."""
    missing = [key for key in keys if not env.get(key)]
    if missing:
        present = [key for key in keys if env.get(key)]
        raise UserError(
            f"{launcher} environment is incomplete: {', '.join(present)} without "
            f"{', '.join(missing)}; {remedy}"
        )
    return {key: env[key] for key in keys}


def _read_integer(values: Mapping[str, str], key: str) -> int:
    try:
        return int(values[key])
    except ValueError:
        raise UserError(f"{key}={values[key]!r} is not a number") from None


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        # Also for "auto" without a GPU.
        return torch.device("cpu")
    if wanted not in ("auto", "cuda"):
        raise UserError(f"device {wanted!r}: one of auto, cpu, cuda")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise UserError(
            "device cuda: torch sees no GPU here; check the driver and the torch build, or use "
            "device cpu"
        )
    # srun --gpus-per-task shows each rank only its own GPU, as number 0.
    if visible == 1:
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU: torch sees {visible}; start at most {visible} "
            "ranks per node"
        )
    return torch.device("cuda", local_rank)
