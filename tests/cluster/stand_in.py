"""A substitute for `liverseg train` in tests of SLURM: same behaviour, no torch, fast to start.

  python stand_in.py run.dir=DIR steps=N [step_s=0.2] [every=5] [save_s=0] [fail=RANK:STEP:KIND]

The ranks connect to rank 0 over TCP and exchange a byte per step, so that a lost rank is noticed
as in an all-reduce. Rank 0 writes `checkpoints/step_N`, `status.json` and `trace.jsonl` (step,
start, node). SIGTERM and SIGUSR2 set a flag that the ranks exchange; then they end with exit code
75. KIND: exception, kill, exit3, hang, memory; only at the first start. `idle=1`: always stops
before the first step. `noise=N`: N bytes of output in each step.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

settings = dict(
    word.split("=", 1) for word in sys.argv[1:] if "=" in word and not word.startswith("-")
)
run = Path(settings["run.dir"])
steps, every = int(settings["steps"]), int(settings.get("every", "5"))
step_s, save_s = float(settings.get("step_s", "0.2")), float(settings.get("save_s", "0"))
torchrun = "RANK" in os.environ
rank = int(os.environ["RANK" if torchrun else "SLURM_PROCID"])
world_size = int(os.environ["WORLD_SIZE" if torchrun else "SLURM_STEP_NUM_TASKS"])
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
stopped_by = ""


def stop(number: int, _frame: object) -> None:
    global stopped_by
    stopped_by = signal.Signals(number).name


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def meet() -> list[socket.socket]:
    """Rank 0's connections in rank order, or the one to rank 0."""
    port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + 3) % 12_000
    if rank == 0:
        server = socket.create_server(("", port))
        server.settimeout(60)
        found = [server.accept()[0] for _ in range(world_size - 1)]
        ranked = sorted((int(peer.recv(8)), i) for i, peer in enumerate(found))
        return [found[i] for _, i in ranked]
    listing = (
        os.popen("scontrol show hostnames " + os.environ["SLURM_STEP_NODELIST"]).read().split()
    )
    first = listing[0] if torchrun else os.environ["MASTER_ADDR"]
    end = time.monotonic() + 60
    while True:
        try:
            peer = socket.create_connection((first, port), timeout=5)
            peer.settimeout(None)
            peer.sendall(f"{rank:8}".encode())
            return [peer]
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def agree(peers: list[socket.socket], word: bytes) -> bytes:
    """The largest of all ranks' bytes, on all of them."""
    if rank == 0:
        word = max([word, *(receive(peer) for peer in peers)])
        for peer in peers:
            peer.sendall(word)
        return word
    peers[0].sendall(word)
    return receive(peers[0])


def receive(peer: socket.socket) -> bytes:
    word = peer.recv(1)
    if not word:
        raise ConnectionResetError("Connection closed by peer")
    return word


def write(path: Path, content: dict) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content))
    os.replace(aside, path)


def save(step: int) -> None:
    time.sleep(save_s)
    if rank == 0:
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True, exist_ok=True)


def fail(kind: str) -> None:
    if kind == "exception":
        raise ValueError("the planted mistake")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit3":
        sys.exit(3)
    if kind == "memory":
        held = bytearray()
        while len(held) < 4 * 2**30:
            held += b"x" * 2**26
            time.sleep(0.02)
    if kind == "hang":
        time.sleep(10_000)


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR2, stop)
    peers = meet()
    done = max((int(path.name[5:]) for path in run.glob("checkpoints/step_*")), default=0)
    bad_rank, bad_step, kind = settings.get("fail", "-1:0:none").split(":")
    if "idle" in settings:
        return 75
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        say(f"continues at step {done} of {steps}")
        write(run / "status.json", {"state": "running", "step": done, "max_steps": steps})
    for step in range(done + 1, steps + 1):
        time.sleep(step_s)
        if "noise" in settings:
            say("x" * int(settings["noise"]))
        if start == 0 and rank == int(bad_rank) and step == int(bad_step):
            fail(kind)
        asked = agree(peers, b"1" if stopped_by else b"0") == b"1"
        if rank == 0:
            with (run / "trace.jsonl").open("a") as trace:
                trace.write(
                    json.dumps(
                        {"step": step, "start": start, "node": os.environ["SLURMD_NODENAME"]}
                    )
                    + "\n"
                )
        if asked or step % every == 0 or step == steps:
            save(step)
        if asked:
            agree(peers, b"0")
            if rank == 0:
                say(f"stopped at step {step} of {steps} by {stopped_by}; all is saved")
                write(run / "status.json", {"state": "stopped", "step": step, "max_steps": steps})
            return 75
    if rank == 0:
        write(run / "status.json", {"state": "finished", "step": steps, "max_steps": steps})
    agree(peers, b"0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
