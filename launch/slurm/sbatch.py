"""The batch file of a job, as a pure function of the request.

`--dry-run` prints exactly the text that sbatch receives, and tests compare it with golden files.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import PACKAGE

INDEX = "@index@"
"""Placeholder for the array task index in the arguments and folders of a job."""
SIGNAL_S = 180
"""The ranks are asked to save and stop this long before the time limit."""
DEFAULT_RESTARTS = 5


@dataclass(frozen=True)
class Resources:
    """The resources of a job. Empty or 0: the default of the cluster."""

    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    """SLURM's name of the GPU model, e.g. a100."""
    tasks_per_node: int = 0
    """0: one per GPU, or one."""
    cpus_per_task: int = 4
    mem_gib: int = 0
    """Per node."""
    mem: str = ""
    """Per node in SLURM's notation (64G); takes precedence over `mem_gib`."""
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
        """`--mem` of sbatch; empty: the default of the cluster."""
        return self.mem or (f"{self.mem_gib}G" if self.mem_gib else "")


@dataclass(frozen=True)
class BatchJob:
    """A job before it is submitted. Paths are absolute and may contain `INDEX`."""

    name: str
    module: tuple[str, ...]
    """A Python module and its arguments, which each rank runs."""
    folder: Path
    """The folder of job.sbatch, jobs/ and the logs."""
    resources: Resources = field(default_factory=Resources)
    run: Path | None = None
    """The run whose checkpoints measure progress; default: `folder`."""
    progress: Path | None = None
    """The folder whose content measures progress; default: `run`."""
    launcher: str = "srun"
    """srun: one task per rank; torchrun: one task per node, which starts the ranks; ray: one task
    per node, in a Ray cluster."""
    array: str = ""
    after: str = ""
    """SLURM's dependency, e.g. afterok:123."""
    restarts: int = DEFAULT_RESTARTS
    is_folder_job: bool = False
    """Whether its batch file is job.sbatch of the folder; the files of other jobs have the name of
    the job."""
    workdir: Path = field(default_factory=Path.cwd)
    code: Path | None = None
    """A copy of the project to run; None: the installed one."""
    python: str = sys.executable
    environment: tuple[str, ...] = ()
    """Variables for the ranks, NAME=VALUE."""
    setup: Path | None = None
    """A shell file that the first node sources before anything starts; srun passes its environment
    to the ranks."""

    @property
    def file(self) -> Path:
        return self.folder / ("job.sbatch" if self.is_folder_job else f"{self.name}.sbatch")

    @property
    def log(self) -> Path:
        return self.folder / "jobs" / ("%A_%a_0_log.out" if self.array else "%j_0_log.out")


def render_batch_file(job: BatchJob) -> str:
    """The text of the batch file."""
    options = "\n".join(f"#SBATCH --{option}" for option in _list_sbatch_options(job))
    if not job.resources.memory:
        options += (
            "\n##SBATCH --mem=32G    # per node; not requested, so the cluster's default applies "
            "(launch: --mem)"
        )
    return f"""#!/bin/bash
# {job.name}; written by launch. To submit it again by hand: sbatch {shlex.quote(str(job.file))}
{options}

{chr(10).join(_render_environment(job))}
# Starts the ranks and keeps the log. After a stop before the time limit, a preemption or a lost
# node it requeues the job, which continues from its newest checkpoint.
exec {_render_command(job)}
"""


def _render_environment(job: BatchJob) -> list[str]:
    """The lines that set directory and environment."""
    lines = [f"cd {shlex.quote(str(job.workdir))} || exit 1"]
    if job.setup is not None:
        # Before the path of the code is set: environment modules may set PYTHONPATH themselves.
        setup = shlex.quote(str(job.setup))
        lines.append(f"source {setup} || {{ echo 'launch: '{setup}' failed' >&2; exit 1; }}")
    lines += [f"export {_quote_assignment(text)}" for text in job.environment]
    if job.code is not None:
        code = shlex.quote(str(job.code))
        lines += [
            "# The code at the time of submission: later edits do not change a waiting job.",
            f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
        ]
    if job.resources.ranks > 1 or job.launcher == "ray":
        lines += [
            "# The ranks connect to the first node, at a port that no other job has.",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
            "export MASTER_ADDR MASTER_PORT",
        ]
    if job.resources.gpus_per_node and job.resources.nodes > 1 and not _sets_nccl(job):
        lines += [
            "# To select or examine the network between nodes (launch: --env NAME=VALUE):",
            "# export NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
            "# export NCCL_IB_HCA=mlx5_0,mlx5_1    # InfiniBand adapters to use; NCCL_IB_DISABLE=1: none",
        ]
    return lines


def build_local_task_command(job: BatchJob) -> list[str]:
    """The command that runs the ranks on this machine without SLURM: torchrun, or the module."""
    ranks = job.resources.ranks_per_node
    if ranks == 1 or job.launcher == "ray":
        return [job.python, "-u", "-m", *job.module]
    return [
        job.python,
        "-u",
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=liverseg",
        # Port 0: torchrun chooses a free one.
        "--rdzv-endpoint=localhost:0",
        f"--nproc-per-node={ranks}",
        "-m",
        *job.module,
    ]


def build_supervisor_command(job: BatchJob) -> list[str]:
    """`python -m launch.slurm.supervise ... --`; the command to supervise follows it."""
    # -u: lines appear in the log at once.
    words = [job.python, "-u", "-m", f"{PACKAGE}.slurm.supervise"]
    words += ["--run", str(job.run or job.folder)]
    if job.run not in (None, job.folder):
        words += ["--record", str(job.folder)]
    if job.progress is not None:
        words += ["--progress", str(job.progress)]
    if job.restarts != DEFAULT_RESTARTS:
        words += ["--restarts", str(job.restarts)]
    if job.launcher == "torchrun":
        words += ["--ranks-per-task", str(job.resources.ranks_per_node)]
    return [*words, "--"]


def _render_command(job: BatchJob) -> str:
    """The command of the batch file: supervisor, srun and what srun starts, one per line."""
    resources = job.resources
    # --export: the variables exported above reach the ranks also if the cluster's default is NONE.
    # --label: each line begins with its rank, which `failure_report` reads.
    # --kill-on-bad-exit: after the end of one rank the others would wait for it.
    srun = ["srun", "--export=ALL", "--label", "--kill-on-bad-exit=1"]
    for name, default in _list_placement_defaults(job).items():
        if value := getattr(resources, name) or default:
            srun.append(f"--{name.replace('_', '-')}={value}")
    if job.launcher == "srun":
        srun += [f"--cpus-per-task={resources.cpus_per_task}"]
        helper = [f"{PACKAGE}.slurm.rank"]
    else:
        # One task per node, which gets the cores of all ranks of the node.
        cpus = resources.cpus_per_task * resources.ranks_per_node
        srun += ["--ntasks-per-node=1", f"--ntasks={resources.nodes}", f"--cpus-per-task={cpus}"]
        if job.launcher == "torchrun":
            helper = [f"{PACKAGE}.slurm.torchrun_node", str(resources.ranks_per_node)]
        else:
            helper = [f"{PACKAGE}.slurm.ray_node"]
    ranks = [job.python, "-u", "-m", *helper, *job.module]
    lines = []
    for part in (build_supervisor_command(job), srun, ranks):
        lines.append(" ".join(shell_quote(text) for text in part))
    return " \\\n  ".join(lines)


def _list_placement_defaults(job: BatchJob) -> dict[str, str]:
    """How srun places ranks if the user has not chosen: option -> value; empty: SLURM's default."""
    resources = job.resources
    has_several = job.launcher == "srun" and resources.ranks_per_node > 1
    return {
        # SLURM's default is cyclic over the sockets of a node. Neighbouring ranks exchange most
        # data, and GPUs are numbered by socket.
        "distribution": "block:block" if has_several else "",
        "cpu_bind": "",
        # Each rank chooses its GPU by its local rank. A rank that sees only its own GPU cannot
        # exchange data with the others by peer-to-peer copies.
        "gpu_bind": "none" if has_several and resources.gpus_per_node > 1 else "",
    }


def _list_sbatch_options(job: BatchJob) -> list[str]:
    """The options of the #SBATCH lines, KEY=VALUE or KEY."""
    resources = job.resources
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.ranks_per_node,
        "gpus-per-node": _format_gpus(resources) or None,
        "cpus-per-task": resources.cpus_per_task,
        "mem": resources.memory or None,
        "time": resources.time,
        "partition": resources.partition or None,
        "account": resources.account or None,
        "qos": resources.qos or None,
        "constraint": resources.constraint or None,
        "array": job.array or None,
        "dependency": job.after or None,
        # Otherwise a job stays in the queue for ever when the job before it fails.
        "kill-on-invalid-dep": "yes" if job.after else None,
        "requeue": True,
        # To the ranks, not to the batch script: they save and stop, the supervisor requeues.
        "signal": f"USR2@{resources.signal_s}",
        "output": job.log,
        # A requeued job must not overwrite the log of its last start.
        "open-mode": "append",
    }
    for item in resources.extra:
        key, equals, value = item.partition("=")
        values[key.removeprefix("--")] = value if equals else True
    options = []
    for key, setting in values.items():
        if setting is True:
            options.append(key)
        elif setting is not None:
            options.append(f"{key}={shlex.quote(str(setting))}")
    return options


def _format_gpus(resources: Resources) -> str:
    if not resources.gpus_per_node:
        return ""
    return f"{resources.gpu_type}:{resources.gpus_per_node}".removeprefix(":")


def _quote_assignment(text: str) -> str:
    name, _, value = text.partition("=")
    return f"{name}={shlex.quote(value)}"


def _sets_nccl(job: BatchJob) -> bool:
    return any(text.startswith("NCCL_") for text in job.environment)


def shell_quote(text: str) -> str:
    """Quote a word for the shell; `INDEX` becomes the variable with the array task index."""
    if INDEX not in text:
        return shlex.quote(text)
    parts = [shlex.quote(part) if part else "" for part in text.split(INDEX)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(parts)


def substitute_index(words: Sequence[str], index: int) -> list[str]:
    """The words of one array task, for a command that no shell expands."""
    return [text.replace(INDEX, str(index)) for text in words]
