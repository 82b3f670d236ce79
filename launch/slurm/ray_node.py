"""One Ray node of a job: `srun --ntasks-per-node=1 ... python -m launch.slurm.ray_node launch.tune ARGUMENTS...`.

The first task starts Ray's head and runs the module with `--address`; the other tasks add their node's CPUs and GPUs
and serve until the first one hangs up. Then Ray is stopped everywhere, and the module's exit code is the job's.
Whoever reaches Ray's port can run anything, so it asks for a token: the job's own, in a private file of run.dir.
"""

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from liverseg_dist.distributed.tcp_store import open_listening_socket
from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE, RunFailed
from liverseg_dist.files import restrict_umask
from liverseg_dist.streams import guard_output_streams

from ..sweep.process_guard import guard_processes
from ..sweep.ray_cluster import (
    OBJECT_STORE_BYTES,
    asking_for,
    dashboard_installed,
    temp_folder,
    write_token,
)

PORTS = 12_000
RAY_PORT = 20_000
"""Ray's port is this plus the job's number modulo `PORTS`, as MASTER_PORT of training jobs: no two jobs share one."""
LINE_PORT = 8_000
"""Likewise the port at which the first task tells the others where Ray is."""
STARTED = "Ray runtime started"
"""What `ray start` prints when the node is known to the head."""
PATIENCE_S = 180.0
POLL_S = 0.2
ASKED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    restrict_umask()
    module, *arguments = sys.argv[1:] if argv is None else argv
    env = os.environ
    job, rank, tasks = (
        int(env["SLURM_JOB_ID"]),
        int(env["SLURM_PROCID"]),
        int(env["SLURM_STEP_NUM_TASKS"]),
    )
    stop = StopRequest()
    try:
        secret = token_file([module, *arguments])
        if rank == 0:
            secret.parent.mkdir(parents=True, exist_ok=True)
            secret.unlink(missing_ok=True)
            write_token(secret)
        env |= asking_for(secret)
        with guard_processes():
            if rank == 0:
                return run_head_node(job, tasks, [module, *arguments], stop)
            return run_worker_node(job, env["MASTER_ADDR"])
    except RunFailed as error:
        print(
            f"launch.slurm.ray_node on {os.uname().nodename}: {error}", file=sys.stderr, flush=True
        )
        return EXIT_FAILED


def token_file(words: Sequence[str]) -> Path:
    folders = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not folders:
        raise RunFailed("give the sweep a folder on a shared file system: run.dir=...")
    return Path(folders[-1]).absolute() / ".ray_token"


class StopRequest:
    """Remembers the first signal that asks to stop, and passes it on to the module once that runs."""

    def __init__(self) -> None:
        self.number = 0
        self.child: subprocess.Popen[bytes] | None = None
        for number in ASKED:
            signal.signal(number, self)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.child is not None:
            self.child.send_signal(number)


def run_head_node(job: int, tasks: int, words: Sequence[str], stop: StopRequest) -> int:
    """Ray's head, and the module until its end; its exit code. Asked to stop before that runs, it does not start it."""
    own_ip = address_of(os.environ["MASTER_ADDR"])
    address = f"{own_ip}:{RAY_PORT + job % PORTS}"
    dashboard = "--no-dashboard" not in words and dashboard_installed()
    options = [f"--port={RAY_PORT + job % PORTS}", f"--temp-dir={folder_of(job)}"]
    options += [f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1"]
    with (
        open_listening_socket(own_ip, LINE_PORT + job % PORTS) as door,
        ray_on_this_node(job, own_ip, "--head", *options) as server,
    ):
        wait_for(address, server, folder_of(job))
        lines: list[socket.socket] = []
        threading.Thread(target=accept_workers, args=(door, address, lines), daemon=True).start()
        end = time.monotonic() + PATIENCE_S
        while len(lines) < tasks - 1 and time.monotonic() < end and not stop.number:
            time.sleep(POLL_S)
        print(f"Ray at {address}: {1 + len(lines)} of {tasks} nodes", flush=True)
        if dashboard:
            print(
                f"its dashboard, from elsewhere: ssh -L PORT:127.0.0.1:PORT {os.uname().nodename}",
                flush=True,
            )
        code = EXIT_RESUMABLE
        if not stop.number:
            stop.child = subprocess.Popen(
                [sys.executable, "-u", "-m", *words, "--address", address]
            )
            if stop.number:  # between the two lines above
                stop.child.send_signal(stop.number)
            code = stop.child.wait()
        Path(os.environ["RAY_AUTH_TOKEN_PATH"]).unlink(missing_ok=True)
        for line in lines:
            line.close()
    return 128 - code if code < 0 else code


def accept_workers(door: socket.socket, address: str, lines: list[socket.socket]) -> None:
    """Tell whoever comes where Ray is, and count those that have joined; the open line says that Ray is wanted."""
    with contextlib.suppress(OSError):  # the door is closed
        while True:
            line, _ = door.accept()
            threading.Thread(target=_count, args=(line, address, lines), daemon=True).start()


def _count(line: socket.socket, address: str, lines: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        line.sendall(f"{address}\n".encode())
        if line.recv(1):
            lines.append(line)


def run_worker_node(job: int, first_node: str) -> int:
    """Serve until the first task hangs up."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)  # the first task ends this one when all is saved
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            line = socket.create_connection((first_node, LINE_PORT + job % PORTS), timeout=5)
            line.settimeout(PATIENCE_S)
            address = line.makefile().readline().strip()
            if address:
                break
        except OSError as error:
            if time.monotonic() > end:
                raise RunFailed(
                    f"{first_node} does not answer: {error.strerror or error}"
                ) from None
        time.sleep(POLL_S)
    own_ip = line.getsockname()[0]
    with line, ray_on_this_node(job, own_ip, f"--address={address}") as server:
        while server.poll() is None and STARTED not in log_of(folder_of(job)).read_text(
            errors="replace"
        ):
            time.sleep(POLL_S)
        line.sendall(b"+")
        line.settimeout(POLL_S)
        while server.poll() is None:
            try:
                if not line.recv(1):
                    return 0
            except TimeoutError:
                continue
            except OSError:
                return 0  # the first task's process is gone, and srun tells of it
        said = " ".join(log_of(folder_of(job)).read_text(errors="replace").split())[-300:]
        raise RunFailed(f"Ray ended by itself with exit code {server.returncode}: {said}")


@contextlib.contextmanager
def ray_on_this_node(job: int, own_ip: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start` on this node while the block runs."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    words = [
        "start",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={own_ip}",
        f"--num-cpus={cpus}",
    ]
    words += [f"--object-store-memory={OBJECT_STORE_BYTES}", *options]
    log = log_of(folder_of(job))
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            preexec_fn=_until_all_is_saved,
        )
    try:
        yield server
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
    finally:
        if server.poll() is None:
            server.kill()
        shutil.rmtree(folder_of(job), ignore_errors=True)


def _until_all_is_saved() -> None:
    """Ray serves on when the job's processes are asked to save and stop; it ends by SIGTERM from this one."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def folder_of(job: int) -> Path:
    """On the node; short, as Unix sockets lie in it."""
    return temp_folder(str(job))


def log_of(folder: Path) -> Path:
    return folder / f"{os.uname().nodename}.log"


def wait_for(address: str, server: subprocess.Popen[bytes], folder: Path) -> None:
    """Until Ray's head listens. Raises `RunFailed`."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                said = " ".join(log_of(folder).read_text(errors="replace").split())[-300:]
                raise RunFailed(f"Ray's head did not start at {address}: {said}") from None
            time.sleep(POLL_S)


def address_of(name: str) -> str:
    """IPv4 address of a node by which the others reach it. Raises `RunFailed` for one that only itself can use."""
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise RunFailed(f"{name} has no address: {error.strerror or error}") from None
    if ipaddress.ip_address(found).is_loopback and int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1:
        raise RunFailed(
            f"{name} names itself {found}, which other nodes cannot reach; have /etc/hosts mended"
        )
    return found


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
