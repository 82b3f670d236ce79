"""Sliding window: time outside of the network and peak memory, compared with MONAI and nnU-Net on equal inputs.

  python tools/bench/inference.py [--shape 64 512 512] [--long 400 512 512] [--patch 64 128 128] [--peers monai nnunet]
                                  [--average logits]

Each system predicts the same synthetic scan in its own process with one thread and a network of negligible cost, so
that the predictor remains, until the probabilities of the scan (nnU-Net: logits) are finished. Repeats are
interleaved, so that other load affects all systems.

`beyond_model_ms` is CPU ms per window outside the forward pass, the minimum of the repeats. `peak_mib` is the peak
of the process above its memory before. `ratio` is peer / this project. `--average` selects what this project and
MONAI average: probabilities, or logits (then one softmax). `labels_differing` is the share of voxels with another label
than this project's: MONAI's window weights differ, nnU-Net averages logits in half precision. nnunet needs
`pip install nnunetv2`; peers that are not installed are omitted with a message.
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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.streams import guard_output_streams

PEERS = {"monai": ("monai",), "nnunet": ("nnunetv2", "acvl_utils")}
"""Modules that each needs."""
OVERLAP = 0.5
SAME_ALLOCATOR, AVERAGE = "BENCH_SAME_ALLOCATOR", "BENCH_AVERAGE"
Shape = tuple[int, int, int]


class Cheap(nn.Module):
    """Three logits from each voxel and its place in the window; keeps count of its own CPU time."""

    def __init__(self, patch: Shape) -> None:
        super().__init__()
        z, y, x = (torch.linspace(-1, 1, n) for n in patch)
        self.place = (z[:, None, None] + y[:, None] * 0.5 - x * 0.7)[None, None]
        self.spent_s, self.windows = 0.0, 0

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        begin = time.process_time()
        liver = image_BCDHW * 2 + self.place
        result = torch.cat([-liver, liver, image_BCDHW * 3 - 2], dim=1)
        self.spent_s += time.process_time() - begin
        self.windows += len(image_BCDHW)
        return result


def make_scan(shape: Shape) -> np.ndarray:
    """Smooth structure and noise, float32, normalised."""
    rng = np.random.default_rng(0)
    plane = np.kron(
        rng.standard_normal((-(-shape[1] // 32), -(-shape[2] // 32))), np.ones((32, 32))
    )
    image = np.empty(shape, dtype=np.float32)
    for z in range(shape[0]):
        image[z] = plane[: shape[1], : shape[2]] + 0.3 * rng.standard_normal(shape[1:])
    return image


def run_ours(image: np.ndarray, model: nn.Module, patch: Shape) -> None:
    keep_freed_memory()  # as the commands do
    predictor = our_predictor(model, patch)
    for _ in predictor.stream_probabilities(image):
        pass


def our_predictor(model: nn.Module, patch: Shape) -> SlidingWindowPredictor:
    config = InferenceConfig(overlap=OVERLAP, average=average())
    return SlidingWindowPredictor(
        model, patch, OutputChannels(), config=config, device=torch.device("cpu")
    )


def average() -> Any:
    return os.environ.get(AVERAGE, "probabilities")


def run_monai(image: np.ndarray, model: nn.Module, patch: Shape) -> np.ndarray:
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        result = sliding_window_inference(
            torch.from_numpy(image)[None, None],
            roi_size=patch,
            sw_batch_size=1,
            predictor=model if average() == "logits" else lambda batch: model(batch).softmax(1),
            overlap=OVERLAP,
            mode="gaussian",
            sigma_scale=0.125,
        )
        return (result.softmax(1) if average() == "logits" else result)[0].numpy()


def run_nnunet(image: np.ndarray, model: nn.Module, patch: Shape) -> np.ndarray:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=OVERLAP, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.network = model
    predictor.configuration_manager = SimpleNamespace(patch_size=patch)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=3)
    predictor.allowed_mirroring_axes = None
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)[None])
    return logits.numpy()


CONTESTANTS: dict[str, Callable[[np.ndarray, nn.Module, Shape], np.ndarray | None]] = {
    "ours": run_ours,
    "monai": run_monai,
    "nnunet": run_nnunet,
}


def contest(name: str, shape: Shape, patch: Shape, labels: Path) -> None:
    """Run one system in this process: one repeat per input line, with its figures as JSON."""
    torch.set_num_threads(1)
    if os.environ.get(SAME_ALLOCATOR):
        keep_freed_memory()
    CONTESTANTS[name](make_scan(patch), Cheap(patch), patch)  # imports and first-call costs
    image = make_scan(shape)
    before_kib = current_rss_kib()
    reset_peak()
    result = None
    print("{}", flush=True)  # ready
    for _ in sys.stdin:
        model, result = Cheap(patch), None
        begin = time.process_time()
        result = CONTESTANTS[name](image, model, patch)
        beyond = time.process_time() - begin - model.spent_s
        figures = {"windows": model.windows, "beyond_model_ms": 1000 * beyond / model.windows}
        print(json.dumps(figures | {"peak_mib": (peak_rss_kib() - before_kib) / 1024}), flush=True)
    if result is None:
        np.save(labels, our_predictor(Cheap(patch), patch).predict_labels(image))
    else:
        np.save(
            labels, np.stack([result[:, z].argmax(0).astype(np.uint8) for z in range(shape[0])])
        )


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

    def __init__(
        self, name: str, folder: Path, arguments: list[str], environment: dict[str, str]
    ) -> None:
        self.labels = folder / f"{name}.npy"
        self.best: dict[str, Any] = {}
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--contest",
            name,
            "--labels",
            str(self.labels),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
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
    names: list[str], shape: Shape, patch: Shape, repeats: int, environment: dict[str, str]
) -> list[dict[str, Any]]:
    arguments = ["--shape", *map(str, shape), "--patch", *map(str, patch)]
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            name: Contestant(name, Path(folder), arguments, environment) for name in names
        }
        for _ in range(repeats):
            for one in contestants.values():
                one.repeat()
        for one in contestants.values():
            one.end()
        figures = {name: one.best for name, one in contestants.items()}
        labels = {
            name: np.load(one.labels, mmap_mode="r", allow_pickle=False)
            for name, one in contestants.items()
        }
        rows = []
        for name in names[1:]:
            ours, theirs = figures["ours"], figures[name]
            differing = float(
                np.mean(
                    [np.mean(a != b) for a, b in zip(labels["ours"], labels[name], strict=True)]
                )
            )
            for case in ("beyond_model_ms", "peak_mib"):
                row = {
                    "bench": "inference",
                    "case": case,
                    "vs": name,
                    "ratio": round(theirs[case] / ours[case], 2),
                }
                row |= {
                    "ours": round(ours[case], 2),
                    "theirs": round(theirs[case], 2),
                    "shape": list(shape),
                }
                row |= {
                    "windows": [ours["windows"], theirs["windows"]],
                    "labels_differing": differing,
                }
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(64, 512, 512), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--long", type=int, nargs=3, default=(400, 512, 512), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--patch", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X")
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--same-allocator", action="store_true", help="peers keep freed memory as we do"
    )
    parser.add_argument("--average", choices=("probabilities", "logits"), default="probabilities")
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=sorted(PEERS))
    parser.add_argument("--contest", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape, patch = tuple(args.shape), tuple(args.patch)
    if args.contest:
        contest(args.contest, shape, patch, args.labels)
        return
    absent = [peer for peer in args.peers if not all(map(importlib.util.find_spec, PEERS[peer]))]
    if absent:
        print(f"not installed, omitted: {', '.join(absent)}", file=sys.stderr)
    names = ["ours", *(peer for peer in args.peers if peer not in absent)]
    environment = {SAME_ALLOCATOR: "1" if args.same_allocator else "", AVERAGE: args.average}
    rows = compete(names, shape, patch, args.repeats, environment)
    if args.long[0]:
        rows += compete(names, tuple(args.long), patch, 1, environment)
    for row in rows:
        print(json.dumps(row))
    print(
        f"\n{'shape':16} {'case':16} {'against':8} {'liverseg':>9} {'peer':>9} {'ratio':>7}  labels differing"
    )
    for row in rows:
        size = "x".join(map(str, row["shape"]))
        print(
            f"{size:16} {row['case']:16} {row['vs']:8} {row['ours']:9.1f} {row['theirs']:9.1f} {row['ratio']:7.2f}"
            f"  {row['labels_differing']:.2e}"
        )


if __name__ == "__main__":
    guard_output_streams()
    main()
