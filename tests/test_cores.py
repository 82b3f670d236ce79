"""Cores that a process may use, and how its threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liverseg_dist.cores import cgroup_quota, make_threads_wait_passively, usable_cores

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        # A job's group has no limit of its own, its parent has.
        (
            "0::/slurm/job_7\n",
            {"slurm/job_7/cpu.max": "max 100000\n", "slurm/cpu.max": "400000 100000\n"},
            4.0,
        ),
        # The path is the host's, which a container does not see: the container's own group is the mount.
        ("0::/docker/abc\n", {"cpu.max": "200000 100000\n"}, 2.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "3:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_quota_of_a_container(
    lines: str, files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text(lines)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert cgroup_quota(own, root) == expected


def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for quota, expected in ((None, 64), (1.5, 2), (0.2, 1), (100.0, 64)):
        monkeypatch.setattr("liverseg_dist.cores.cgroup_quota", lambda quota=quota: quota)
        assert usable_cores() == expected


def test_users_can_decide_how_threads_wait() -> None:
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "1"}):
        environment = dict(own)
        make_threads_wait_passively(environment)
        assert environment == own


def test_threads_of_a_command_do_not_spin() -> None:
    """In a real process: OpenMP shows the settings it read when torch was imported."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "liverseg_dist", "train", "--help"],
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "GOMP_SPINCOUNT = '0'" in done.stderr
