"""Who can knock: ranks of one node listen on loopback, those of several on the job's own address."""

import json
import socket
import subprocess
import sys

import pytest

from liverseg_dist.distributed.world import _listen
from liverseg_dist.errors import RunFailed
from tests.distributed.launch import clean_environment

RANK = """
import json, os
from pathlib import Path
from liverseg_dist.distributed.collectives import agree, gather
from liverseg_dist.distributed.world import World

def listening():
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    inodes = {os.readlink(link) for link in links if os.path.islink(link)}
    tables = [Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return sorted({row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes})

world = World.from_environment("cpu")
with world.connected(60):
    gather(world.global_rank)
    found = gather(listening())
    if world.is_main:
        print(json.dumps(found))
    agree(None)
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.distributed
def test_ranks_of_one_node_listen_on_loopback_alone() -> None:
    """As srun starts them: rank 0 serves the key-value store, every rank gloo's connections."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "x"}
    jobs = []
    for rank in ("0", "1"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_JOB_ID": "4711", "MASTER_ADDR": "192.0.2.77"}
        env = clean_environment(**slurm, **own)
        jobs.append(subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=subprocess.PIPE, text=True))
    try:
        said = jobs[0].communicate(timeout=120)[0]
        assert jobs[1].wait(60) == jobs[0].returncode == 0
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    addresses: list[list[str]] = json.loads(said.splitlines()[-1])
    assert all(addresses), "each rank listens for its peers"
    assert {address for found in addresses for address in found} <= LOOPBACK


def test_a_job_of_several_nodes_listens_on_its_own_address(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be used
        except OSError:
            pytest.skip("this machine has no network")
        own = outward.getsockname()[0]
    with _listen(own, 0, several_nodes=True) as door:
        assert door.getsockname()[0] == own
    assert capsys.readouterr().err == ""


def test_a_wider_door_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Debian gives a host's name the address 127.0.1.1, by which other nodes would never find it."""
    with _listen("127.0.1.1", 0, several_nodes=True) as door:
        assert door.getsockname()[0] == "0.0.0.0"
    assert "127.0.1.1 is 127.0.1.1 here, by which other nodes cannot reach it" in capsys.readouterr().err
    with _listen("127.0.0.1", 0, several_nodes=False) as door:
        assert door.getsockname()[0] == "127.0.0.1"
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_told() -> None:
    with (
        _listen("127.0.0.1", 0, several_nodes=False) as door,
        pytest.raises(RunFailed, match="ranks cannot meet there"),
    ):
        _listen("127.0.0.1", door.getsockname()[1], several_nodes=False)
