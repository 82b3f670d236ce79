"""The time limit of a section of `tools/bench/gpu`, and the table of what it wrote before."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
JOB = """
import sys, time, types
sys.path[:0] = {paths!r}
from pathlib import Path
from gpu_sections import runner, steps, table, augmentation
import torch

def run_slow(context):
    context.measure("first", "a", lambda: {{"ms": 1.5}})
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    context.measure("second", "a", fail)
    def break_down():
        raise ValueError("wrong")
    context.measure("third", "a", break_down)
    context.measure("fourth", "a", lambda: time.sleep(600))

augmentation.run = run_slow
def crash(context):
    raise KeyError("missing")
steps.run = crash
runner.preload = lambda: None
out = Path(sys.argv[1])

def tell_time():
    # The limit is reached when the section has come to the case that hangs.
    has_three = out.exists() and out.read_text().count("\\n") >= 3
    return time.monotonic() + (1000 if has_three else 0)

runner.time = types.SimpleNamespace(monotonic=tell_time, sleep=time.sleep)
failed = runner.run_sections(["augmentation", "steps"], "cpu", out.parent, out, 5000.0)
print(table.format_table(out))
print("failed:", failed)
"""


FORKED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from gpu_sections import runner
import torch

torch.cuda._is_in_bad_fork = lambda: True
runner.preload = lambda: None
out = Path(sys.argv[1])
print(runner.run_in_process("nnunet", "cpu", out.parent, out, 200.0))
"""


def test_without_forks_a_section_is_a_program_of_its_own(tmp_path: Path) -> None:
    """As after a first use of CUDA in the program."""
    out = tmp_path / "out.jsonl"
    script = FORKED.format(paths=[str(BENCH), str(BENCH.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "done\n", done.stderr
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line["system"] for line in lines] == ["eager", "compiled"]


def test_a_section_that_hangs_or_fails_keeps_its_lines(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    script = JOB.format(paths=[str(BENCH), str(BENCH.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=True
    )
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    statuses = [(line["section"], line.get("case"), line["status"]) for line in lines]
    assert statuses == [
        ("augmentation", "first", "measured"),
        ("augmentation", "second", "out of memory"),
        ("augmentation", "third", "failed"),
        ("augmentation", None, "stopped at its time limit"),
        ("steps", "section", "failed"),
        ("steps", None, "failed"),
    ]
    assert lines[2]["reason"] == "ValueError: wrong"
    assert "| first | a | 1.5 |" in done.stdout
    assert "- second, a: out of memory (CUDA out of memory. Tried" in done.stdout
    # The first one not because it ran out of time, but because a case failed.
    assert "failed: ['augmentation', 'steps']" in done.stdout
