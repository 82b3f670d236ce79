"""One Ray node of a job.

  srun --ntasks-per-node=1 ... python -m launch.slurm.ray_node launch.tune ARGUMENTS...

The first task starts the head of Ray and runs the module with `--address`. The other tasks add the
CPUs and GPUs of their nodes until the first task closes its connections. Then Ray is stopped on all
nodes, and the exit code of the module becomes that of the job.

Any process that reaches Ray's port could run code as this user, so Ray requires a token: one per
job, in a private file of run.dir.
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

from liverseg_dist.console import write_error, write_lines
from liverseg_dist.distributed.tcp_store import open_listening_socket
from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE, RunFailed
from liverseg_dist.files import restrict_umask
from liverseg_dist.streams import guard_output_streams

from ..sweep.process_guard import guard_processes
from ..sweep.ray_cluster import (
    OBJECT_STORE_BYTES,
    is_dashboard_installed,
    temp_folder,
    token_environment,
    write_token,
)

PORT_COUNT = 12_000
RAY_PORT = 20_000
"""Ray's port is this plus the job id modulo `PORT_COUNT`, as MASTER_PORT of training jobs: no two
jobs share a port."""
ADDRESS_PORT = 8_000
"""In the same way the port at which the first task sends the address of Ray to the others."""
STARTED = "Ray runtime started"
"""`ray start` prints this when the node has joined the head."""
TIMEOUT_S = 180.0
CONNECT_TIMEOUT_S = 5.0
SERVER_EXIT_TIMEOUT_S = 30.0
POLL_S = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's part of the job; returns the exit code."""
    restrict_umask()
    module, *arguments = sys.argv[1:] if argv is None else argv
    env = os.environ
    job_id, rank = int(env["SLURM_JOB_ID"]), int(env["SLURM_PROCID"])
    stop = StopRequest()
    try:
        token = token_path([module, *arguments])
        if rank == 0:
            token.parent.mkdir(parents=True, exist_ok=True)
            # A requeued job finds the token of its last start.
            token.unlink(missing_ok=True)
            write_token(token)
        env |= token_environment(token)
        with guard_processes():
            if rank == 0:
                tasks = int(env["SLURM_STEP_NUM_TASKS"])
                return run_head_node(job_id, tasks, [module, *arguments], stop)
            # The token is on the shared file system before the first node answers.
            return run_worker_node(job_id, env["MASTER_ADDR"])
    except RunFailed as error:
        node = os.uname().nodename
        write_error(error, f"launch.slurm.ray_node on {node}")
        return EXIT_FAILED


def token_path(words: Sequence[str]) -> Path:
    """The file of the token. Raises `RunFailed` if the arguments have no run.dir."""
    folders = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not folders:
        raise RunFailed("give the sweep a folder on a shared file system: run.dir=...")
    return Path(folders[-1]).absolute() / ".ray_token"


class StopRequest:
    """A signal handler: remembers the first request to stop, and forwards it to the module."""

    def __init__(self) -> None:
        self.number = 0
        self.child: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.child is not None:
            self.child.send_signal(number)


def run_head_node(job_id: int, tasks: int, words: Sequence[str], stop: StopRequest) -> int:
    """Start the head of Ray and run the module.

    After a request to stop before that, the module is not started.

    Args:
        job_id: The SLURM job.
        tasks: The number of nodes.
        words: The module and its arguments.
        stop: The handler of requests to stop.

    Returns:
        The exit code of the module.
    """
    own_ip = resolve_node_address(os.environ["MASTER_ADDR"])
    port = RAY_PORT + job_id % PORT_COUNT
    address = f"{own_ip}:{port}"
    has_dashboard = "--no-dashboard" not in words and is_dashboard_installed()
    options = [f"--port={port}", f"--temp-dir={ray_folder(job_id)}"]
    options += [f"--include-dashboard={str(has_dashboard).lower()}", "--dashboard-host=127.0.0.1"]
    with (
        open_listening_socket(own_ip, ADDRESS_PORT + job_id % PORT_COUNT) as server_socket,
        run_ray_server(job_id, own_ip, "--head", *options) as server,
    ):
        wait_for_ray_head(address, server, ray_folder(job_id))
        connections: list[socket.socket] = []
        threading.Thread(
            target=accept_workers, args=(server_socket, address, connections), daemon=True
        ).start()
        end = time.monotonic() + TIMEOUT_S
        while len(connections) < tasks - 1 and time.monotonic() < end and not stop.number:
            time.sleep(POLL_S)
        write_lines(f"Ray at {address}: {1 + len(connections)} of {tasks} nodes")
        if has_dashboard:
            node = os.uname().nodename
            write_lines(f"dashboard from another machine: ssh -L PORT:127.0.0.1:PORT {node}")
        code = _run_module([*words, "--address", address], stop)
        # From here on no process may join Ray.
        Path(os.environ["RAY_AUTH_TOKEN_PATH"]).unlink(missing_ok=True)
        # The closed connections end the other nodes.
        for connection in connections:
            connection.close()
    return 128 - code if code < 0 else code


def _run_module(words: Sequence[str], stop: StopRequest) -> int:
    """Run the module to its end, unless a stop was requested before; returns its return code."""
    if stop.number:
        return EXIT_RESUMABLE
    stop.child = subprocess.Popen([sys.executable, "-u", "-m", *words])
    # A signal between the check and the assignment has not been forwarded.
    if stop.number:
        stop.child.send_signal(stop.number)
    return stop.child.wait()


def accept_workers(
    server_socket: socket.socket, address: str, connections: list[socket.socket]
) -> None:
    """Send the address of Ray to each task that connects, and collect those that have joined.

    The open connection shows a worker that Ray is still needed.
    """
    with contextlib.suppress(OSError):  # the socket is closed
        while True:
            connection, _ = server_socket.accept()
            threading.Thread(
                target=_serve_worker, args=(connection, address, connections), daemon=True
            ).start()


def _serve_worker(
    connection: socket.socket, address: str, connections: list[socket.socket]
) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(f"{address}\n".encode())
        if connection.recv(1):
            connections.append(connection)


def run_worker_node(job_id: int, first_node: str) -> int:
    """Add this node to Ray until the first task closes the connection.

    Args:
        job_id: The SLURM job.
        first_node: Host name of the first node.

    Returns:
        The exit code.

    Raises:
        RunFailed: The first node does not answer, or Ray ended on this node.
    """
    # The first task saves and ends this one, so requests to stop are ignored here.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    connection, address = _connect_to_first_node(job_id, first_node)
    # The address of this node in the network of the first node.
    own_ip = connection.getsockname()[0]
    log = ray_log(ray_folder(job_id))
    with connection, run_ray_server(job_id, own_ip, f"--address={address}") as server:
        while server.poll() is None and STARTED not in log.read_text(errors="replace"):
            time.sleep(POLL_S)
        connection.sendall(b"+")
        connection.settimeout(POLL_S)
        while server.poll() is None:
            try:
                if not connection.recv(1):
                    return 0
            except TimeoutError:
                continue
            except OSError:
                return 0  # the first task has ended, which srun reports
        raise RunFailed(
            f"Ray ended by itself with exit code {server.returncode}: {_read_log_end(log)}"
        )


def _connect_to_first_node(job_id: int, first_node: str) -> tuple[socket.socket, str]:
    """The connection to the first task, and the address of Ray. Raises `RunFailed`."""
    end = time.monotonic() + TIMEOUT_S
    target = (first_node, ADDRESS_PORT + job_id % PORT_COUNT)
    while True:
        try:
            connection = socket.create_connection(target, timeout=CONNECT_TIMEOUT_S)
            connection.settimeout(TIMEOUT_S)
            address = connection.makefile().readline().strip()
            if address:
                return connection, address
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise RunFailed(f"{first_node} does not answer: {reason}") from None
        time.sleep(POLL_S)


@contextlib.contextmanager
def run_ray_server(job_id: int, own_ip: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start` on this node during the block.

    Args:
        job_id: The SLURM job.
        own_ip: The address of this node.
        options: Further options of `ray start`.
    """
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    words = [
        "start",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={own_ip}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *options,
    ]
    log = ray_log(ray_folder(job_id))
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            # SLURM sends its signal to all processes of the step.
            preexec_fn=_set_server_signals,
        )
    try:
        yield server
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(SERVER_EXIT_TIMEOUT_S)
    finally:
        if server.poll() is None:
            server.kill()
        shutil.rmtree(ray_folder(job_id), ignore_errors=True)


def _set_server_signals() -> None:
    """Keep Ray running while the folds save after SLURM's signal; SIGTERM ends it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def ray_folder(job_id: int) -> Path:
    """Ray's folder on the node. Its path is short, because it contains Unix sockets."""
    return temp_folder(str(job_id))


def ray_log(folder: Path) -> Path:
    return folder / f"{os.uname().nodename}.log"


def _read_log_end(log: Path) -> str:
    """The last 300 characters of a log in one line."""
    return " ".join(log.read_text(errors="replace").split())[-300:]


def wait_for_ray_head(address: str, server: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the head of Ray listens. Raises `RunFailed`."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                reason = _read_log_end(ray_log(folder))
                raise RunFailed(f"the head of Ray did not start at {address}: {reason}") from None
            time.sleep(POLL_S)


def resolve_node_address(name: str) -> str:
    """The IPv4 address at which the other nodes reach this one.

    Raises:
        RunFailed: The name has no address, or one that only this node can use.
    """
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise RunFailed(f"{name} has no address: {error.strerror or error}") from None
    if ipaddress.ip_address(found).is_loopback and int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1:
        raise RunFailed(
            f"{name} resolves to {found} on this node, which other nodes cannot reach; "
            "fix /etc/hosts"
        )
    return found


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
