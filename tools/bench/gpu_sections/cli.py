"""A quarter of an hour on one GPU answers what a CPU cannot: speed, memory, waits, equal bytes.

  tools/bench/gpu --out gpu.jsonl                 all sections, at most 8 minutes on one H200
  tools/bench/gpu --out gpu.jsonl --only steps    one section; its lines are appended to the file
  tools/bench/gpu --list                          the sections, with their time limits
  tools/bench/gpu --table gpu.jsonl               only print the table of a file again
  tools/bench/gpu --cpu --out test.jsonl          the same code on tiny sizes without a GPU: tests
                                                  the script; its figures mean nothing
  tools/bench/gpu --pack wheels/                  download the wheels that a GPU machine without an
                                                  index needs (Python 3.12, at most 64 MiB)

Each section runs in a process of its own with a time limit and appends lines of JSON as it measures,
so a run that is killed keeps them. A line has `status`: measured; absent (a peer is not installed);
skipped (no time or no GPU); out of memory; failed. A Markdown table for tools/bench/RESULTS.md
follows at the end. Peers: nnU-Net (nnunetv2, dynamic_network_architectures) and MONAI.

exit codes: 0 every section ran; 1 a case failed; 2 a mistake in the call
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import pack, runner, table
from .context import ROOT, append_line

DEFAULT_LIMIT_S = 480.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench/gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the lines of JSON")
    parser.add_argument(
        "--only", action="append", metavar="SECTION", choices=list(runner.SECTIONS),
        help="run this section; may be given several times",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--limit-s", type=float, default=DEFAULT_LIMIT_S, metavar="S",
        help=f"most seconds of all sections together ({DEFAULT_LIMIT_S:g})",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for data (default: a temporary one)"
    )
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of FILE")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="download wheels into DIR")
    parser.add_argument(
        "--without-peers", action="store_true", help="with --pack: without nnU-Net and MONAI"
    )
    # A section in a program of its own, see `runner`.
    parser.add_argument("--section", choices=list(runner.SECTIONS), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.list:
        for name, section in runner.SECTIONS.items():
            print(f"{name:14} {section.limit_s:4.0f} s  {section.summary}")
        return 0
    if args.pack is not None:
        print(pack.pack_wheels(args.pack, with_peers=not args.without_peers))
        return 0
    if args.table is not None:
        if not args.table.is_file():
            parser.error(f"--table {args.table}: no such file; --out FILE wrote it")
        print(table.format_table(args.table))
        return 0
    if args.out is None:
        parser.error("--out FILE is needed: the lines of JSON are appended to it")
    if args.section is not None:
        end = time.monotonic() + args.limit_s
        device = "cpu" if args.cpu else "cuda"
        return runner.run_section(args.section, device, args.work, args.out, end)
    if not args.cpu and not sees_gpu():
        parser.error("torch sees no GPU; --cpu tests the script on tiny sizes")
    return run(args)


def sees_gpu() -> bool:
    """Ask torch in another process: once asked, this one could not fork sections any more."""
    command = [
        sys.executable,
        "-c",
        "import torch; raise SystemExit(not torch.cuda.is_available())",
    ]
    return subprocess.run(command, check=False).returncode == 0


def run(args: argparse.Namespace) -> int:
    device = "cpu" if args.cpu else "cuda"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    append_line(args.out, {"section": "run", "status": "started", **describe_machine(device)})
    work, temporary = runner.make_work_folder(args.work)
    try:
        names = args.only or list(runner.SECTIONS)
        failed = runner.run_sections(names, device, work, args.out.resolve(), args.limit_s)
    finally:
        if temporary is not None:
            temporary.cleanup()
    print(table.format_table(args.out))
    if failed:
        print(f"gpu: failed: {', '.join(failed)}; see {args.out}", file=sys.stderr)
    return 1 if failed else 0


def describe_machine(device: str) -> dict[str, object]:
    """Date, hardware and versions. It does not touch the GPU: the sections are forked later."""
    found: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "commit": read_commit(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cpu":
        return {**found, "note": "CPU mode: tests the script; its figures mean nothing"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        found["gpu"] = shown.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        found["gpu"] = "unknown: nvidia-smi failed"
    found["cudnn"] = torch.backends.cudnn.version()
    found["cuda"] = torch.version.cuda
    return found


def read_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
