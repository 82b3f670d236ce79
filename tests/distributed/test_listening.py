"""Who can knock: ranks of one node listen on loopback, those of several on the job's own address."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from liverseg_dist.distributed.tcp_store import PRIVATE_RENDEZVOUS_VARIABLE, open_listening_socket
from liverseg_dist.errors import RunFailed
from tests.distributed.launch import clean_environment, torchrun, torchrun_command

RANK = """
import json, os
from pathlib import Path
from liverseg_dist.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.world import World

def listening():
    pids = [os.getpid()] + [os.getppid()] * ("TORCHELASTIC_RUN_ID" in os.environ)  # torchrun's agent
    links = [f"/proc/{pid}/fd/{n}" for pid in pids for n in os.listdir(f"/proc/{pid}/fd")]
    inodes = {os.readlink(link) for link in links if os.path.islink(link)}
    tables = [Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return sorted({row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes})

world = World.from_environment("cpu")
with world.connected(60):
    gather_from_ranks(world.global_rank)
    found = gather_from_ranks(listening())
    if world.is_main:
        print(json.dumps(found))
    broadcast_from_rank0(None)
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.distributed
def test_ranks_of_one_node_listen_on_loopback_only() -> None:
    """As srun starts them: rank 0 serves the key-value store, every rank gloo's connections."""
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "x",
    }
    jobs = []
    for rank in ("0", "1"):
        own = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
            "SLURM_JOB_ID": "4711",
            "MASTER_ADDR": "192.0.2.77",
        }
        env = clean_environment(**slurm, **own)
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK], env=env, stdout=subprocess.PIPE, text=True
            )
        )
    try:
        outputs = jobs[0].communicate(timeout=120)[0]
        assert jobs[1].wait(60) == jobs[0].returncode == 0
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    assert _listening_addresses(outputs) <= LOOPBACK


def _listening_addresses(outputs: str) -> set[str]:
    addresses: list[list[str]] = json.loads(outputs.splitlines()[-1])
    assert all(addresses), "each rank listens for its peers"
    return {address for found in addresses for address in found}


@pytest.mark.distributed
def test_torchrun_of_one_node_listens_on_loopback_only(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    done = torchrun(2, str(tmp_path / "rank.py"))
    assert _listening_addresses(done.stdout) <= LOOPBACK, done.stderr
    assert "is open on all networks" not in done.stderr
    wider = subprocess.run(
        [word.replace("--rdzv-backend=liverseg", "--standalone") for word in torchrun_command(2)]
        + [str(tmp_path / "rank.py")],
        env=clean_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not _listening_addresses(wider.stdout) <= LOOPBACK, (
        "so this test can see an open listener"
    )
    # The script of this test does not configure logging, so the line has no prefix.
    assert "this rendezvous of torchrun is open on all networks of the node" in wider.stderr


@pytest.mark.distributed
def test_torchrun_of_several_nodes_uses_the_address_of_node_0(own: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    with socket.create_server((own, 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=liverseg", f"--rdzv-endpoint={own}:{port}", f"--rdzv-conf=rank={rank},timeout=100",
             str(tmp_path / "rank.py")],
            env=clean_environment(GLOO_SOCKET_IFNAME="lo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.communicate()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert _listening_addresses(outputs[1][0]) - LOOPBACK == {
        socket.inet_aton(own)[::-1].hex().upper()
    }
    assert "warning" not in outputs[1][1]


RESTARTED = """
import os, signal
from liverseg_dist.distributed.collectives import gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World

world = World.from_environment("cpu")
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
with world.connected(60), HeartbeatMonitor(world):
    gather_from_ranks(world.global_rank)
    if attempt == "0" and not world.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == "0":
        signal.pause()
    if world.is_main:
        print("restarted", gather_from_ranks(attempt))
    else:
        gather_from_ranks(attempt)
"""


@pytest.mark.distributed
def test_torchrun_can_restart_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RESTARTED)
    done = torchrun(2, "--max-restarts=1", str(tmp_path / "rank.py"))
    assert done.returncode == 0, done.stderr
    assert "restarted ['1', '1']" in done.stdout


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a handler leaves in the environment for its ranks is gone after the test."""
    monkeypatch.setenv(PRIVATE_RENDEZVOUS_VARIABLE, "")


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("nodes", "endpoint", "words", "expected"),
    [
        ((1, 2), "node0:29500", {}, "--nnodes=1:2: a fixed number of nodes is needed"),
        ((2, 2), "node0:0", {"rank": "0"}, "--rdzv-endpoint=node0:0: needs HOST:PORT of node 0"),
        (
            (2, 2),
            "0.0.0.0:29500",
            {"rank": "0"},
            "--rdzv-endpoint=0.0.0.0:29500: needs HOST:PORT of node 0",
        ),
        ((2, 2), "node0", {"rank": "0"}, "--rdzv-endpoint=node0: needs HOST:PORT of node 0"),
        (
            (2, 2),
            "node0:29500",
            {},
            "--rdzv-conf=rank=K is needed: the number of this node, from 0 to 1",
        ),
        ((2, 2), "node0:29500", {"rank": "2"}, "numbers of 2 nodes run from 0 to 1"),
        ((2, 2), "node0:29500", {"rank": "one"}, "--rdzv-conf=rank=one: needs a number"),
        ((1, 1), "", {"timeout": "long"}, "--rdzv-conf=timeout=long: needs a number"),
    ],
)
def test_wrong_options_end_with_one_line(
    nodes: tuple[int, int], endpoint: str, words: dict[str, str], expected: str
) -> None:
    with pytest.raises(SystemExit, match=f"liverseg: torchrun: .*{re.escape(expected)}"):
        get_rendezvous_handler(RendezvousParameters("liverseg", endpoint, "run", *nodes, **words))


@pytest.mark.usefixtures("private")
def test_nodes_that_cannot_connect_report_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = {"rank": "1", "timeout": "1"}
    node = get_rendezvous_handler(
        RendezvousParameters("liverseg", f"127.0.0.1:{port}", "run", 2, 2, **words)
    )
    with pytest.raises(
        SystemExit,
        match=f"liverseg: torchrun: node 1 cannot connect to the other ranks at 127.0.0.1:{port}; ",
    ):
        node.next_rendezvous()


@pytest.fixture
def own() -> str:
    """The address by which other machines would reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be used
        except OSError:
            pytest.skip("this machine has no network")
        return str(outward.getsockname()[0])


def test_a_job_of_several_nodes_listens_on_its_own_address(
    own: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_listening_socket(own, 0) as listener:
        assert listener.getsockname()[0] == own
    assert not caplog.messages


V4, V6 = socket.AF_INET, socket.AF_INET6


def resolve_node0_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, str]) -> None:
    """`node0` resolves to these, in this order."""

    def answer(host: str, port: int, **_: object) -> list[tuple]:
        tails = {V4: (port,), V6: (port, 0, 0)}
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, *tails[family]))
            for family, address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def test_a_name_with_several_addresses(
    own: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Debian gives a host's name the address 127.0.1.1, by which other nodes would never find it."""
    resolve_node0_to(
        monkeypatch, (V4, "127.0.1.1"), (V6, "fe80::1"), (V6, "::1"), (V4, "192.0.2.77"), (V4, own)
    )
    with open_listening_socket("node0", 0) as listener:
        assert listener.getsockname()[0] == own
    assert not caplog.messages


@pytest.mark.parametrize("address", ["127.0.1.1", "192.0.2.77"])
def test_listening_on_all_networks_gives_a_warning(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_node0_to(monkeypatch, (V4, address))
    with open_listening_socket("node0", 0) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")
    assert (
        f"node0 ({address}) is not an address of this node that other nodes can reach"
        in caplog.text
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.1.1"])
def test_loopback_is_used_if_requested(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with open_listening_socket(host, 0) as listener:
        assert listener.getsockname()[0].startswith("127.0.")
    assert not caplog.messages


def test_a_port_in_use_is_an_error() -> None:
    with (
        open_listening_socket("127.0.0.1", 0) as listener,
        pytest.raises(RunFailed, match="cannot listen for the other ranks there"),
    ):
        open_listening_socket("127.0.0.1", listener.getsockname()[1])
