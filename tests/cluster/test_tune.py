"""A sweep by slurm/tune.sbatch: Ray on two nodes of a real SLURM, stopped, continued, nothing left."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import run as launch_submit
from tests.cluster.conftest import ROOT
from tests.cluster.slurm import Cluster
from tests.launch.test_tune import SWEEP

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("nodes", "dies"), [(1, ""), (2, ""), (1, "node2"), (2, "node1")])
def test_a_sweep_on_two_nodes_continues(
    nodes: int, dies: str, cluster: Cluster, phantom_store: Path, tmp_path: Path
) -> None:
    """Two folds at once, each on a node of its own; or one after the other, each on both nodes. The sweep is asked to
    stop, or loses a node."""
    run, log = tmp_path / "sweep", tmp_path / "log"
    resources = {"cpus": 1, "nodes": nodes, "parallel_folds": 2 // nodes}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({**SWEEP, "sweep": {**SWEEP["sweep"], "resources": resources}})
    )
    environment = {"LIVERSEG_HOME": str(ROOT), "LIVERSEG_PYTHON": sys.executable}
    options = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=4G", f"--output={log}")
    words = (tmp_path / "sweep.yaml", f"data.store={phantom_store}", f"run.dir={run}", "--json")
    job_id = cluster.sbatch(
        *options, ROOT / "slurm" / "tune.sbatch", *words, cwd=tmp_path, **environment
    )

    def rungs() -> int:
        assert cluster.state(job_id) in ("PENDING", "RUNNING", "CONFIGURING"), log.read_text()
        journal = run / "journal.jsonl"
        return journal.read_text().count('"rung"') if journal.exists() else 0

    cluster.wait_for(
        lambda: rungs() >= 1, 200, lambda: f"a rung: {log.read_text() if log.exists() else ''}"
    )
    if dies:
        cluster.kill_node(dies)
        cluster.run(
            "scontrol", "update", f"NodeName={dies}", "State=DOWN", "Reason=health"
        )  # saves a wait of 20 s
    else:
        cluster.run("scancel", "--signal=USR2", job_id)
    ended = cluster.wait_state(job_id, timeout_s=300)
    message = log.read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        message
    )
    assert message.count(": 2 of 2 nodes") == 2, message
    assert "continues: " in message
    result = json.loads((run / "sweep.json").read_text())
    assert [trial["state"] for trial in result["trials"]].count("finished") >= 1
    if nodes == 1 and not dies:
        hosts = {
            json.loads(path.read_text())["host"]
            for path in run.glob("trials/*/fold_*/environment.json")
        }
        assert hosts == {"node1", "node2"}, "folds ran on both"
    for state in run.glob("trials/*/fold_*/checkpoints/*/state.json"):
        assert json.loads(state.read_text())["world_size"] == nodes
    assert len(list(run.glob("trials/*/fold_*.part1.log"))) == (
        0 if nodes == 1 else len(result["trials"]) * 2
    )

    def left() -> list[str]:
        return [
            line for node in cluster.address if node != dies for line in cluster.processes_of(node)
        ]

    cluster.wait_for(lambda: not left(), 20, lambda: f"an end of {left()}")


def test_a_sweep_on_one_node_is_submitted(
    cluster: Cluster, phantom_store: Path, tmp_path: Path
) -> None:
    """Submitted by `launch`: the batch file sets the address of the first node for Ray only."""
    run = tmp_path / "sweep"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    words = [
        "tune",
        "--config",
        str(tmp_path / "sweep.yaml"),
        f"data.store={phantom_store}",
        f"run.dir={run}",
    ]
    assert launch_submit([*words, "--cpus-per-task", "2", "--mem-gib", "6", "--follow"]) == 0
    states = [trial["state"] for trial in json.loads((run / "sweep.json").read_text())["trials"]]
    assert "finished" in states
    assert set(states) <= {"finished", "pruned"}
