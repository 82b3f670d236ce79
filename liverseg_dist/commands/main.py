"""Entry point of the command line: `liverseg COMMAND`, the same as `python -m liverseg_dist COMMAND`.

Each command is a module of this package with `add_arguments(parser)` and `run(args) -> dict | None`. The dict is the
result of the command: `--json` prints it as the last line of stdout. Only the module of the called command is
imported, because importing torch would delay `--help` by seconds.

Outside of this package, only this module may be imported (`tests/test_architecture.py`).
"""

import argparse
import atexit
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from liverseg_dist import __version__
from liverseg_dist.console import show_progress_lines, write_error
from liverseg_dist.cores import make_threads_wait_passively
from liverseg_dist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    LiversegError,
    UserError,
    os_error_line,
)
from liverseg_dist.files import check_working_directory, restrict_umask
from liverseg_dist.interrupts import (
    INTERRUPTED_MESSAGE,
    InterruptHandler,
    handle_interrupts,
    is_first_rank,
)
from liverseg_dist.logging_setup import choose_level, set_up_logging
from liverseg_dist.streams import guard_output_streams, output_failure, print_checked
from liverseg_dist.texts.suggestions import SuggestingParser, suggest_name

_logger = logging.getLogger(__name__)
COMMANDS = {
    "phantom": "make a synthetic data set: CT, MR or both, with labels",
    "convert": "clean CT scans and write the Zarr store (also: tools/to_zarr)",
    "denoiser": "train a small denoiser on noisy CTs, for convert.cleaning.noise=autoencoder",
    "verify": "check the checksums and the metadata of a store",
    "index": "add the loading index to a store of an earlier version",
    "preview": "draw the samples that training gets: as stored and augmented, with labels",
    "plan": "plan a training for a data set or a GPU; efficiency on many GPUs",
    "nnunet": "make a run of a network that nnU-Net v2 trained",
    "train": "train a 3D U-Net; run the same line again to continue",
    "evaluate": "score a run on its test or validation cases, exactly, on any number of ranks",
    "postprocess": "choose the post-processing of a run on its validation cases",
    "predict": "segment scans; each mask is on the grid of its scan",
    "quantify": "measure masks: volumes, burden, diameters of each lesion",
    "follow": "follow a patient over several scans: growth, new lesions, RECIST 1.1",
    "to-nifti": "write a DICOM series as NIfTI, or list the series of a folder",
    "score": "score a folder of NIfTI masks against the truth",
    "report": "write report.html again from a finished evaluation",
    "compare": "compare two evaluations case by case, with a paired test",
    "demo": "phantoms, conversion, training, evaluation and report (also: tools/demo)",
    "settings": "list all settings with default, choices and meaning",
    "doctor": "check this machine: packages, GPUs, memory, disk",
}
"""Name of each command (a module of this package, with `_` for `-`) -> its summary in `liverseg --help`."""
EXIT_CODES = "exit codes: 0 done, 1 failed, 2 a mistake in the call, 75 stopped on request (run again to continue)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and arguments; None for the command line of the process, whose streams and signals are
            set up as well.

    Returns:
        The exit code (see `liverseg_dist.errors`).
    """
    handler = None
    # Before anything else, so that a mistake in the command line has the same form as every other
    # error.
    set_up_logging()
    if argv is None:
        guard_output_streams()
        handler = handle_interrupts()
    try:
        return _parse_and_run(argv, handler)
    except KeyboardInterrupt:
        if is_first_rank():
            write_error(INTERRUPTED_MESSAGE)
        return EXIT_RESUMABLE


def _parse_and_run(argv: Sequence[str] | None, handler: InterruptHandler | None) -> int:
    restrict_umask()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not argv or argv[0] not in COMMANDS:
        # A wrong command is answered at once; the parsers of the commands import torch.
        if argv and (close := suggest_name(argv[0], list(COMMANDS))) is not None:
            parser.error(
                f"argument COMMAND: no command '{argv[0]}'; did you mean '{close}'? "
                f"All: {', '.join(COMMANDS)}"
            )
        # Prints help or version, or refuses the command with a list of all commands.
        parser.parse_args(argv or ["--help"])
        return EXIT_DONE
    name = argv[0]
    try:
        # A deleted working directory makes many libraries fail with errors that do not name the
        # cause.
        check_working_directory()
    except UserError as error:
        write_error(error)
        return error.exit_code
    make_threads_wait_passively()  # must happen before the command imports torch
    module = _import_command(name)
    command = SuggestingParser(
        prog=f"liverseg {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    add_command_arguments(name, command)
    # Intermixed: settings KEY=VALUE may stand before or behind options.
    args = command.parse_intermixed_args(argv[1:])
    _set_verbosity(args)
    if handler:
        handler.work_has_begun = True
    return _run(module, args)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has: `--json`, `--quiet` and `--verbose`."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on the last line"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quiet", action="store_true", help="print results, warnings and errors only"
    )
    group.add_argument(
        "--verbose", action="store_true", help="also print details, as `debug: ...` on stderr"
    )


def _set_verbosity(args: argparse.Namespace) -> None:
    set_up_logging(choose_level(quiet=args.quiet, verbose=args.verbose))
    show_progress_lines(not args.quiet)


def add_command_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command to a parser, with those that all commands have.

    `launch` checks command lines with it before it submits them.

    Args:
        name: a key of `COMMANDS`.
    """
    add_output_options(parser)
    _import_command(name).add_arguments(parser)


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its exit code, after all exit functions but before C++ destructors.

    Destructors of torch, gloo and DeepSpeed sometimes abort a rank whose work is done ("terminate called without an
    active exception"). torchrun and SLURM would then report a finished job as failed.
    """
    status = 1

    def exit_at_once() -> None:
        for stream in (sys.stdout, sys.stderr):
            # A closed stream must not change the exit code; `main` may not have guarded the streams.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)

    # Exit functions run in reverse order of registration, so this one runs last.
    atexit.register(exit_at_once)
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)


def _import_command(name: str) -> ModuleType:
    return importlib.import_module(f"liverseg_dist.commands.{name.replace('-', '_')}")


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    # Where the code comes from is the first question when two installations behave differently.
    _logger.debug("liverseg_dist %s in %s", __version__, Path(__file__).parents[1])
    begin_s = time.monotonic()
    try:
        result = module.run(args)
        _logger.debug("the command took %.2f s", time.monotonic() - begin_s)
    except LiversegError as error:
        write_error(error)
        _write_torchrun_error(str(error))
        if args.json:
            print_checked(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    except OSError as error:
        write_error(os_error_line(error))
        # Errors of the system, such as a full disk, need no traceback: the line names the file.
        return EXIT_FAILED
    if isinstance(result, dict) and result.get("error"):
        _write_torchrun_error(str(result["error"]))
    code = int(result.get("exit_code", EXIT_DONE)) if isinstance(result, dict) else EXIT_DONE
    return _report_result(args.json, result, code)


def _report_result(as_json: bool, result: object, code: int) -> int:
    """Print the result if `--json` was given. Returns the exit code of the command.

    The work is done at this point, so a missing reader or a full disk does not change the exit code. The JSON line
    is the exception: a program waits for it, and a file without the line must not count as success.
    """
    # The line must be complete: a program reads it.
    if as_json and (failure := print_checked(json.dumps(result if result is not None else {}))):
        write_error(
            f"the result could not be written to stdout: {failure}; the work itself is done"
        )
        return code or EXIT_FAILED
    if failure := output_failure():
        write_error(f"warning: part of the output to stdout is lost: {failure}")
    return code


def _write_torchrun_error(line: str) -> None:
    """Write the reason to the file that torchrun reads for the summary at the end of its log."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torchrun's format; it prints the message of the rank that failed first.
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump(content, stream)


def _top_parser() -> argparse.ArgumentParser:
    # The parsers of the commands would import torch, so the list is written from the table.
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="liverseg",
        description="Segmentation of organs and lesions on CT and MR, from NIfTI files to exact Dice, on one "
        "machine or a cluster.",
        epilog=f"commands:\n{listing}\n\nOptions of a command: liverseg COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liverseg_dist {__version__}")
    parser.add_argument(
        "command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below"
    )
    return parser
