"""The options of `launch`: one parser for all its commands.

Every option may stand anywhere on the command line; what the parser does not recognise belongs to
the command. `option_rules` refuses the options that a command does not use.
"""

import argparse
from collections.abc import Sequence

from liverseg_dist.errors import UserError
from liverseg_dist.texts.paths import path_argument

from .. import PROGRAM
from .option_parser import OneLineParser
from .option_values import (
    environment_assignment,
    gpu_request,
    job_ids,
    job_name,
    memory_size,
    non_negative_int,
    positive_int,
    printable_text,
)
from .sbatch import SIGNAL_S

DEFAULT_TIME = {
    "train": "24:00:00",
    "tune": "24:00:00",
    "convert": "04:00:00",
    "evaluate": "04:00:00",
    "predict": "04:00:00",
    "aggregate": "00:30:00",
    "doctor": "00:10:00",
}
"""Time limits without --time. Conversion, evaluation and training continue after their limits."""
DEFAULT_TIME_OTHERS = "02:00:00"
DEFAULT_CPUS = 4

TEXT_OPTIONS = (
    "mem",
    "partition",
    "account",
    "qos",
    "constraint",
    "cpu_partition",
    "name",
    "after",
    "distribution",
    "cpu_bind",
    "gpu_bind",
)
"""Options that are an empty text when they are not given."""
SBATCH_VALUED = ("--sbatch", "--sbatch-plugin", "--convert-sbatch")
"""Options whose value is an option of sbatch, which may begin with dashes."""
FOLDER_IS_DEPRECATED = "--folder is deprecated; use --job-dir"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all options of `launch`."""
    # No abbreviations: they could be options of the command, which has a --help of its own.
    parser = OneLineParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument(
        "-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this and stop"
    )
    _add_resource_options(parser.add_argument_group("resources"))
    _add_sbatch_options(parser.add_argument_group("further options of sbatch"))
    _add_stage_options(parser.add_argument_group("single stages (chain, train --array)"))
    _add_job_options(parser.add_argument_group("the job"))
    _add_environment_options(parser.add_argument_group("environment and placement of the ranks"))
    _add_submission_options(parser.add_argument_group("submission"))
    return parser


def _add_resource_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--nodes", type=positive_int, default=1, metavar="N", help="nodes of the job (1)"
    )
    group.add_argument(
        "--gpus-per-node",
        type=gpu_request,
        default=gpu_request("0"),
        metavar="N",
        help="GPUs of each node, also with the model: a100:4; 0: none (default)",
    )
    group.add_argument("--cpu", action="store_true", help="the same as --gpus-per-node 0")
    group.add_argument(
        "--tasks-per-node",
        type=positive_int,
        default=0,
        metavar="N",
        help="ranks of each node (default: one per GPU, or 1)",
    )
    group.add_argument(
        "--cpus-per-task",
        type=positive_int,
        default=DEFAULT_CPUS,
        metavar="N",
        help=f"cores of each rank ({DEFAULT_CPUS})",
    )
    group.add_argument(
        "--mem",
        type=memory_size,
        metavar="SIZE",
        help="memory per node, e.g. 64G (default: that of the cluster)",
    )
    group.add_argument(
        "--mem-gib", type=positive_int, default=0, metavar="N", help="memory per node in GiB"
    )
    group.add_argument(
        "--time",
        metavar="T",
        help="time limit: 24h, 90m, 2d, 90 (minutes), H:MM:SS, D-HH:MM:SS (default: train, tune "
        "24h; convert, evaluate, predict 4h; others 2h; the aggregate job of folds 30m)",
    )
    group.add_argument(
        "--signal",
        type=positive_int,
        default=SIGNAL_S,
        metavar="S",
        help=f"ask the ranks to save S seconds before the time limit ({SIGNAL_S})",
    )


def _add_sbatch_options(group: argparse._ArgumentGroup) -> None:
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(
            f"--{name}", type=printable_text, metavar="NAME", help=f"--{name} of sbatch"
        )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another option of sbatch, for the jobs that train and evaluate; options about "
        "accounting, mail, reservations and excluded nodes apply to all jobs",
    )
    group.add_argument(
        "--sbatch-plugin",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the SPANK plugins of the site",
    )


def _add_stage_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cpu-partition",
        type=printable_text,
        metavar="NAME",
        help="partition of the stages without GPU (conversion, aggregate); when other stages use "
        "GPUs, these do not take --partition, --qos and --constraint",
    )
    group.add_argument(
        "--stage-option",
        action="append",
        default=[],
        metavar="STAGE:KEY=VALUE",
        help="for one stage (convert, train, evaluate, aggregate), e.g. aggregate:time=1h, "
        "evaluate:gpus-per-node=1, convert:mem=16G, train:exclusive",
    )
    group.add_argument(
        "--convert-tasks",
        default="1",
        metavar="N[%M]",
        help="chain: tasks of the conversion, at most M at the same time (1)",
    )
    group.add_argument(
        "--convert-sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same as --stage-option convert:KEY=VALUE",
    )


def _add_job_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", type=job_name, help="job name (liverseg-COMMAND)")
    group.add_argument(
        "--job-dir",
        type=path_argument,
        metavar="DIR",
        help="folder of batch file, job records and logs (default: the folder of the run)",
    )
    # The old name of --job-dir; `parse_options` copies its value.
    group.add_argument("--folder", type=path_argument, help=argparse.SUPPRESS)
    group.add_argument(
        "--launcher",
        choices=("srun", "torchrun"),
        default="srun",
        help="program that starts the ranks (srun)",
    )
    group.add_argument(
        "--array",
        metavar="EXPR",
        # argparse formats help texts, so % is written twice.
        help="train, chain: folds, or some of them: 0-4, 0-4:2, 1,3, 3; convert: the number of "
        "tasks; add %%N for at most N at the same time",
    )
    group.add_argument(
        "--after", type=job_ids, metavar="JOBID", help="start only after this job has succeeded"
    )
    group.add_argument(
        "--restarts",
        type=non_negative_int,
        default=5,
        metavar="N",
        help="stop requeueing after N restarts without progress (5)",
    )


def _add_environment_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--setup",
        type=path_argument,
        metavar="FILE",
        help="shell file that is sourced first, e.g. with `module load` or `conda activate`; it "
        "is copied at submission; the job fails if its last command fails",
    )
    group.add_argument(
        "--env",
        type=environment_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment of the ranks, e.g. NCCL_DEBUG=WARN; repeatable",
    )
    examples = {"distribution": "block:block", "cpu-bind": "cores", "gpu-bind": "closest"}
    for name, example in examples.items():
        group.add_argument(
            f"--{name}",
            type=printable_text,
            metavar="VALUE",
            help=f"--{name} of srun, e.g. {example}",
        )


def _add_submission_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="where to run: SLURM, in the background of this machine, in this process (slurm)",
    )
    group.add_argument("--dry-run", action="store_true", help="print the batch files and stop")
    group.add_argument(
        "--follow",
        action="store_true",
        help="wait for the job, print its log, end with its exit code",
    )
    group.add_argument(
        "--parsable", action="store_true", help="print only the job ids, one per line"
    )


def parse_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of launch.

    Returns:
        The options with their defaults, and the remaining words of the line.

    Raises:
        UserError: An option has an invalid value.
    """
    for word in words:
        # Before Python 3.13 argparse makes an empty list of this value.
        if word.startswith("--") and word.endswith("=--"):
            raise UserError(f"{word}: -- is not a value")
    args, rest = build_parser().parse_known_args(_join_values(words))
    for name in TEXT_OPTIONS:
        # A default text would pass through `type=`, which refuses an empty one.
        setattr(args, name, getattr(args, name) or "")
    if args.folder is not None:
        if args.job_dir is not None:
            raise UserError("--folder is the old name of --job-dir; give one of them")
        args.job_dir = args.folder
    return args, rest


def _join_values(words: Sequence[str]) -> list[str]:
    """Join `--sbatch --mail-type=END` to one word.

    argparse would take the second word for an option of launch.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in SBATCH_VALUED and word.startswith("-"):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def list_given_options(words: Sequence[str]) -> set[str]:
    """Names of the options on the line, without those that have their default."""
    parser = build_parser()
    for action in parser._actions:
        # Without defaults the result has only the options on the line.
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(_join_values(words))[0]))
