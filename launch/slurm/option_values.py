"""The values of `launch` options: functions for argparse's `type=`, and sbatch resources.

Each function raises `argparse.ArgumentTypeError`; argparse puts the name of the option before its
text.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

from liverseg_dist.errors import UserError

from .units import parse_gpus, parse_memory, parse_time_limit

SET_BY_LAUNCH = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)
"""Environment variables that --env must not change."""


def positive_int(text: str) -> int:
    """A whole number, at least 1."""
    # int() would also accept signs, underscores and digits of other scripts.
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number, at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """A whole number, 0 or more."""
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text}: a whole number, 0 or more")
    return int(text)


def gpu_request(text: str) -> Any:
    """GPUs per node, as a `GpuRequest`."""
    return _parse_as_argument(parse_gpus, text)


def memory_size(text: str) -> Any:
    """Memory per node in SLURM's form."""
    return _parse_as_argument(parse_memory, text)


def _parse_as_argument(parse: Callable[[str, str], Any], text: str) -> Any:
    """Call the parser without an option name, which argparse adds itself."""
    try:
        return parse(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def printable_text(text: str) -> str:
    """A value that can be written on one line of a batch file."""
    # A line break would add another option to the batch file.
    if not text or not text.isprintable() or text != text.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r}: empty, or with spaces or control characters at its ends"
        )
    return text


def job_name(text: str) -> str:
    """A job name: it becomes a file name, and SLURM replaces patterns that begin with %."""
    if not re.fullmatch(r"[^\s/%]+", text) or not text.isprintable() or text.startswith("-"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: a job name contains no spaces, / or %, and does not begin with -"
        )
    return text


def job_ids(text: str) -> str:
    """One or more job ids for a dependency."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?(:[0-9]+(_[0-9]+)?)*", text):
        raise argparse.ArgumentTypeError(
            f"{text}: a job id, e.g. 1234 or 1234_0; join several with ':'"
        )
    return text


def environment_assignment(text: str) -> str:
    """NAME=VALUE for the environment of the ranks."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or not value.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: write a variable as NAME=VALUE")
    # These describe the rank; another value would break the rendezvous.
    if name in SET_BY_LAUNCH or name.startswith("SLURM_"):
        raise argparse.ArgumentTypeError(f"{name}: is set by launch or SLURM")
    return text


def parse_resource(name: str, text: str, option: str) -> str | int:
    """The value of a resource that `--sbatch` or `--stage-option` sets.

    Args:
        name: The resource, e.g. time, mem, cpus-per-task or partition.
        text: Its value as given.
        option: The option to name in the error message.

    Raises:
        UserError: The value is not valid for this resource.
    """
    try:
        if name == "time":
            return parse_time_limit(text, option)
        if name == "mem":
            return parse_memory(text, option)
        if name == "cpus-per-task":
            return positive_int(text)
        return printable_text(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{option}: {error}") from None
