"""Submit a liverseg command to SLURM; stopped by preemption, a time limit or a dead node, it continues by itself.

  python -m launch train --nodes 2 --gpus-per-node 4 --time 24h --partition gpu \\
      --config configs/task03_S.yaml data.store=STORE run.dir=runs/first train.global_batch_size=8
  python -m launch train --dry-run --nodes 2 ...          print the batch file and stop
  python -m launch train --array folds --config ... data.store=STORE run.dir=runs/cv
  python -m launch convert Task03_Liver STORE --config ... --array 8
  python -m launch chain Task03_Liver STORE --config ... run.dir=runs/first     convert, train, evaluate
  python -m launch evaluate runs/first --store STORE --source Task03_Liver --after 1234
  python -m launch tune --nodes 4 --config configs/sweep.yaml data.store=STORE run.dir=runs/sweep
  python -m launch doctor --nodes 2 --folder runs         try the nodes, network and file system first
  python -m launch status|logs|cancel runs/first

COMMAND is any liverseg command, tune, or chain; the options below may stand anywhere, all others are the command's own
(so are all after --): liverseg COMMAND --help. Batch file, records and logs go to the run's folder, which must be on a
shared file system: job.sbatch there can be submitted again by hand. One task per GPU, or --tasks-per-node.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm import status
from launch.slurm.sbatch import SIGNAL_S, Resources, slurm_time
from liverseg_dist.commands.main import restrict_umask
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER, LiversegError, UserError
from liverseg_dist.streams import guard_output_streams

OVER_RUNS = ("status", "logs", "cancel")


def build_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m launch",
        usage="python -m launch COMMAND [options] [the command's arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_resources(made)
    job = made.add_argument_group("the job")
    job.add_argument("--name", default="", help="job name (default: liverseg-COMMAND)")
    job.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="batch file, records, logs (default: the run's folder)",
    )
    job.add_argument(
        "--launcher",
        choices=("srun", "torchrun"),
        default="srun",
        help="who starts the ranks (srun)",
    )
    job.add_argument(
        "--array", default="", metavar="folds|N", help="train: all folds at once; convert: N tasks"
    )
    job.add_argument(
        "--after", default="", metavar="JOBID", help="start only when this job has ended well"
    )
    job.add_argument(
        "--restarts", type=int, default=5, metavar="N", help="give up after N without progress (5)"
    )
    job.add_argument(
        "--convert-tasks",
        type=int,
        default=1,
        metavar="N",
        help="chain: tasks of the conversion (1)",
    )
    job.add_argument(
        "--convert-sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="chain: sbatch options of it alone",
    )
    how = made.add_argument_group("how")
    how.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where (slurm)"
    )
    how.add_argument("--dry-run", action="store_true", help="print the batch files and stop")
    how.add_argument(
        "--follow", action="store_true", help="stay, show the log, end with the job's exit code"
    )
    how.add_argument(
        "--parsable", action="store_true", help="print nothing but the job ids, one a line"
    )
    return made


def add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument("--nodes", type=_positive, default=1, metavar="N")
    group.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="N", help="0: CPU nodes (default)"
    )
    group.add_argument(
        "--tasks-per-node",
        type=_positive,
        default=0,
        metavar="N",
        help="ranks (default: per GPU, or 1)",
    )
    group.add_argument(
        "--cpus-per-task", type=_positive, default=4, metavar="N", help="cores of each rank (4)"
    )
    group.add_argument(
        "--mem-gib",
        type=_positive,
        default=0,
        metavar="N",
        help="memory per node (the cluster's default)",
    )
    group.add_argument(
        "--time", default="24h", metavar="T", help="limit: 24h, 90m, 2d, H:MM:SS, D-HH:MM:SS (24h)"
    )
    group.add_argument(
        "--signal",
        type=_positive,
        default=SIGNAL_S,
        metavar="S",
        help=f"ask to save S before the limit ({SIGNAL_S})",
    )
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", default="")
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch",
    )


def resources_from(args: argparse.Namespace) -> Resources:
    return Resources(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        tasks_per_node=args.tasks_per_node,
        cpus_per_task=args.cpus_per_task,
        mem_gib=args.mem_gib,
        time=slurm_time(args.time),
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        extra=tuple(args.sbatch),
        signal_s=args.signal,
    )


def split_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(our options, the command, its arguments)."""
    ours, rest = list(argv), []
    if "--" in ours:
        at = ours.index("--")
        ours, rest = ours[:at], ours[at + 1 :]
    args, unknown = build_parser().parse_known_args(ours)
    if not unknown or unknown[0].startswith("-"):
        what = f"{unknown[0]} is no option of launch" if unknown else "no command"
        raise UserError(f"{what}; it goes: python -m launch COMMAND [options] (see --help)")
    return args, unknown[0], [*unknown[1:], *rest]


def run(argv: Sequence[str] | None = None) -> int:
    restrict_umask()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in OVER_RUNS:
            return status.run(words[0], words[1:])
        args, command, arguments = split_arguments(words)
        # By name, as torch comes with it: --help and status answer at once.
        module: Any = importlib.import_module(
            "launch.diagnose.doctor" if command == "doctor" else "launch.slurm.submit"
        )
        return int(module.submit_command(args, resources_from(args), command, arguments))
    except LiversegError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"launch: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("launch: no longer watching; submitted jobs go on", file=sys.stderr)
        return EXIT_USER


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: at least 1")
    return value


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(run())
