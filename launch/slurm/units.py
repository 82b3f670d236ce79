"""Time limits, memory sizes and GPU counts in SLURM's notation and in common others."""

import re
from dataclasses import dataclass

from liverseg_dist.errors import UserError

TIME_FORMS = "24h, 90m, 2d, 90 (minutes), H:MM:SS, D-HH or D-HH:MM:SS"
GPU_FORMS = "4, a100:4 or gpu:a100:4"


@dataclass(frozen=True)
class GpuRequest:
    """GPUs of each node."""

    count: int
    model: str = ""
    """SLURM's name of the GPU model, e.g. a100; empty: any."""


def parse_time_limit(text: str, option: str = "--time") -> str:
    """Convert a time limit to SLURM's notation.

    H:MM is refused, because SLURM reads 24:00 as 24 minutes.

    Args:
        text: The time limit in one of `TIME_FORMS`.
        option: The option to name in the error message.

    Raises:
        UserError: The text is not a time limit, is ambiguous, or is zero.
    """
    if match := re.fullmatch(r"([0-9]+)([mhd]?)", text):
        minutes = int(match[1]) * {"": 1, "m": 1, "h": 60, "d": 1440}[match[2]]
        if minutes == 0:
            raise UserError(f"{option} {text}: the time limit must be at least one minute")
        return f"{minutes // 60:02}:{minutes % 60:02}:00"
    if re.fullmatch(
        r"[0-9]+:[0-5][0-9]:[0-5][0-9]|[0-9]+-([01]?[0-9]|2[0-3])(:[0-5][0-9]){0,2}", text
    ):
        if not re.search("[1-9]", text):
            raise UserError(f"{option} {text}: the time limit must be at least one minute")
        return text
    if re.fullmatch("[0-9]+:[0-9]+", text):
        raise UserError(
            f"{option} {text}: could be hours or minutes; write {text}:00 or 24h, 90m, 2d"
        )
    raise UserError(f"{option} {text}: a time limit is written {TIME_FORMS}")


def time_to_seconds(time: str) -> int:
    """Seconds of a time limit in SLURM's notation, `H:MM:SS` or `D-HH[:MM[:SS]]`."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")] + [0, 0]
    return int(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def shorter_time(one: str, other: str) -> str:
    """The shorter of two time limits in SLURM's notation."""
    return one if time_to_seconds(one) <= time_to_seconds(other) else other


def parse_memory(text: str, option: str = "--mem") -> str:
    """Convert a memory size to SLURM's notation.

    Accepted are `64G`, `64GB`, `64 GiB`, `64000M`, `64000` (MB, as in SLURM) and `0` (all memory
    of the node).

    Raises:
        UserError: The text is not a memory size.
    """
    match = re.fullmatch(r"([0-9]+)\s?(?:([KMGT])(?:i?B)?)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(
            f"{option} {text}: memory per node is written 64G, 64000M or 0 (all of the node)"
        )
    return f"{int(match[1])}{(match[2] or '').upper()}"


def parse_gpus(text: str, option: str = "--gpus-per-node") -> GpuRequest:
    """A number of GPUs, with or without SLURM's name of the model. Raises `UserError`."""
    # re.ASCII: without letters and digits of other scripts.
    match = re.fullmatch(r"(?:gpu:)?(?:([A-Za-z][\w.-]*):)?([0-9]+)", text.strip(), re.ASCII)
    if match is None or match[1] == "gpu":
        raise UserError(
            f"{option} {text}: the number of GPUs per node is written {GPU_FORMS}; 0: none"
        )
    count = int(match[2])
    return GpuRequest(count, match[1] or "" if count else "")
