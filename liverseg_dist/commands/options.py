"""Options that several commands share."""

import argparse
import sys

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.console import write_lines
from liverseg_dist.distributed.world import World
from liverseg_dist.texts.paths import path_argument

MAX_THREADS = 8
"""Default limit of windows at the same time: each needs the memory of a network's output."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` (repeatable), `--print-config`, and dotted overrides as the last
    positionals."""
    parser.add_argument(
        "--config",
        action="append",
        type=path_argument,
        default=[],
        metavar="FILE",
        help="YAML file with differences from the defaults; repeatable, the last one wins",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and exit"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings for this call, e.g. train.learning_rate=1e-3",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the options of evaluate, predict and postprocess: weights, ensemble, device, threads,
    timeout."""
    parser.add_argument(
        "--weights",
        choices=("last", "best", "both"),
        default="last",
        help="weights after the last step (default), the best on validation, or the mean "
        "of both predictions",
    )
    parser.add_argument(
        "--ensemble",
        type=path_argument,
        action="append",
        default=[],
        metavar="RUN",
        help="average the probabilities with those of this run; repeatable",
    )
    add_device(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="windows at the same time on a CPU; each needs memory (default: the cores of "
        f"this rank, up to {MAX_THREADS})",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=86400.0,
        metavar="S",
        help="seconds that ranks wait for the slowest one (default: 86400)",
    )


def add_channels(parser: argparse.ArgumentParser) -> None:
    """Add `--channel NAME=PATH`, for commands that segment scans."""
    parser.add_argument(
        "--channel",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="for runs of several channels: file (or folder) of a channel, e.g. T2=t2.nii.gz; "
        "repeat it for each channel, instead of names that end in _0000, _0001, ...",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device auto|cpu|cuda`."""
    # On a CPU build `auto` and `cpu` are the same, so that config files and scripts work on both.
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="device of the network (default: auto, a GPU if there is one)",
    )


def window_threads(args: argparse.Namespace, world: World) -> int:
    """Return how many windows to compute at the same time: `--threads`, or this rank's cores up to
    `MAX_THREADS`."""
    # More threads than cores make each window slower and need more memory.
    return args.threads or min(world.cores, MAX_THREADS)


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the resolved settings. With `--print-config` print them and exit with code 0."""
    settings = load_settings(args.config, args.overrides)
    # The text ends with a line break already, and the console adds one.
    if args.print_config:
        write_lines(settings.to_yaml().removesuffix("\n"))
        sys.exit(0)
    return settings
