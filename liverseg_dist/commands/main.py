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
from liverseg_dist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    LiversegError,
    os_error_line,
)

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
    "quantify": "measure masks: volumes, burden, each lesion's diameters",
    "follow": "follow a patient over several scans: growth, new lesions, RECIST 1.1",
    "score": "score any folder of NIfTI masks against the truth",
    "report": "make report.html again from a finished evaluation",
    "compare": "compare two evaluations case by case, with a paired test",
    "settings": "tell what can be set: defaults, choices, meaning",
    "doctor": "tell what this machine has and what would go wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `liverseg_dist.errors`)."""
    restrict_umask()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(
            argv or ["--help"]
        )  # prints help or version, or refuses the command with the choices
        return EXIT_DONE
    name = argv[0]
    module = importlib.import_module(f"liverseg_dist.commands.{name}")
    command = argparse.ArgumentParser(
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
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("liverseg: interrupted; run the same line again to continue", file=sys.stderr)
        return EXIT_RESUMABLE
    except BrokenPipeError:  # the reader (head, less) went away; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        print(f"liverseg: {os_error_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(result, dict) and result.get("error"):
        _tell_torchrun(str(result["error"]))
    if args.json:
        print(json.dumps(result if result is not None else {}), flush=True)
    return int(result.get("exit_code", EXIT_DONE)) if isinstance(result, dict) else EXIT_DONE


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
