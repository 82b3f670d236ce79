"""Submit a liverseg command to SLURM; stopped by preemption, a time limit or a dead node, it continues by itself.

  python -m launch train --nodes 2 --gpus-per-node 4 --time 24h --partition gpu \\
      --config configs/task03_S.yaml data.store=STORE run.dir=runs/first train.global_batch_size=8
  python -m launch train --dry-run --nodes 2 ...          print the batch file and stop
  python -m launch train --array folds --config ... data.store=STORE run.dir=runs/cv       also: 0-2, 1,3, folds%2
  python -m launch convert Task03_Liver STORE --config ... --array 8                       also: 8%4
  python -m launch chain Task03_Liver STORE --config ... run.dir=runs/first \\
      --gpus-per-node 2 --partition gpu --cpu-partition cpu      convert (on a CPU node), train, evaluate
  python -m launch evaluate runs/first --store STORE --source Task03_Liver --after 1234
  python -m launch tune --nodes 4 --config configs/sweep.yaml data.store=STORE run.dir=runs/sweep
  python -m launch doctor --nodes 2 --folder runs         try the nodes, network and file system first
  python -m launch status|logs|cancel runs/first

COMMAND is any liverseg command, tune, or chain; the options below may stand anywhere, all others are the command's own
(so are all after --): liverseg COMMAND --help. Batch file, records and logs go to the run's folder, which must be on a
shared file system: job.sbatch there can be submitted again by hand. One task per GPU, or --tasks-per-node.
An option that the command or one of its jobs would ignore is refused.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, LiversegError, UserError
from liverseg_dist.files import check_working_directory, restrict_umask
from liverseg_dist.streams import guard_output_streams

from . import PACKAGE, PROGRAM, name_programs
from .slurm import status
from .slurm.launch_options import (
    build_parser,
    given_options,
    option_strings,
    parse_options,
    refuse_ignored,
    resources_from,
    suggest_option,
)

OVER_RUNS = ("status", "logs", "cancel")


def build_help_parser() -> argparse.ArgumentParser:
    """The options of launch, with the help text of the whole program."""
    made = build_parser()
    made.usage = f"{PROGRAM} COMMAND [options] [the command's arguments]"
    made.description = name_programs(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    return made


def split_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """(our options, the command, its arguments)."""
    ours, rest = _split_at_dashes(argv)
    args, unknown = parse_options(ours)
    form = f"{PROGRAM} COMMAND [options]"
    if not unknown:
        raise UserError(f"no command; it goes: {form} (see --help)")
    if unknown[0].startswith("-"):
        guess = suggest_option(unknown[0], option_strings(build_parser()))
        raise UserError(f"{unknown[0]} is no option of launch{guess}; it goes: {form} (see --help)")
    return args, unknown[0], [*unknown[1:], *rest]


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _find_run_command(words: Sequence[str]) -> str:
    """status, logs or cancel, where the line has options before it; otherwise an empty text."""
    _, unknown = parse_options(words)
    others = [word for word in unknown if not word.startswith("-")]
    if unknown and not unknown[0].startswith("-"):
        others = others[:1]
    # Options of these commands may take a value, which then stands first.
    return next((word for word in others if word in OVER_RUNS), "")


def run(argv: Sequence[str] | None = None) -> int:
    restrict_umask()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        check_working_directory()
        if words and words[0] in OVER_RUNS:
            return status.run(words[0], words[1:])
        ours, _ = _split_at_dashes(words)
        if {"-h", "--help"} & set(ours):
            build_help_parser().print_help()
            return EXIT_DONE
        if command := _find_run_command(ours):
            at = words.index(command)
            return status.run(command, [*words[:at], *words[at + 1 :]])
        args, command, arguments = split_arguments(words)
        given = given_options(ours)
        refuse_ignored(command, given, args)
        resources = resources_from(args, command)
        args.gpus_are_chosen = bool(given & {"gpus_per_node", "cpu"})
        # By name, as torch comes with it: --help and status answer at once.
        name = "diagnose.doctor" if command == "doctor" else "slurm.submit"
        module: Any = importlib.import_module(f"{PACKAGE}.{name}")
        return int(module.submit_command(args, resources, command, arguments))
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


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(run())
