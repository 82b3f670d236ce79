"""`World`: which process this is, read from the environment that torchrun, srun (also through submitit) or nobody set.

A half-set environment is refused: a job that believes it is alone while its siblings wait is the worst kind of hang.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from liverseg_dist.cores import usable_cores
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
"""Ports of SLURM jobs lie below Linux's ephemeral range (32768 upwards), so nobody else takes one by chance."""
OPEN_RENDEZVOUS = (
    "warning: this rendezvous of torchrun is open on all networks of the node; not so with --rdzv-backend=liverseg "
    "--rdzv-endpoint=localhost:0 (several nodes: NODE0:PORT, and --rdzv-conf=rank=K on each)"
)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    global_rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master: str = ""
    """`host:port` of rank 0's rendezvous; empty when alone."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launched_by: str = "nobody"

    @property
    def is_main(self) -> bool:
        return self.global_rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def _is_one_node(self) -> bool:
        """Known to be: who sets RANK and the like by hand may leave the number of ranks per node out."""
        known = self.launched_by == "srun" or "LOCAL_WORLD_SIZE" in os.environ
        return known and self.world_size == self.local_world_size

    @classmethod
    def from_environment(
        cls, device: str = "auto", environment: Mapping[str, str] | None = None
    ) -> "World":
        """Who we are. `device`: auto, cpu or cuda. Raises `UserError` for a half-set environment or an absent GPU."""
        env = os.environ if environment is None else environment
        if "RANK" in env or "LOCAL_RANK" in env or "TORCHELASTIC_RUN_ID" in env:
            return _from_torchrun(env, device)
        if (
            "SLURM_STEP_NUM_TASKS" in env
        ):  # set by srun for each task; a bare batch script or salloc shell has none
            return _from_slurm(env, device)
        return cls(device=_choose_device(device, 0))

    @contextmanager
    def connected(self, timeout_s: float = 1800.0) -> Iterator["World"]:
        """The process group while the block runs: NCCL for CUDA tensors, gloo for CPU tensors; none when alone.

        `timeout_s`: how long a collective waits for a lost peer before it raises. Ranks of one node meet on loopback,
        unless GLOO_SOCKET_IFNAME says otherwise; those of several nodes on the first one's own address. NCCL's sockets
        are its own affair (NCCL_SOCKET_IFNAME). Raises `RunFailed` where they do not meet.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.is_distributed:
            if self._is_one_node:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            try:
                self._meet(timedelta(seconds=timeout_s))
            except RuntimeError as error:
                raise RunFailed(
                    connection_error_message(f"rank {self.global_rank}", self.master, error)
                ) from error
        local_rank = os.environ.get("LOCAL_RANK")
        try:
            yield self
        finally:
            os.environ.pop("LOCAL_RANK", None)  # DeepSpeed may have been told another
            if local_rank is not None:
                os.environ["LOCAL_RANK"] = local_rank
            if (
                dist.is_initialized()
            ):  # left open, some ranks abort at interpreter exit and turn a good job into FAILED
                dist.destroy_process_group()

    def _meet(self, timeout: timedelta) -> None:
        host, _, port = self.master.rpartition(":")
        if self.launched_by == "torchrun":  # its own store is up
            if self.is_main and PRIVATE_RENDEZVOUS_VARIABLE not in os.environ:
                print(OPEN_RENDEZVOUS, file=sys.stderr)
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

    def threads(self, wanted: int = 0) -> int:
        """CPU threads for this rank: as requested, or else this node's cores divided among its ranks."""
        return self.requested_threads(wanted) or self.cores

    def requested_threads(self, wanted: int = 0) -> int:
        """CPU threads that the user requested: `wanted`, or OMP_NUM_THREADS; 0 where neither is set.

        torchrun itself sets OMP_NUM_THREADS to 1 for several ranks where it is not set; that 1 is no request.
        """
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if (
            not wanted
            and asked.isdecimal()
            and int(asked) > (1 if self.launched_by == "torchrun" else 0)
        ):
            return int(asked)
        return wanted

    @property
    def cores(self) -> int:
        """This rank's share of the node's. Where SLURM binds tasks to cores (TaskPlugin=task/affinity, task/cgroup) a
        rank sees its own alone."""
        visible = usable_cores()
        own = self.launched_by == "srun" and visible <= int(
            os.environ.get("SLURM_CPUS_PER_TASK", "0")
        )
        return max(1, visible // (1 if own else self.local_world_size))


def backend_for(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _from_torchrun(env: Mapping[str, str], device: str) -> World:
    values = _require_all(
        env, TORCHRUN_KEYS, "torchrun's", "start with torchrun, or unset them to run as one process"
    )
    rank, world_size, local_rank = (_read_integer(values, key) for key in TORCHRUN_KEYS[:3])
    local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world_size}")
    by = "torchrun" if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "hand"
    one_node = "LOCAL_WORLD_SIZE" in env and local_world_size == world_size
    host = LOOPBACK if by == "hand" and one_node else values["MASTER_ADDR"]
    master = f"{host}:{values['MASTER_PORT']}"
    found = _choose_device(device, local_rank)
    shared = by == "torchrun"  # by hand each rank may have been given GPUs of its own
    if shared and found.type == "cuda" and local_world_size > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"{local_world_size} ranks on this node, and torch sees {gpus} GPU(s); start as many"
        )
    return World(rank, local_rank, world_size, local_world_size, master, found, by)


def _from_slurm(env: Mapping[str, str], device: str) -> World:
    values = _require_all(env, SLURM_KEYS, "srun's", "start with srun")
    rank, world_size, local_rank = (_read_integer(values, key) for key in SLURM_KEYS[:3])
    local_world_size = _tasks_on_this_node(env, world_size)
    if world_size == 1:
        return World(device=_choose_device(device, 0), launched_by="srun")
    alone = local_world_size == world_size  # on its node
    address = (
        LOOPBACK if alone else env.get("MASTER_ADDR") or _first_host(values["SLURM_STEP_NODELIST"])
    )
    port = env.get("MASTER_PORT") or str(
        slurm_port(values["SLURM_JOB_ID"], env.get("SLURM_STEP_ID", "0"))
    )
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
    """A rendezvous port that two jobs, or two steps of a job, on the same node do not share."""
    return FIRST_SLURM_PORT + (int(job_id) * 7 + int(step_id)) % SLURM_PORT_COUNT


def _first_host(nodelist: str) -> str:
    try:
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
            f"scontrol cannot name the first host of {nodelist} ({error}); set MASTER_ADDR and MASTER_PORT instead"
        ) from None


def _tasks_on_this_node(env: Mapping[str, str], world_size: int) -> int:
    """From srun's `4(x2),3` notation and this node's number."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _require_all(
    env: Mapping[str, str], keys: tuple[str, ...], whose: str, remedy: str
) -> dict[str, str]:
    missing = [key for key in keys if not env.get(key)]
    if missing:
        present = [key for key in keys if env.get(key)]
        raise UserError(
            f"{whose} environment is half set: {', '.join(present)} without {', '.join(missing)}; {remedy}"
        )
    return {key: env[key] for key in keys}


def _read_integer(values: Mapping[str, str], key: str) -> int:
    try:
        return int(values[key])
    except ValueError:
        raise UserError(f"{key}={values[key]!r} is not a number") from None


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if wanted not in ("auto", "cuda"):
        raise UserError(f"device {wanted!r}: one of auto, cpu, cuda")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise UserError(
            "device cuda: torch sees no GPU here; check the driver and the torch build, or use device cpu"
        )
    if visible == 1:  # srun --gpus-per-task shows each rank its own GPU as number 0
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU: {visible} visible; start at most that many per node"
        )
    return torch.device("cuda", local_rank)
