"""Submit a liverseg command to SLURM through submitit; stopped by preemption or a time limit, it continues by itself.

  python -m launch.submit --nodes 2 --gpus-per-node 4 --time 24:00 --partition gpu \\
      train --config configs/task03_S.yaml data.store=STORE run.dir=runs/first
  python -m launch.submit --dry-run --nodes 2 train ...        print the batch file and stop
  python -m launch.submit --after 1234 evaluate runs/first --store STORE

One task per GPU, or --tasks-per-node. Batch file and logs go to --folder, which must be on a shared file system.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from liverseg_dist.commands.main import COMMANDS, main
from liverseg_dist.config import load_settings
from liverseg_dist.errors import EXIT_AGAIN, EXIT_DONE, LiversegError, RunFailed, UserError

SIGNAL_DELAY_S = 180
"""Ranks are asked to save this long before the time limit."""


class Command:
    """What every task runs. submitit stores it with the job, so a requeued job runs it again as it is."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> int:
        """The command's exit code. Stopped on request: rank 0 puts the job back into the queue.

        Raises `RunFailed` when the command failed, which marks the job as failed.
        """
        code = main(self.arguments)
        if code == EXIT_AGAIN and os.environ.get("SLURM_PROCID") == "0":
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        elif code not in (EXIT_DONE, EXIT_AGAIN):
            raise RunFailed(f"liverseg {' '.join(self.arguments)} ended with exit code {code}")
        return code


class Executor(submitit.SlurmExecutor):
    """Also renders where there is no SLURM, for `--dry-run`; whether there is one is asked before submitting."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m launch.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", type=Path, default=Path("runs/submitit"), help="batch files and logs (runs/submitit)")
    made.add_argument("--name", help="job name (default: liverseg-COMMAND)")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus-per-node", type=int, default=0, help="0: CPU nodes (default)")
    made.add_argument("--tasks-per-node", type=int, help="ranks per node (default: one per GPU, or 1)")
    made.add_argument("--cpus-per-task", type=int, default=4)
    made.add_argument("--mem-gib", type=int, help="memory per node (default: the cluster's)")
    made.add_argument("--time", default="24:00", metavar="H:MM", help="time limit, hours:minutes (default 24:00)")
    for name in ("partition", "account", "qos", "constraint"):
        made.add_argument(f"--{name}")
    made.add_argument("--after", metavar="JOBID", help="start only when this job has ended well")
    made.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    made.add_argument("--dry-run", action="store_true", help="print the batch file and stop")
    made.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="a liverseg command")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return made


def submit(args: argparse.Namespace) -> str:
    """The batch file's text for a dry run, else the job's id. Raises `UserError` before anything is submitted."""
    if args.command == "train":
        _check_training(args.arguments)
    parameters = _parameters(args)
    executor = Executor(folder=args.folder / "%j", python=sys.executable)
    executor.update_parameters(**parameters)
    command = Command([args.command, *args.arguments])
    if args.dry_run:
        return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here: submit from a login node of the cluster, or use torchrun on this machine")
    try:
        return str(executor.submit(command).job_id)
    except submitit.core.utils.FailedJobError as error:
        raise RunFailed(f"SLURM refused the job: {' '.join(str(error).split())[:400]}") from None


def _check_training(arguments: Sequence[str]) -> None:
    """Find the mistake now instead of in a log tomorrow."""
    files = [Path(value) for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    settings = load_settings(files, [a for a in arguments if re.match(r"[a-z_]+[.\w]*=", a)])
    if settings.run.dir is None:
        raise UserError("run.dir is not set; give the run a folder on a shared file system, e.g. run.dir=runs/first")
    if settings.data.store is None:
        raise UserError("data.store is not set; make one with tools/to_zarr and pass data.store=STORE")


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    match = re.fullmatch(r"(\d+):([0-5]\d)", args.time)
    if not match:
        raise UserError(f"--time {args.time}: is written hours:minutes, e.g. 24:00")
    extra = dict(item.partition("=")[::2] for item in args.sbatch)
    extra |= {"requeue": True, "open-mode": "append"}
    wanted: dict[str, Any] = {
        "job_name": args.name or f"liverseg-{args.command}",
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node or args.gpus_per_node or 1,
        "cpus_per_task": args.cpus_per_task,
        "time": int(match[1]) * 60 + int(match[2]),
        "signal_delay_s": SIGNAL_DELAY_S,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": extra,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "gpus_per_node": args.gpus_per_node or None,
        "mem": f"{args.mem_gib}G" if args.mem_gib else None,
        "dependency": f"afterok:{args.after}" if args.after else None,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def run(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        said = submit(args)
    except LiversegError as error:
        print(f"launch.submit: {error}", file=sys.stderr)
        return error.exit_code
    if args.dry_run:
        print(said)
    else:
        print(f"job {said} is submitted; its log: {args.folder}/{said}/{said}_0_log.out; cancel: scancel {said}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run())
