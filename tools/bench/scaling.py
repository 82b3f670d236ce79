"""DDP efficiency from one to two processes on this machine, the prediction of the scaling model, and checkpoint stalls.

  OMP_NUM_THREADS=1 python tools/bench/scaling.py [--patch 32 64 64] [--steps 8] [--rounds 3]

One thread each. Two ranks on two cores also share caches and memory bandwidth with each other and with other
processes, which is no cost of the gradient exchange. Efficiency is therefore the step time of two independent processes,
running at the same time, divided by that of two DDP ranks; rounds are interleaved, and the best one counts. The
efficiency relative to one process alone is printed as well. The model (`liverseg plan --scale`) gets the independent
step time and the bandwidth and latency of gloo, both measured here. Each comparison prints one JSON line.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from liverseg_dist.config import ModelConfig, TrainConfig
from liverseg_dist.distributed.strategies.parallelize import parallelize_model
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.planning.scaling_model import Machine, predict_step_time
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.training.checkpoint import Checkpoints

SIZES_MIB = (1, 32)
CHECKPOINT_CADENCE = 1000
"""Steps between checkpoints by default, over which a stall is spread."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 64, 64), metavar=("Z", "Y", "X"))
    parser.add_argument("--preset", default="S", choices=("tiny", "S", "M"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(job(args)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for kind, processes in (("ddp", 2), ("independent", 2), ("alone", 1)):
            for name, value in slowest(launch(kind, processes)).items():
                values = best.setdefault(kind, {})
                higher = name == "bandwidth_gb_s"
                values[name] = (
                    max(value, values.get(name, value))
                    if higher
                    else min(value, values.get(name, value))
                )
    report(best, args)


def report(best: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    case = f"{args.preset}, {'x'.join(map(str, args.patch))}, fp32, one thread a rank"
    ddp, apart, alone = best["ddp"], best["independent"], best["alone"]
    machine = Machine(
        gpus_per_node=2,
        intra_gb_s=ddp["bandwidth_gb_s"],
        intra_latency_us=ddp["latency_us"],
        spread=0,
        overlap=False,
    )
    buckets = max(1, round(4 * ddp["parameters"] / (25 << 20)))
    predicted = predict_step_time(
        "ddp", apart["step_s"], int(ddp["parameters"]), buckets, 2, machine
    )
    lines = {
        "1 to 2 processes, equal load": (
            "two independent processes",
            apart["step_s"] / ddp["step_s"],
        ),
        "1 to 2 processes, idle second core": (
            "one process alone",
            alone["step_s"] / ddp["step_s"],
        ),
        "1 to 2 processes, CPU seconds": (
            "two independent processes",
            apart["cpu_s"] / ddp["cpu_s"],
        ),
        "predicted by plan --scale": ("two independent processes", predicted.efficiency),
        "checkpoint stall in CPU s, share of a step": ("a step", ddp["stall_cpu_s"] / ddp["cpu_s"]),
        f"checkpoint stall in CPU s, share of {CHECKPOINT_CADENCE} steps": (
            "default cadence",
            ddp["stall_cpu_s"] / ddp["cpu_s"] / CHECKPOINT_CADENCE,
        ),
    }
    for name, (peer, ratio) in lines.items():
        print(
            json.dumps(
                {
                    "bench": "scaling",
                    "case": f"{name}; {case}",
                    "vs": peer,
                    "ratio": round(ratio, 5),
                }
            )
        )
    print(f"\n{case}\n{'':14} {'step s':>8} {'CPU s':>8}")
    for kind, values in best.items():
        print(f"{kind:14} {values['step_s']:8.3f} {values['cpu_s']:8.3f}")
    print(
        f"gloo: {ddp['bandwidth_gb_s']:.2f} GB/s, {ddp['latency_us']:.0f} us a message; "
        f"checkpoint: the training thread is held for {ddp['stall_cpu_s']:.3f} CPU s"
    )


def launch(kind: str, processes: int) -> list[dict[str, float]]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        common = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "BENCH_FOLDER": folder,
            "MASTER_ADDR": "127.0.0.1",
        }
        running = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--job", kind],
                env={
                    **common,
                    "MASTER_PORT": port,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                },
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"a process of {kind} failed")
    return [json.loads(out.splitlines()[-1]) for out in outputs]


def slowest(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(values[name] for values in found) for name in found[0]}


# --- one process --------------------------------------------------------------------------------------------------


def job(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, joined = Path(os.environ["BENCH_FOLDER"]), args.job == "ddp"
    if joined:
        dist.init_process_group("gloo")
    model = build_model(
        resolve_topology(ModelConfig(preset=args.preset), args.patch, (1.0, 1.0, 1.0))
    )
    parameters = sum(p.numel() for p in model.parameters())
    strategy = parallelize_model(
        model, torch.device("cpu"), TrainConfig(), (), lambda m: [{"params": list(m.parameters())}]
    )
    image_BCDHW = torch.randn(1, 1, *args.patch)
    strategy.warm_up(image_BCDHW)

    def step() -> None:
        outputs = strategy.forward(image_BCDHW, last=True)
        strategy.backward(sum(out.square().mean() for out in outputs))  # type: ignore[arg-type]
        strategy.step(1e-3)

    step()
    wait_for_the_other(folder, joined)
    wall, cpu = [], []
    for _ in range(args.steps):
        started, spent = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    found = {"step_s": min(wall), "cpu_s": min(cpu), "parameters": float(parameters)}
    if joined:
        found |= exchange()
        checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
        stalls = []
        for number in range(3):
            spent = (
                time.thread_time()
            )  # of the thread that trains; the writer's goes on beside the next steps
            checkpoints.save(number, strategy.state(), {})
            stalls.append(time.thread_time() - spent)
            checkpoints.finish()
        found["stall_cpu_s"] = min(stalls)
        checkpoints.close()
        dist.destroy_process_group()
    return found


def wait_for_the_other(folder: Path, joined: bool) -> None:
    """Independent processes start their timed steps together, as ranks do by themselves."""
    if joined:
        dist.barrier()
        return
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def exchange() -> dict[str, float]:
    """Bandwidth and latency of an all-reduce of two ranks, from a small and a large one."""
    seconds = []
    for size in SIZES_MIB:
        values = torch.zeros(size << 18)
        times = []
        for _ in range(10):
            started = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    volume = [
        size << 20 for size in SIZES_MIB
    ]  # with two ranks, 2 (N - 1) / N of it is sent: all of it
    rate = (volume[1] - volume[0]) / (seconds[1] - seconds[0])
    return {
        "bandwidth_gb_s": rate / 1e9,
        "latency_us": max(0.0, seconds[0] - volume[0] / rate) / 2 * 1e6,
    }


if __name__ == "__main__":
    guard_output_streams()
    main()
