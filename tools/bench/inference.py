"""Sliding window: time outside of the network and peak memory, compared with MONAI and nnU-Net on equal inputs.

  python tools/bench/inference.py [--shape 64 512 512] [--long 400 512 512] [--patch 64 128 128] [--peers monai nnunet]
                                  [--average logits] [--mirror] [--allocator both]

Each system predicts the same synthetic scan in its own process with one thread and a network of negligible cost, so
that the predictor remains, until the probabilities of the scan (nnU-Net: logits) are finished. Repeats are
interleaved, so that other load affects all systems. All systems mirror alike: without copies, or with --mirror eight
copies of each window. All have the same settings of the C library's allocator: by default all keep freed memory, as
this project's commands do; with `--allocator default` the peers have the C library's own settings, as their users have.

`beyond_model_ms` is CPU ms per window (with its mirrored copies) outside the forward pass, the minimum of the
repeats. `peak_mib` is the peak of the process above its memory before. `ratio` is peer / this project. `--average`
selects what this project and MONAI average: probabilities, or logits (then one softmax). `labels_differing` is the
share of voxels with another label than this project's: MONAI's window weights differ, nnU-Net averages logits in half
precision. nnunet needs `pip install nnunetv2`; peers that are not installed are omitted with a message.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference_systems import (
    PEER_PACKAGES,
    SYSTEMS,
    Cheap,
    Options,
    Shape,
    build_our_predictor,
    make_scan,
)

from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.streams import guard_output_streams

MIRRORED_COPIES = 8
ALLOCATORS = {"kept": ("kept",), "default": ("default",), "both": ("kept", "default")}


def contest(name: str, args: argparse.Namespace) -> None:
    """Run one system in this process: one repeat per input line, with its figures as JSON."""
    torch.set_num_threads(1)
    if args.allocator == "kept":
        keep_freed_memory()
    shape, patch = tuple(args.shape), tuple(args.patch)
    options = Options(average=args.average, mirror=args.mirror)
    SYSTEMS[name](make_scan(patch), Cheap(patch), patch, options)  # imports, first-call costs
    image = make_scan(shape)
    before_kib = current_rss_kib()
    reset_peak()
    result = None
    print("{}", flush=True)  # ready
    for _ in sys.stdin:
        model, result = Cheap(patch), None
        begin = time.process_time()
        result = SYSTEMS[name](image, model, patch, options)
        beyond_s = time.process_time() - begin - model.spent_s
        windows = model.windows // (MIRRORED_COPIES if args.mirror else 1)
        figures = {"windows": windows, "beyond_model_ms": 1000 * beyond_s / windows}
        print(json.dumps(figures | {"peak_mib": (peak_rss_kib() - before_kib) / 1024}), flush=True)
    if result is None:
        labels = build_our_predictor(Cheap(patch), patch, options).predict_labels(image)
    else:
        labels = np.stack([result[:, z].argmax(0).astype(np.uint8) for z in range(shape[0])])
    np.save(args.labels, labels)


def reset_peak() -> None:
    """Make the kernel forget the peak so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def current_rss_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def peak_rss_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class Contestant:
    """A process that runs `contest`, and the best of its figures."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.labels = folder / f"{name}.npy"
        self.best: dict[str, Any] = {}
        command = [sys.executable, "-W", "ignore", __file__, "--contest", name]
        command += ["--labels", str(self.labels), *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._answer()

    def repeat(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        figures = self._answer()
        if not self.best or figures["beyond_model_ms"] < self.best["beyond_model_ms"]:
            self.best = figures

    def end(self) -> None:
        self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"{self.labels.stem} failed; its reason is above")

    def _answer(self) -> dict[str, Any]:
        """The next line that is JSON: a peer may print lines of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.labels.stem} failed; its reason is above")


def compete(
    names: list[str], shape: Shape, repeats: int, allocator: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    arguments = ["--shape", *map(str, shape), "--patch", *map(str, args.patch)]
    arguments += ["--average", args.average, "--allocator", allocator]
    arguments += ["--mirror"] if args.mirror else []
    with tempfile.TemporaryDirectory() as folder:
        contestants = {name: Contestant(name, Path(folder), arguments) for name in names}
        for _ in range(repeats):
            for one in contestants.values():
                one.repeat()
        for one in contestants.values():
            one.end()
        figures = {name: one.best for name, one in contestants.items()}
        labels = {}
        for name, one in contestants.items():
            labels[name] = np.load(one.labels, mmap_mode="r", allow_pickle=False)
        rows = []
        for name in names[1:]:
            shares = []
            for ours_YX, theirs_YX in zip(labels["ours"], labels[name], strict=True):
                shares.append(np.mean(ours_YX != theirs_YX))
            rows += compare(figures["ours"], figures[name], name, float(np.mean(shares)))
    about = {"shape": list(shape), "mirrored": args.mirror, "average": args.average}
    return [row | about | {"freed_memory": allocator} for row in rows]


def compare(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, labels_differing: float
) -> list[dict[str, Any]]:
    rows = []
    for case in ("beyond_model_ms", "peak_mib"):
        row: dict[str, Any] = {"bench": "inference", "case": case, "vs": name}
        row["ratio"] = round(theirs[case] / ours[case], 2)
        row |= {"ours": round(ours[case], 2), "theirs": round(theirs[case], 2)}
        row["windows"] = [ours["windows"], theirs["windows"]]
        rows.append(row | {"labels_differing": labels_differing})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zyx = {"type": int, "nargs": 3, "metavar": ("Z", "Y", "X")}
    parser.add_argument("--shape", default=(64, 512, 512), **zyx)
    parser.add_argument("--long", default=(400, 512, 512), **zyx)
    parser.add_argument("--patch", default=(64, 128, 128), **zyx)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--allocator", choices=sorted(ALLOCATORS), default="kept")
    parser.add_argument("--average", choices=("probabilities", "logits"), default="probabilities")
    parser.add_argument("--mirror", action="store_true", help="eight copies of each window")
    parser.add_argument(
        "--peers", nargs="*", choices=sorted(PEER_PACKAGES), default=sorted(PEER_PACKAGES)
    )
    parser.add_argument("--contest", choices=sorted(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.contest:
        contest(args.contest, args)
        return
    absent = []
    for peer in args.peers:
        if not all(map(importlib.util.find_spec, PEER_PACKAGES[peer])):
            absent.append(peer)
    if absent:
        print(f"not installed, omitted: {', '.join(absent)}", file=sys.stderr)
    names = ["ours", *(peer for peer in args.peers if peer not in absent)]
    rows = []
    for allocator in ALLOCATORS[args.allocator]:
        rows += compete(names, tuple(args.shape), args.repeats, allocator, args)
        if args.long[0]:
            rows += compete(names, tuple(args.long), 1, allocator, args)
    for row in rows:
        print(json.dumps(row))
    headings = ("shape", "freed", "case", "against", "liverseg", "peer", "ratio")
    widths = (16, 8, 16, 8, 9, 9, 7)
    line = " ".join(f"{text:>{width}}" for text, width in zip(headings, widths, strict=True))
    print(f"\n{line}  labels differing")
    for row in rows:
        size = "x".join(map(str, row["shape"]))
        print(
            f"{size:>16} {row['freed_memory']:>8} {row['case']:>16} {row['vs']:>8}"
            f" {row['ours']:9.1f} {row['theirs']:9.1f} {row['ratio']:7.2f}"
            f"  {row['labels_differing']:.2e}"
        )


if __name__ == "__main__":
    guard_output_streams()
    main()
