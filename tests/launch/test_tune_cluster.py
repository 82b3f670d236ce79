"""A population on an existing Ray cluster, with folds over two nodes, whose driver is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.sweep.ray_cluster import OBJECT_STORE_BYTES, token_environment, write_token
from tests.distributed.launch import clean_environment
from tests.launch.test_tune import ROOT, SWEEP, short_tmp, wait_for_rungs  # noqa: F401 - a fixture

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
PORT = 26_379 + os.getpid() % 1000


@pytest.fixture
def cluster(short_tmp: Path) -> Iterator[dict[str, str]]:  # noqa: F811
    """An existing Ray with a token; yields the environment to join it."""
    token = short_tmp / "token"
    write_token(token)
    environment = clean_environment(
        **token_environment(token), RAY_USAGE_STATS_ENABLED="0", TMPDIR=str(short_tmp)
    )
    words = [
        "start",
        "--head",
        "--block",
        f"--port={PORT}",
        "--num-cpus=2",
        "--include-dashboard=false",
    ]
    words += ["--node-ip-address=127.0.0.1", f"--temp-dir={short_tmp}", "--disable-usage-stats"]
    words += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    with (short_tmp / "head.log").open("w") as log:
        line = [sys.executable, "-m", "ray.scripts.scripts", *words]
        head = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 180
            while "Ray runtime started" not in (short_tmp / "head.log").read_text():
                assert head.poll() is None, (short_tmp / "head.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
            yield environment
        finally:
            head.terminate()
            head.wait(60)


def test_a_population_of_two_node_folds_continues_after_kill_9(
    cluster: dict[str, str],
    phantom_store: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    sweep = {**SWEEP["sweep"], "scheduler": "pbt", "folds": [0], "max_failures": 1}
    sweep["resources"] = {"cpus": 1, "nodes": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, "sweep": sweep}))
    line = [sys.executable, "-m", "launch.tune", "--address", f"127.0.0.1:{PORT}", "--json"]
    line += [
        "--config",
        str(tmp_path / "sweep.yaml"),
        f"data.store={phantom_store}",
        f"run.dir={run}",
    ]

    def start_driver() -> subprocess.Popen[str]:
        return subprocess.Popen(
            line, env=cluster, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    killed = start_driver()
    wait_for_rungs(run, 1, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    last = start_driver()
    out, err = last.communicate(timeout=600)
    assert last.returncode == 0, err[-3000:]
    trials = {
        trial["id"]: trial for trial in json.loads((run / "sweep.json").read_text())["trials"]
    }
    assert sorted(trial["state"] for trial in trials.values()) == [
        "finished",
        "finished",
        "replaced",
    ]
    child = next(trial for trial in trials.values() if trial["parent"])
    assert child["from_step"] == 2
    assert trials[child["parent"]]["score"] is not None
    assert child["params"] != trials[child["parent"]]["params"]
    steps = [
        json.loads(line)["step"]
        for line in (run / "trials" / child["id"] / "fold_0" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    assert min(steps) == 3, "it continued at the step of its parent"
    for trial in trials.values():
        state = run / "trials" / trial["id"] / "fold_0" / "checkpoints" / "step_2" / "state.json"
        assert json.loads(state.read_text())["world_size"] == 2
        assert (run / "trials" / trial["id"] / "fold_0.part1.log").exists()
    assert "Address already in use" not in out + err
