"""The batch file of a job, as a pure function of what was asked for: what `--dry-run` prints is what sbatch gets."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import PACKAGE
from .units import slurm_time as slurm_time

INDEX = "@index@"
"""In a job's arguments and folders: the array task's number."""
SIGNAL_S = 180
"""Ranks are asked to save and stop this long before the time limit."""


@dataclass(frozen=True)
class Resources:
    """What a job asks SLURM for. Empty or 0: left to the cluster."""

    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    """SLURM's name of the model, e.g. a100."""
    tasks_per_node: int = 0
    """0: one per GPU, or one."""
    cpus_per_task: int = 4
    mem_gib: int = 0
    """Per node."""
    mem: str = ""
    """Per node, as SLURM writes it (64G); takes precedence over `mem_gib`."""
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, KEY=VALUE or KEY."""
    signal_s: int = SIGNAL_S
    distribution: str = ""
    cpu_bind: str = ""
    gpu_bind: str = ""
    """How srun places ranks on nodes, cores and GPUs; empty: SLURM's defaults."""

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory(self) -> str:
        """sbatch's `--mem`; empty: the cluster's default."""
        return self.mem or (f"{self.mem_gib}G" if self.mem_gib else "")


@dataclass(frozen=True)
class BatchJob:
    """A job before it is submitted. Paths are absolute; `INDEX` in them is the array task's number."""

    name: str
    module: tuple[str, ...]
    """What each rank runs: a module and its arguments."""
    folder: Path
    """Where job.sbatch, jobs/ and the logs are kept."""
    resources: Resources = field(default_factory=Resources)
    run: Path | None = None
    """The run whose checkpoints show progress; default: `folder`."""
    progress: Path | None = None
    launcher: str = "srun"
    """srun: one task per rank; torchrun: one per node, which starts the ranks; ray: one per node, in a Ray cluster."""
    array: str = ""
    after: str = ""
    """SLURM's dependency, e.g. afterok:123."""
    restarts: int = 5
    is_main: bool = False
    """Its batch file is the folder's job.sbatch; others' are named after them."""
    workdir: Path = field(default_factory=Path.cwd)
    code: Path | None = None
    """A copy of the project to run; None: what is installed."""
    python: str = sys.executable
    environment: tuple[str, ...] = ()
    """Variables for the ranks, NAME=VALUE."""
    setup: Path | None = None
    """A shell file that is sourced on the first node before anything starts; srun passes its environment on."""

    @property
    def file(self) -> Path:
        return self.folder / ("job.sbatch" if self.is_main else f"{self.name}.sbatch")

    @property
    def log(self) -> Path:
        return self.folder / "jobs" / ("%A_%a_0_log.out" if self.array else "%j_0_log.out")


def render_batch_file(job: BatchJob) -> str:
    """The batch file's text."""
    options = "\n".join(f"#SBATCH --{option}" for option in _options(job))
    if not job.resources.memory:
        options += "\n##SBATCH --mem=32G    # per node; not requested, so the cluster's default applies (launch: --mem)"
    home = [f"cd {shlex.quote(str(job.workdir))} || exit 1"]
    if job.setup is not None:
        # Before the code's path is set: modules may set PYTHONPATH themselves.
        setup = shlex.quote(str(job.setup))
        home.append(f"source {setup} || {{ echo 'launch: '{setup}' failed' >&2; exit 1; }}")
    home += [f"export {_assignment(text)}" for text in job.environment]
    if job.code is not None:
        home.append(
            "# The code as it was when this was submitted: what is edited later does not change a waiting job."
        )
        home.append(
            f'export PYTHONPATH={shlex.quote(str(job.code))}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1'
        )
    if job.resources.ranks > 1 or job.launcher == "ray":
        home.append("# Ranks meet on the first node, at a port that no other job has.")
        home.append('MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        home.append("MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))")
        home.append("export MASTER_ADDR MASTER_PORT")
    if job.resources.gpus_per_node and job.resources.nodes > 1 and not _sets_nccl(job):
        home.append("# To name or examine the network between nodes (launch: --env NAME=VALUE):")
        home.append("# export NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0")
    again = shlex.quote(str(job.file))
    return f"""#!/bin/bash
# {job.name}; written by launch. To submit it again by hand: sbatch {again}
{options}

{chr(10).join(home)}
# Starts the ranks and keeps the log. Stopped before the time limit, preempted, or cut off by a lost node, it requeues
# the job, which continues from its newest checkpoint.
exec {_supervised(job)}
"""


def task_command(job: BatchJob, *, local: bool = False) -> list[str]:
    """What runs the ranks on this machine without SLURM: torchrun, or the module itself."""
    ranks = job.resources.ranks_per_node
    if ranks == 1 or job.launcher == "ray":
        return [job.python, "-u", "-m", *job.module]
    return [
        job.python,
        "-u",
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=liverseg",
        "--rdzv-endpoint=localhost:0",
        f"--nproc-per-node={ranks}",
        "-m",
        *job.module,
    ]


def supervise_words(job: BatchJob) -> list[str]:
    """`python -m launch.slurm.supervise ... --`, to stand before the command."""
    words = [
        job.python,
        "-u",
        "-m",
        f"{PACKAGE}.slurm.supervise",
        "--run",
        str(job.run or job.folder),
    ]
    if job.run not in (None, job.folder):
        words += ["--record", str(job.folder)]
    if job.progress is not None:
        words += ["--progress", str(job.progress)]
    if job.restarts != 5:
        words += ["--restarts", str(job.restarts)]
    if job.launcher == "torchrun":
        words += ["--ranks-per-task", str(job.resources.ranks_per_node)]
    return [*words, "--"]


def _supervised(job: BatchJob) -> str:
    resources = job.resources
    # --export: what is exported above reaches the ranks also where the cluster's default is NONE.
    srun = ["srun", "--export=ALL", "--label", "--kill-on-bad-exit=1"]
    for name in ("distribution", "cpu_bind", "gpu_bind"):
        if value := getattr(resources, name):
            srun.append(f"--{name.replace('_', '-')}={value}")
    if job.launcher == "srun":
        srun += [f"--cpus-per-task={resources.cpus_per_task}"]
        ranks = [job.python, "-u", "-m", f"{PACKAGE}.slurm.rank", *job.module]
    else:
        cpus = resources.cpus_per_task * resources.ranks_per_node
        srun += ["--ntasks-per-node=1", f"--ntasks={resources.nodes}", f"--cpus-per-task={cpus}"]
        helper = [f"{PACKAGE}.slurm.torchrun_node", str(resources.ranks_per_node)]
        helper = helper if job.launcher == "torchrun" else [f"{PACKAGE}.slurm.ray_node"]
        ranks = [job.python, "-u", "-m", *helper, *job.module]
    parts = (supervise_words(job), srun, ranks)
    return " \\\n  ".join(" ".join(shell_quote(text) for text in part) for part in parts)


def _options(job: BatchJob) -> list[str]:
    resources = job.resources
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.ranks_per_node,
        "gpus-per-node": _gpus(resources) or None,
        "cpus-per-task": resources.cpus_per_task,
        "mem": resources.memory or None,
        "time": resources.time,
        "partition": resources.partition or None,
        "account": resources.account or None,
        "qos": resources.qos or None,
        "constraint": resources.constraint or None,
        "array": job.array or None,
        "dependency": job.after or None,
        "kill-on-invalid-dep": "yes" if job.after else None,
        "requeue": True,
        "signal": f"USR2@{resources.signal_s}",
        "output": job.log,
        "open-mode": "append",
    }
    for item in resources.extra:
        key, equals, value = item.partition("=")
        values[key.removeprefix("--")] = value if equals else True
    return [
        key if value is True else f"{key}={shlex.quote(str(value))}"
        for key, value in values.items()
        if value is not None
    ]


def _gpus(resources: Resources) -> str:
    if not resources.gpus_per_node:
        return ""
    return f"{resources.gpu_type}:{resources.gpus_per_node}".removeprefix(":")


def _assignment(text: str) -> str:
    name, _, value = text.partition("=")
    return f"{name}={shlex.quote(value)}"


def _sets_nccl(job: BatchJob) -> bool:
    return any(text.startswith("NCCL_") for text in job.environment)


def shell_quote(text: str) -> str:
    """Quoted for the shell; `INDEX` becomes the array task's number."""
    if INDEX not in text:
        return shlex.quote(text)
    return '"$SLURM_ARRAY_TASK_ID"'.join(
        shlex.quote(part) if part else "" for part in text.split(INDEX)
    )


def with_index(job_words: Sequence[str], index: int) -> list[str]:
    """The words of one array task, where no shell fills the number in."""
    return [text.replace(INDEX, str(index)) for text in job_words]
