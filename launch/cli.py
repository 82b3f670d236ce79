"""Submit a liverseg command to SLURM. After a preemption, a time limit or a dead node it continues.

  python -m launch train --nodes 2 --gpus-per-node 4 --time 24h --partition gpu \\
      --config configs/task03_S.yaml data.store=STORE run.dir=runs/first \\
      train.global_batch_size=8
  python -m launch train --dry-run --nodes 2 ...          print the batch file and stop
  python -m launch train --array folds --config ... data.store=STORE run.dir=runs/cv
                                                          folds: also 0-2, 1,3 or folds%2
  python -m launch convert Task03_Liver STORE --config ... --array 8       tasks: also 8%4
  python -m launch chain Task03_Liver STORE --config ... run.dir=runs/first \\
      --gpus-per-node 2 --partition gpu --cpu-partition cpu
                                                          convert (on a CPU node), train, evaluate
  python -m launch evaluate runs/first --store STORE --source Task03_Liver --after 1234
  python -m launch tune --nodes 4 --config configs/sweep.yaml data.store=STORE run.dir=runs/sweep
  python -m launch doctor --nodes 2 --job-dir runs        test nodes, network and file system first
  python -m launch status|logs|cancel runs/first

COMMAND is any liverseg command, tune, or chain. The options below may stand anywhere on the line;
all other options belong to the command (as do all after --): liverseg COMMAND --help. Batch file,
records and logs are written to the folder of the run, which must be on a shared file system; submit
job.sbatch there again by hand if needed. Each GPU gets one task, unless --tasks-per-node is given.
An option that the command or one of its jobs would ignore is refused.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from liverseg_dist.commands.main import COMMANDS
from liverseg_dist.console import write_error
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, LiversegError, UserError
from liverseg_dist.files import check_working_directory, restrict_umask
from liverseg_dist.logging_setup import set_up_logging
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.suggestions import suggest_name

from . import PACKAGE, PROGRAM, name_programs
from .slurm import status
from .slurm.launch_options import (
    FOLDER_IS_DEPRECATED,
    build_parser,
    list_given_options,
    parse_options,
)
from .slurm.option_parser import list_option_strings, suggest_option
from .slurm.option_rules import build_resources, refuse_ignored_options

NAME = "launch"
"""Name before errors. It is the same in a checkout and in a wheel, because scripts match it."""
STATUS_COMMANDS = ("status", "logs", "cancel")
OWN_COMMANDS = ("tune", "chain", "doctor", *STATUS_COMMANDS)
"""Commands that only launch has, or that it replaces."""
CALL = f"{PROGRAM} COMMAND [options]"


def build_help_parser() -> argparse.ArgumentParser:
    """The options of launch, with the help text of the whole program."""
    parser = build_parser()
    parser.usage = f"{CALL} [the command's arguments]"
    parser.description = name_programs(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def split_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Split a command line.

    Returns:
        The options of launch, the command, and the arguments of the command.

    Raises:
        UserError: The line has no command, or an unknown option before it.
    """
    before_dashes, after_dashes = _split_at_dashes(argv)
    args, rest = parse_options(before_dashes)
    if not rest:
        raise UserError(f"no command; write {CALL} (see --help)")
    if rest[0].startswith("-"):
        guess = suggest_option(rest[0], list_option_strings(build_parser()))
        raise UserError(f"{rest[0]} is not an option of launch{guess}; write {CALL} (see --help)")
    return args, rest[0], [*rest[1:], *after_dashes]


def check_command(command: str) -> None:
    """Raise `UserError` for an unknown command, with the nearest known one."""
    # Some commands, such as doctor, are in both.
    known = list(dict.fromkeys((*COMMANDS, *OWN_COMMANDS)))
    if command in known:
        return
    close = suggest_name(command, known)
    guess = f"; did you mean {close}?" if close else ""
    raise UserError(f"{command}: no such command{guess}; one of {', '.join(known)}")


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _find_status_command(words: Sequence[str]) -> str:
    """status, logs or cancel, if options stand before it; otherwise an empty text."""
    _, rest = parse_options(words)
    candidates = [word for word in rest if not word.startswith("-")]
    if rest and not rest[0].startswith("-"):
        candidates = candidates[:1]
    # Options of these commands may take a value, which then stands first.
    for word in candidates:
        if word in STATUS_COMMANDS:
            return word
    return ""


def run(argv: Sequence[str] | None = None) -> int:
    """Run launch; returns the exit code."""
    if argv is None:
        # Here and not below `__main__`, because the script `liverseg-launch` of a wheel calls `run`.
        guard_output_streams()
    restrict_umask()
    set_up_logging()
    set_up_logging(package=PACKAGE)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        check_working_directory()
        return _run_command(words)
    except LiversegError as error:
        write_error(error, NAME)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        write_error(f"{where}{error.strerror or error}", NAME)
        return EXIT_FAILED
    except KeyboardInterrupt:
        write_error("stopped watching; submitted jobs continue", NAME)
        return EXIT_USER


def _run_command(words: list[str]) -> int:
    """Run the command of the line; returns the exit code."""
    if words and words[0] in STATUS_COMMANDS:
        return status.run(words[0], words[1:])
    before_dashes, _ = _split_at_dashes(words)
    if {"-h", "--help"} & set(before_dashes):
        build_help_parser().print_help()
        return EXIT_DONE
    if command := _find_status_command(before_dashes):
        # The options before the command are those of status, logs or cancel.
        at = words.index(command)
        return status.run(command, [*words[:at], *words[at + 1 :]])
    args, command, arguments = split_arguments(words)
    check_command(command)
    given = list_given_options(before_dashes)
    refuse_ignored_options(command, given, args)
    resources = build_resources(args, command)
    args.gpus_are_chosen = bool(given & {"gpus_per_node", "cpu"})
    if "folder" in given:
        write_error(FOLDER_IS_DEPRECATED, NAME)
    # Imported by name, because it imports torch: --help and status answer at once.
    name = "diagnose.doctor" if command == "doctor" else "slurm.submit"
    module: Any = importlib.import_module(f"{PACKAGE}.{name}")
    return int(module.submit_command(args, resources, command, arguments))


if __name__ == "__main__":
    sys.exit(run())
