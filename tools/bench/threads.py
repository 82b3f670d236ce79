"""Training step time with the default number of threads against one thread, on an idle and on a busy machine.

  python tools/bench/threads.py [--busy 0 2 6] [--repeats 5] [--steps 2]

Each variant is a process of its own that takes real optimizer steps of the demo's network (`configs/demo_cpu.yaml`).
The processes wait for their turn and take turns within each repeat, so that other load on the machine meets all
variants alike. `--busy N` starts N processes that keep a core busy. Printed as one JSON line per variant and load:
median seconds per step, and the median over repeats of the ratio to one thread in the same repeat.

Variants: `one` thread; `default`, as `liverseg train` chooses; `spinning`, the same number of threads with OpenMP's own
way of waiting, which was the default before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from liverseg_dist.config import load_settings
from liverseg_dist.cores import WAITING_VARIABLES, make_threads_wait_passively, usable_cores
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.streams import guard_output_streams

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo_cpu.yaml"
SPACING_MM = (4.0, 4.0, 4.0)


def serve_steps(threads: int) -> None:
    """Read a number of steps per line, take them, print seconds per step."""
    torch.set_num_threads(threads)
    settings = load_settings([CONFIG])
    model = build_model(resolve_topology(settings.model, settings.data.patch_size, SPACING_MM))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    image_BCDHW = torch.randn(settings.train.micro_batch_size, 1, *settings.data.patch_size)
    micro_batches = settings.train.global_batch_size // settings.train.micro_batch_size

    def take_step() -> None:
        for _ in range(micro_batches):
            outputs = model(image_BCDHW)
            levels = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            torch.stack([level.square().mean() for level in levels]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    take_step()
    print("ready", flush=True)
    for line in sys.stdin:
        steps, begin = int(line), time.perf_counter()
        for _ in range(steps):
            take_step()
        print((time.perf_counter() - begin) / steps, flush=True)


def start_variant(threads: int, passive: bool) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in WAITING_VARIABLES}
    if passive:
        make_threads_wait_passively(environment)
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def measure_step(process: subprocess.Popen[str], steps: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare_variants(
    variants: dict[str, subprocess.Popen[str]], busy: int, repeats: int, steps: int
) -> None:
    """Measure all variants in turns while `busy` processes load the machine, and print a line for each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        time.sleep(1.0 if busy else 0.0)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, process in variants.items():
                seconds[name].append(measure_step(process, steps))
        load = os.getloadavg()[0]
    finally:
        for other in others:
            other.kill()
            other.wait()
    for name, values in seconds.items():
        ratios = [value / one for value, one in zip(values, seconds["one"], strict=True)]
        line = {
            "bench": "threads",
            "variant": name,
            "busy_processes": busy,
            "load": round(load, 1),
            "step_s": round(statistics.median(values), 3),
            "ratio_to_one_thread": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 6], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_steps(args.serve)
        return
    cores = usable_cores()
    variants = {
        "one": start_variant(1, passive=True),
        "default": start_variant(cores, passive=True),
        "spinning": start_variant(cores, passive=False),
    }
    try:
        for busy in args.busy:
            compare_variants(variants, busy, args.repeats, args.steps)
    finally:
        for process in variants.values():
            process.kill()


if __name__ == "__main__":
    guard_output_streams()
    main()
