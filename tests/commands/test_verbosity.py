"""`--quiet` and `--verbose`: which lines of a command appear, and that its result stays the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.job_request import parse_command
from liverseg_dist.commands.main import COMMANDS, main
from tests.inference.small_run import SmallRun, shared_small_run


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


def run_process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "liverseg_dist", *words], capture_output=True, text=True, timeout=300
    )


def test_the_options_change_stderr_only(tmp_path: Path) -> None:
    words = ("phantom", str(tmp_path / "set"), "--cases", "1", "--size", "small")
    # The case is made once and kept, so that all calls below do the same.
    assert run_process(*words).returncode == 0
    normal = run_process(*words)
    quiet, verbose = run_process(*words, "--quiet"), run_process(*words, "--verbose")
    assert "1 scans in" in normal.stdout
    assert quiet.stdout == verbose.stdout == normal.stdout
    assert "phantom: 1/1" in normal.stderr
    assert quiet.stderr == ""
    lines = verbose.stderr.splitlines()
    assert any(line.startswith("debug: liverseg_dist ") for line in lines), verbose.stderr
    assert any(line.startswith("phantom: 1/1") for line in lines), verbose.stderr


def test_quiet_hides_facts_and_progress_but_no_result_warning_or_error(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    source = str(small_run.source)
    assert main(["convert", source, str(tmp_path / "a"), "--dry-run"]) == 0
    normal = capsys.readouterr()
    unused = ["convert.splits.kind=nnunet", "convert.splits.folds=3"]
    assert main(["convert", source, str(tmp_path / "a"), "--dry-run", "--quiet", *unused]) == 0
    quiet = capsys.readouterr()
    assert "audit: 5/5" in normal.err
    assert quiet.err == (
        "warning: convert.splits.folds change nothing with convert.splits.kind=nnunet\n"
    )
    assert "audit of 5 scans" in quiet.out
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "b"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("liverseg: ")


def test_quiet_of_one_command_does_not_change_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["phantom", str(tmp_path), "--cases", "1", "--size", "small"]
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(words) == 0
    assert "phantom: 1/1" in capsys.readouterr().err


def test_the_options_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["settings", "--quiet", "--verbose"])
    assert ended.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_documents_the_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--quiet " in text
    assert "--verbose " in text


def test_launch_accepts_the_options_of_a_command() -> None:
    assert parse_command("train", ["--quiet", "run.dir=runs/first"]).quiet
    assert parse_command("evaluate", ["runs/first", "--verbose"]).verbose


RANK = """
import sys
from liverseg_dist import console
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.logging_setup import set_up_logging
from liverseg_dist.streams import guard_output_streams, print_checked
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.tracking.terminal_table import print_table
import logging

guard_output_streams()
set_up_logging(logging.DEBUG)
start_rank("cpu")
print("a library")
console.write_lines("result")
console.write_progress("progress")
print_table(("heading",), [("cell",)])
with show_progress("work", 1) as line:
    line.advance()
logging.getLogger("liverseg_dist").info("fact")
console.write_error("failure")
print_checked("{}")
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_writes_results_and_progress(rank: str) -> None:
    environment = os.environ | {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    done = subprocess.run(
        [sys.executable, "-c", RANK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    prefix = "" if rank == "0" else f"rank {rank}: "
    debug = f"debug: {prefix}rank {rank} of 2 on cpu, started by hand"
    if rank == "0":
        assert done.stdout.splitlines() == ["a library", "result", "heading", "cell", "fact", "{}"]
        assert done.stderr.splitlines() == [
            debug,
            "progress",
            "work: 1/1, 0 s, 0 s left",
            "liverseg: failure",
        ]
    else:
        assert done.stdout == ""
        assert done.stderr.splitlines() == [debug, "liverseg: failure"]
