"""Two nodes on one machine: network and host name of their own, joined by a switch; torchrun with a rank on each.

  python two_nodes.py ARGUMENTS OF TORCHRUN

To be run in a network namespace, which is the switch's. Ends with the first exit code that is not 0. `NODE1_CLOCK`
(seconds, as libfaketime reads them) makes the second node's clock wrong.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

MEETING_S = 60
"""torchrun waits 10 minutes by itself for a node that was lost before all had met."""
SWITCH, PORTS = "switch", ("port0", "port1")
ADDRESS = "10.77.0.{}"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


SLEEP = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
"""
"""libfaketime refuses (EINVAL) to sleep until a moment that has passed, for which Python asks on a busy machine."""


def sleeper(folder: Path) -> Path:
    """The library that sleeps, compiled once."""
    library = folder / "sleep.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=SLEEP, text=True, check=True)
    return library


def clock(offset: str, folder: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is off; monotonic time and the files' times stay true."""
    return {
        "LD_PRELOAD": f"{sleeper(folder)} {FAKETIME}",
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def ip(*words: object, node: int | None = None) -> None:
    inside = [] if node is None else ["nsenter", "--net", "--target", str(node)]
    subprocess.run([*inside, "ip", *map(str, words)], check=True, capture_output=True)


def start(number: int, arguments: list[str]) -> subprocess.Popen[str]:
    """The node's process waits for a line until its network is there."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=liverseg",
        f"--rdzv-endpoint={ADDRESS.format(1)}:29500", f"--rdzv-conf=rank={number},timeout={MEETING_S}",
    ]  # fmt: skip
    script = f'read line && hostname node{number} && exec "$@"'
    offset = os.environ.get("NODE1_CLOCK", "")
    wrong = clock(offset, Path(os.environ["TMPDIR"])) if number == 1 and offset else {}
    return subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", script, "sh", *torchrun, *arguments],
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": "eth0",
            **wrong,
        },
        stdin=subprocess.PIPE,
        text=True,
    )


def connect(number: int, process: subprocess.Popen[str]) -> None:
    while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    ip("link", "add", PORTS[number], "type", "veth", "peer", "name", "eth0", "netns", process.pid)
    ip("link", "set", PORTS[number], "master", SWITCH, "up")
    ip("addr", "add", f"{ADDRESS.format(number + 1)}/24", "dev", "eth0", node=process.pid)
    for device in ("lo", "eth0"):
        ip("link", "set", device, "up", node=process.pid)


def main(arguments: list[str]) -> int:
    ip("link", "add", SWITCH, "type", "bridge")
    ip("link", "set", SWITCH, "up")
    nodes = [start(number, arguments) for number in (0, 1)]

    def forward(number: int, _frame: FrameType | None) -> None:
        for node in nodes:
            node.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    for number, node in enumerate(nodes):
        connect(number, node)
    for node in nodes:
        assert node.stdin is not None
        node.stdin.write("\n")
        node.stdin.close()
    codes = [node.wait() for node in nodes]
    return next((code for code in codes if code), 0) & 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
