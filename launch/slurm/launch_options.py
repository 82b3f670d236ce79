"""The options of `launch`, one parser for all its commands, and what each command does not take.

An option that a command would ignore is refused: a job that runs other than asked costs more than a second try.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from liverseg_dist.errors import UserError

from .. import PROGRAM
from .sbatch import SIGNAL_S, Resources
from .sbatch_options import format_option, parse_plugin_option, parse_sbatch_option
from .units import parse_gpus, parse_memory, slurm_time, time_seconds

DEFAULT_TIME = {
    "train": "24:00:00", "tune": "24:00:00", "convert": "04:00:00", "evaluate": "04:00:00", "predict": "04:00:00",
    "aggregate": "00:30:00", "doctor": "00:10:00",
}  # fmt: skip
"""Time limits without --time. Conversion and evaluation continue after theirs, as training does."""
DEFAULT_CPUS = 4
OTHER_TIME = "02:00:00"
USES_GPU = (
    "train",
    "tune",
    "evaluate",
    "predict",
    "postprocess",
    "convert",
    "denoiser",
    "demo",
    "doctor",
    "chain",
)
LEARNS = ("train", "tune", "chain")
"""Commands for which a job without GPUs is most likely a mistake."""

SLURM_ONLY = (
    "partition", "account", "qos", "constraint", "mem", "mem_gib", "sbatch", "sbatch_plugin", "after", "parsable",
    "cpu_bind", "gpu_bind", "distribution", "cpu_partition", "convert_sbatch", "stage_option", "launcher",
)  # fmt: skip
TEXTS = ("mem", "partition", "account", "qos", "constraint", "cpu_partition", "name", "after", "distribution",
         "cpu_bind", "gpu_bind")  # fmt: skip
"""Options that are an empty text when they are not given."""
TAKES_OPTIONS = ("--sbatch", "--sbatch-plugin", "--convert-sbatch")
"""Their value is an option of sbatch, which may be written with its dashes."""
DEBUG_TAKES = ("cluster", "folder")


def build_parser() -> argparse.ArgumentParser:
    """All options of `launch`; what is not recognised belongs to the command."""
    made = OneLineParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    made.add_argument(
        "-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this and stop"
    )
    _add_resources(made.add_argument_group("resources"))
    _add_stages(made.add_argument_group("single stages of a plan (chain, train --array)"))
    _add_job(made.add_argument_group("the job"))
    _add_environment(made.add_argument_group("environment and placement of the ranks"))
    _add_how(made.add_argument_group("how"))
    return made


def _add_resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--nodes", type=positive, default=1, metavar="N", help="nodes of the job (1)"
    )
    group.add_argument(
        "--gpus-per-node", type=gpus, default=gpus("0"), metavar="N",
        help="GPUs of each node, also with the model: a100:4; 0: none (default)",
    )  # fmt: skip
    group.add_argument("--cpu", action="store_true", help="the same as --gpus-per-node 0")
    group.add_argument(
        "--tasks-per-node",
        type=positive,
        default=0,
        metavar="N",
        help="ranks (default: per GPU, or 1)",
    )
    group.add_argument(
        "--cpus-per-task",
        type=positive,
        default=DEFAULT_CPUS,
        metavar="N",
        help="cores of each rank (4)",
    )
    group.add_argument(
        "--mem", type=memory, metavar="SIZE", help="memory per node, e.g. 64G (cluster's default)"
    )
    group.add_argument(
        "--mem-gib", type=positive, default=0, metavar="N", help="the same in GiB, as a number"
    )
    group.add_argument(
        "--time", metavar="T",
        help="limit: 24h, 90m, 2d, 90 (minutes), H:MM:SS, D-HH:MM:SS (train, tune 24h; convert, evaluate, predict 4h; "
        "others 2h; the aggregate job of folds 30m)",
    )  # fmt: skip
    group.add_argument(
        "--signal",
        type=positive,
        default=SIGNAL_S,
        metavar="S",
        help=f"ask to save S seconds before the limit ({SIGNAL_S})",
    )
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", type=plain_text, metavar="NAME", help=f"sbatch's --{name}")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE",
        help="another option of sbatch, for the jobs that train and evaluate; those about accounting, mail, "
        "reservations and excluded nodes go to all jobs",
    )  # fmt: skip
    group.add_argument(
        "--sbatch-plugin",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the site's SPANK plugins",
    )


def _add_stages(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cpu-partition", type=plain_text, metavar="NAME",
        help="partition of the stages without GPU (conversion, aggregate); with GPUs elsewhere these do not take "
        "--partition, --qos and --constraint",
    )  # fmt: skip
    group.add_argument(
        "--stage-option", action="append", default=[], metavar="STAGE:KEY=VALUE",
        help="for one stage alone (convert, train, evaluate, aggregate), e.g. aggregate:time=1h, "
        "evaluate:gpus-per-node=1, convert:mem=16G, train:exclusive",
    )  # fmt: skip
    group.add_argument(
        "--convert-tasks",
        default="1",
        metavar="N[%M]",
        help="chain: tasks of the conversion, M at once (1)",
    )
    group.add_argument(
        "--convert-sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same as --stage-option convert:...",
    )


def _add_job(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", type=job_name, help="job name (liverseg-COMMAND)")
    group.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="batch file, records, logs (default: the run's folder)",
    )
    group.add_argument(
        "--launcher",
        choices=("srun", "torchrun"),
        default="srun",
        help="what starts the ranks (srun)",
    )
    group.add_argument(
        "--array", metavar="EXPR",
        help="train, chain: folds, or some: 0-4, 0-4:2, 1,3, 3; convert: a number of tasks; %%N behind it: N at once",
    )  # fmt: skip
    group.add_argument(
        "--after", type=job_ids, metavar="JOBID", help="start only when this job succeeded"
    )
    group.add_argument(
        "--restarts",
        type=not_negative,
        default=5,
        metavar="N",
        help="give up after N without progress (5)",
    )


def _add_environment(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--setup", type=Path, metavar="FILE",
        help="shell file sourced before anything starts, e.g. with `module load` or `conda activate`; copied at "
        "submission; the job fails if its last command fails",
    )  # fmt: skip
    group.add_argument(
        "--env", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="environment of the ranks, e.g. NCCL_DEBUG=WARN; repeatable",
    )  # fmt: skip
    for name, example in (
        ("distribution", "block:block"),
        ("cpu-bind", "cores"),
        ("gpu-bind", "closest"),
    ):
        group.add_argument(
            f"--{name}", type=plain_text, metavar="HOW", help=f"srun's, e.g. {example}"
        )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where (slurm)"
    )
    group.add_argument("--dry-run", action="store_true", help="print the batch files and stop")
    group.add_argument(
        "--follow", action="store_true", help="stay, show the log, end with the job's exit code"
    )
    group.add_argument("--parsable", action="store_true", help="print only the job ids, one a line")


class OneLineParser(argparse.ArgumentParser):
    """A mistake is a `UserError` of one line; an unknown option brings the closest known one.

    Args (besides argparse's own):
        help_lines: commands whose --help lists the options; default: that of this parser.
        also: option strings that would have been accepted too.
    """

    def __init__(
        self, *args: Any, help_lines: str = "", also: Iterable[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.help_lines = help_lines or f"{self.prog} --help"
        self.also = tuple(also)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (-\S+)", message):
            options = [*option_strings(self), *self.also]
            message = f"no option {match[1]}{suggest_option(match[1], options)}"
        raise UserError(f"{self.prog}: {message}; see {self.help_lines}")


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    return [text for text in parser._option_string_actions if text.startswith("--")]


def suggest_option(word: str, options: Sequence[str]) -> str:
    """`; did you mean --gpus-per-node?`, or nothing."""
    name = word.partition("=")[0]
    close = [option for option in options if len(name) > 3 and option.startswith(name)]
    close = close or difflib.get_close_matches(name, options, 1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of launch, with their defaults, and what is left on the line. Raises `UserError`."""
    for word in words:
        # Before Python 3.13 argparse makes an empty list of this value.
        if word.startswith("--") and word.endswith("=--"):
            raise UserError(f"{word}: -- is no value")
    args, rest = build_parser().parse_known_args(_join_values(words))
    for name in TEXTS:
        # argparse would check a default text like a given one, and an empty one must not be given.
        setattr(args, name, getattr(args, name) or "")
    return args, rest


def _join_values(words: Sequence[str]) -> list[str]:
    """`--sbatch --mail-type=END` as one word, `--sbatch=--mail-type=END`: argparse takes the second for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in TAKES_OPTIONS and word.startswith("-"):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def given_options(words: Sequence[str]) -> set[str]:
    """Names of the options that stand on the line, as opposed to those with their defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(_join_values(words))[0]))


def refuse_ignored(command: str, given: set[str], args: argparse.Namespace) -> None:
    """Refuse each given option that would have no effect. Raises `UserError` that names it."""
    ignored: dict[str, str] = {}
    if command != "chain":
        ignored |= dict.fromkeys(
            ("convert_tasks", "convert_sbatch"), f"is for chain, not for {command}"
        )
    if not (command == "chain" or (command == "train" and args.array)):
        why = f"is for plans of several jobs (chain, train --array), not for {command}"
        ignored |= dict.fromkeys(("cpu_partition", "stage_option"), why)
    if command not in ("train", "convert", "chain"):
        ignored["array"] = f"is for train, convert and chain, not for {command}"
    if command == "tune":
        ignored["launcher"] = "has no effect on tune: Ray starts its processes"
    if command == "doctor":
        names = ("after", "restarts", "follow", "parsable", "signal")
        ignored |= dict.fromkeys(names, "has no effect on doctor, which waits for its one job")
    if not args.gpus_per_node.count:
        ignored["gpu_bind"] = "needs --gpus-per-node"
    if args.cluster == "local":
        ignored |= dict.fromkeys(SLURM_ONLY, "has no effect with --cluster local: it is for SLURM")
        if command != "convert":
            ignored["cpus_per_task"] = (
                "has no effect with --cluster local; use train.threads or --threads"
            )
    if args.cluster == "debug":
        others = given - set(DEBUG_TAKES)
        ignored |= dict.fromkeys(
            others, "has no effect with --cluster debug: one process, this one"
        )
    if args.dry_run:
        ignored |= dict.fromkeys(
            ("follow", "parsable"), "has no effect with --dry-run: no job is submitted"
        )
    if args.mem_gib:
        ignored["mem"] = "and --mem-gib say the same; give one of them"
    if args.cpu and args.gpus_per_node.count:
        ignored["cpu"] = f"contradicts --gpus-per-node {args.gpus_per_node.count}"
    for name in sorted(given & set(ignored)):
        raise UserError(f"--{name.replace('_', '-')} {ignored[name]}")
    if args.gpus_per_node.count and command not in USES_GPU:
        raise UserError(f"--gpus-per-node: {command} uses no GPU; leave it out")


def resources_from(args: argparse.Namespace, command: str) -> Resources:
    """What the command's own job asks for. Raises `UserError`."""
    options = [parse_sbatch_option(text) for text in args.sbatch]
    values: dict[str, Any] = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "time": DEFAULT_TIME.get("train" if command == "chain" else command, OTHER_TIME),
        "mem": args.mem,
        "cpus_per_task": args.cpus_per_task,
    }
    if args.time is not None:
        values["time"] = slurm_time(args.time)
    given = {
        name: value
        for name, value in values.items()
        if getattr(args, name) not in (None, "", DEFAULT_CPUS)
    }
    for text, (name, value) in zip(args.sbatch, options, strict=True):
        field = name.replace("-", "_")
        if field in values and value is not None:
            wanted = read_resource(name, value, f"--sbatch {name}")
            if given.get(field) not in (None, wanted):
                raise UserError(f"--sbatch {text}: contradicts --{name} {given[field]}")
            values[field] = wanted
    extra = [
        format_option(option) for option in options if option[0].replace("-", "_") not in values
    ]
    extra += [format_option(parse_plugin_option(text)) for text in args.sbatch_plugin]
    if args.signal >= time_seconds(values["time"]):
        raise UserError(
            f"--signal {args.signal}: the job would be stopped at once; its limit is {values['time']}"
        )
    return Resources(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node.count,
        gpu_type=args.gpus_per_node.kind,
        tasks_per_node=args.tasks_per_node,
        mem_gib=args.mem_gib,
        extra=tuple(extra),
        signal_s=args.signal,
        distribution=args.distribution,
        cpu_bind=args.cpu_bind,
        gpu_bind=args.gpu_bind,
        **values,
    )


def read_resource(name: str, text: str, option: str) -> str | int:
    """The value of a resource that `--sbatch` or `--stage-option` gives. Raises `UserError`."""
    try:
        if name == "time":
            return slurm_time(text, option)
        if name == "mem":
            return parse_memory(text, option)
        return positive(text) if name == "cpus-per-task" else plain_text(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{option}: {error}") from None


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number, at least 1")
    return int(text)


def not_negative(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text}: a whole number, 0 or more")
    return int(text)


def gpus(text: str) -> Any:
    return _as_argument(parse_gpus, text)


def memory(text: str) -> Any:
    return _as_argument(parse_memory, text)


def _as_argument(parse: Any, text: str) -> Any:
    """argparse puts the option's name in front."""
    try:
        return parse(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def plain_text(text: str) -> str:
    """A value for a line of the job file."""
    if not text or not text.isprintable() or text != text.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r}: empty, or with spaces or control characters at its ends"
        )
    return text


def job_name(text: str) -> str:
    """It becomes a file name, and % is a pattern of SLURM's."""
    if not re.fullmatch(r"[^\s/%]+", text) or not text.isprintable() or text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r}: a job's name has no spaces, /, % or leading -")
    return text


def job_ids(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?(:[0-9]+(_[0-9]+)?)*", text):
        raise argparse.ArgumentTypeError(
            f"{text}: a job id, e.g. 1234 or 1234_0, several joined by ':'"
        )
    return text


SET_BY_LAUNCH = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)


def assignment(text: str) -> str:
    """NAME=VALUE for the environment of the ranks."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or not value.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: a variable is written NAME=VALUE")
    if name in SET_BY_LAUNCH or name.startswith("SLURM_"):
        raise argparse.ArgumentTypeError(f"{name}: is set by launch or SLURM")
    return text
