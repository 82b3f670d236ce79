"""Options that several commands share."""

import argparse
import sys

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.distributed.world import World
from liverseg_dist.texts.paths import path_argument

MOST_THREADS = 8


def add_settings(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` (repeatable), `--print-config`, and dotted overrides as the last positionals."""
    parser.add_argument(
        "--config",
        action="append",
        type=path_argument,
        default=[],
        metavar="FILE",
        help="YAML of differences; repeatable",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and stop"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings for this call, e.g. train.learning_rate=1e-3",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """What evaluate and predict share: which weights, which device, how ranks wait."""
    parser.add_argument(
        "--weights",
        choices=("last", "best", "both"),
        default="last",
        help="last (default), best on validation, or the average of what both say",
    )
    parser.add_argument(
        "--ensemble",
        type=path_argument,
        action="append",
        default=[],
        metavar="RUN",
        help="average with this run; repeatable",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="default: a GPU if there is one",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="windows side by side on a CPU; more need more memory (default: the rank's share of cores, up to 8)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=86400.0,
        metavar="S",
        help="seconds ranks wait for the slowest (86400)",
    )


def window_threads(args: argparse.Namespace, world: World) -> int:
    """Threads that compute windows: `--threads`, or this rank's share of the cores up to `MOST_THREADS`."""
    return args.threads or min(world.cores, MOST_THREADS)


def settings_from(args: argparse.Namespace) -> Settings:
    """The resolved settings; with `--print-config` prints them and exits 0."""
    settings = load_settings(args.config, args.overrides)
    if args.print_config:
        print(settings.to_yaml(), end="")
        sys.exit(0)
    return settings
