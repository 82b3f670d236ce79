"""`liverseg COMMAND`, the same as `python -m liverseg_dist COMMAND`.

Each command is a module of this folder with `add_arguments(parser)` and `run(args) -> dict | None`. The dict is the
command's result: `--json` prints it as the last line of stdout. Modules are loaded by name, only the one that runs, so
that `--help` answers at once instead of importing torch.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence

from liverseg_dist import __version__
from liverseg_dist.cores import make_threads_wait_passively
from liverseg_dist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    LiversegError,
    UserError,
    os_error_line,
)
from liverseg_dist.files import check_working_directory
from liverseg_dist.interrupts import (
    INTERRUPTED_MESSAGE,
    InterruptHandler,
    handle_interrupts,
    is_first_rank,
)
from liverseg_dist.logging_setup import set_up_logging
from liverseg_dist.streams import guard_output_streams, output_failure, print_checked
from liverseg_dist.texts.suggestions import SuggestingParser, suggest

COMMANDS = {
    "phantom": "make a synthetic Task03-layout data set",
    "convert": "clean CT scans and write the Zarr store (also: tools/to_zarr)",
    "denoiser": "train a small denoiser on noisy CTs, for convert.cleaning.noise=autoencoder",
    "verify": "check every checksum and promise of a store",
    "preview": "draw what a run would feed the network: samples, augmented, with labels",
    "plan": "which patch, batch and strategy fit a GPU; efficiency on many",
    "train": "train a 3D U-Net; run again to continue",
    "evaluate": "score a run on its test or validation cases, exactly, on any number of ranks",
    "postprocess": "choose a run's post-processing on its validation cases, cross-validated",
    "predict": "segment scans; masks lie on each scan's own grid",
    "score": "score any folder of NIfTI masks against the truth",
    "report": "make report.html again from a finished evaluation",
    "compare": "compare two evaluations case by case, with a paired test",
    "demo": "phantoms, conversion, training, evaluation and report in one go (also: tools/demo)",
    "settings": "tell what can be set: defaults, choices, meaning",
    "doctor": "tell what this machine has and what would go wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `liverseg_dist.errors`).

    Without `argv` it is the process's own command line, and the process's streams and signals are set up for it.
    """
    handler = None
    set_up_logging()
    if argv is None:
        guard_output_streams()
        handler = handle_interrupts()
    try:
        return _parse_and_run(argv, handler)
    except KeyboardInterrupt:
        if is_first_rank():
            print(f"liverseg: {INTERRUPTED_MESSAGE}", file=sys.stderr)
        return EXIT_RESUMABLE


def _parse_and_run(argv: Sequence[str] | None, handler: InterruptHandler | None) -> int:
    restrict_umask()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not argv or argv[0] not in COMMANDS:
        if argv and (close := suggest(argv[0], list(COMMANDS))) is not None:
            parser.error(
                f"argument COMMAND: no command '{argv[0]}'; did you mean '{close}'? All: {', '.join(COMMANDS)}"
            )
        parser.parse_args(
            argv or ["--help"]
        )  # prints help or version, or refuses the command with the choices
        return EXIT_DONE
    name = argv[0]
    try:
        check_working_directory()
    except UserError as error:
        print(f"liverseg: {error}", file=sys.stderr)
        return error.exit_code
    make_threads_wait_passively()  # before the command imports torch
    module = importlib.import_module(f"liverseg_dist.commands.{name}")
    command = SuggestingParser(
        prog=f"liverseg {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 failed, 2 a mistake in the call, 75 stopped on request (run again to continue)",
    )
    command.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on the last line"
    )
    module.add_arguments(command)
    args = command.parse_intermixed_args(argv[1:])
    if handler:
        handler.work_has_begun = True
    return _run(module, args)


def restrict_umask() -> None:
    """Nothing this process makes is writable for everybody, whatever the umask it was started with. Groups share runs,
    so their bit stays as the user has it."""
    os.umask(os.umask(0o077) | 0o002)  # it can only be read by setting it


def _run(module: object, args: argparse.Namespace) -> int:
    try:
        result = module.run(args)  # type: ignore[attr-defined]
    except LiversegError as error:
        print(f"liverseg: {error}", file=sys.stderr)
        _tell_torchrun(str(error))
        if args.json:
            print_checked(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    except OSError as error:
        print(f"liverseg: {os_error_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(result, dict) and result.get("error"):
        _tell_torchrun(str(result["error"]))
    code = int(result.get("exit_code", EXIT_DONE)) if isinstance(result, dict) else EXIT_DONE
    return _report_result(args.json, result, code)


def _report_result(as_json: bool, result: object, code: int) -> int:
    """Print the result where it was asked for. Returns the command's exit code.

    The work is done by now, so output that nobody reads, or that a full disk has refused, does not change the code.
    The JSON line is the exception: a program waits for it, and a file without it must not pass for success.
    """
    if as_json and (failure := print_checked(json.dumps(result if result is not None else {}))):
        line = f"the result could not be written to stdout: {failure}; the work itself is done"
        print(f"liverseg: {line}", file=sys.stderr)
        return code or EXIT_FAILED
    if failure := output_failure():
        print(
            f"liverseg: warning: part of the output to stdout is lost: {failure}", file=sys.stderr
        )
    return code


def _tell_torchrun(line: str) -> None:
    """torchrun ends the log with its own account of the failure, which has the reason if it finds it in this file."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump(content, stream)


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="liverseg",
        description="Liver-tumour segmentation on CT, from NIfTI to exact Dice, on one machine or a cluster.",
        epilog=f"commands:\n{listing}\n\nliverseg COMMAND --help tells each one's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liverseg_dist {__version__}")
    parser.add_argument(
        "command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below"
    )
    return parser
