"""What a failing rank reports when the job's key-value store does not answer."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from liverseg_dist.distributed import heartbeat as watch_module
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.shared_failure import SharedFailure
from liverseg_dist.distributed.world import World

SERVER = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.distributed
def test_a_store_without_answers_does_not_block_a_failing_rank(
    server: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a cut network: the connection stands, and no answer comes. Stopped, the server is as mute as that."""
    assert server.stdout is not None
    port = int(server.stdout.readline())
    monkeypatch.setattr(watch_module, "REPORT_TIMEOUT_S", 2.0)
    watch = HeartbeatMonitor(World(1, 1, 2, 2, f"127.0.0.1:{port}"))
    watch._store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    watch.failure = SharedFailure(watch._store, 1, 2)
    server.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    line, has_to_print = watch.report_failure(RuntimeError("Connection closed by peer"), "unused")
    assert time.monotonic() - began < 10
    assert has_to_print
    assert line == (
        "rank 0 on 127.0.0.1 does not answer; check the network between the nodes "
        "(Connection closed by peer)"
    )
