"""The job of this process, from the environment of SLURM or of submitit's local executor."""

import os
from dataclasses import dataclass

from .job_records import expand_hostnames


@dataclass(frozen=True)
class CurrentJob:
    """The job of this process, from its environment."""

    job_id: str
    """For a task of an array ARRAY_TASK, because the number alone may mean the whole array."""
    name: str
    start: int
    """The number of starts before this one."""
    nodes: tuple[str, ...]
    tasks_per_node: str
    is_local: bool

    @classmethod
    def from_environment(cls) -> "CurrentJob":
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            return cls(
                job_id=env.get("SUBMITIT_LOCAL_JOB_ID", "local"),
                name=env.get("LIVERSEG_JOB_NAME", "liverseg"),
                start=-1,  # the supervisor counts local starts by its own record
                nodes=(os.uname().nodename,),
                tasks_per_node="1",
                is_local=True,
            )
        # One task of an array has the id of the whole array as its job id.
        array = env.get("SLURM_ARRAY_JOB_ID")
        return cls(
            job_id=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
            name=env.get("SLURM_JOB_NAME", ""),
            start=int(env.get("SLURM_RESTART_COUNT", "0")),
            nodes=tuple(expand_hostnames(env["SLURM_JOB_NODELIST"])),
            tasks_per_node=env.get("SLURM_TASKS_PER_NODE", "1"),
            is_local=False,
        )
