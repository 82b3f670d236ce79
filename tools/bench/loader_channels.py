"""What each channel of a training sample costs the loader, and the augmentation on the CPU.

  OMP_NUM_THREADS=1 python tools/bench/loader_channels.py [--channels 1 2 4] [--samples 200]

Stores of equal synthetic cases with 1, 2, 4 channels. Prints one JSON line per number of channels,
then a table: CPU milliseconds per sample (image and label from disk to the batch that goes to the
device), per channel, and bytes read; `ratio` is the time per channel against one channel in the same
run. The numbers of channels take turns; the best round counts.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loader import BenchStore, make_cases, write_store

from liverseg_dist.config import DataConfig
from liverseg_dist.config.channels import ChannelConfig
from liverseg_dist.data.augment import DeviceTransform
from liverseg_dist.data.augment.presets import build_preset
from liverseg_dist.data.loading import PatchLoader, PatchSource
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.tracking.terminal_table import print_table
from liverseg_dist.volume import Index3

WARM_UP = 20
Cost = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--patch", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X")
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    patch: Index3 = tuple(args.patch)
    cases = list(make_cases(2, None))
    best: dict[int, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for count in args.channels:
            stores[count] = write_store(Path(folder) / f"{count}.zarr", cases, count)
        for _ in range(args.rounds):
            for count, store in stores.items():
                cost = measure(store, patch, args.samples)
                if count not in best or cost["loader_ms"] < best[count]["loader_ms"]:
                    best[count] = cost
    first = best[args.channels[0]]["loader_ms"] / args.channels[0]
    rows = []
    for count, cost in best.items():
        per_channel = cost["loader_ms"] / count
        ratio = per_channel / first
        line = {"bench": "loader_channels", "patch": "x".join(map(str, patch)), "channels": count}
        rounded = {name: round(value, 3) for name, value in cost.items()}
        print(json.dumps(line | rounded | {"ratio": round(ratio, 3)}), flush=True)
        rows.append((
            str(count), f"{cost['loader_ms']:.2f}", f"{per_channel:.2f}", f"{ratio:.2f}",
            f"{cost['read_mib']:.2f}", f"{cost['read_mib'] / count:.2f}",
            f"{cost['augment_ms']:.1f}", f"{cost['augment_ms'] / count:.1f}",
        ))  # fmt: skip
    headings = (
        "channels", "loader, ms", "per channel", "ratio", "read, MiB", "MiB per channel",
        "augmentation, ms", "ms per channel",
    )  # fmt: skip
    print_table(headings, rows, right=headings)


def measure(store: BenchStore, patch: Index3, samples: int) -> Cost:
    """CPU milliseconds and MiB per sample, in batches of 2 with the nnU-Net preset."""
    channels = []
    for number in range(store.channels):
        channels.append(ChannelConfig(name=f"channel {number}", modality="CT"))
    settings = DataConfig(patch_size=patch, channels=tuple(channels))
    source = PatchSource(store, store.case_ids, settings, seed=0, global_batch_size=2)
    transform = DeviceTransform(build_preset(settings), patch)
    loading_s, augmenting_s, read_bytes = [], [], []
    indices = range(0, samples + WARM_UP, 2)
    with PatchLoader(source, ([n, n + 1] for n in indices), workers=0) as loader:
        read_before, before = count_read_bytes(), time.process_time()
        for batch in loader:
            loaded, read = time.process_time(), count_read_bytes()
            transform(batch)
            loading_s.append(loaded - before)
            read_bytes.append(read - read_before)
            read_before, before = count_read_bytes(), time.process_time()
            augmenting_s.append(before - loaded)
    kept = slice(WARM_UP // 2, None)
    return {
        "loader_ms": float(np.mean(loading_s[kept])) * 500,
        "augment_ms": float(np.mean(augmenting_s[kept])) * 500,
        "read_mib": float(np.mean(read_bytes[kept])) / 2 / 2**20,
    }


def count_read_bytes() -> int:
    """Bytes that this process has read by system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no rchar")


if __name__ == "__main__":
    guard_output_streams()
    main()
