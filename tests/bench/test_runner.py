"""The time limit of a section of `tools/bench/gpu`, and the table of what it wrote before."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
JOB = """
import sys, time
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
    context.measure("fourth", "a", lambda: time.sleep(60))

augmentation.run = run_slow
def crash(context):
    raise KeyError("missing")
steps.run = crash
runner.preload = lambda: None
runner.SMALL_LIMIT_S = 2.0
out = Path(sys.argv[1])
failed = runner.run_sections(["augmentation", "steps"], "cpu", out.parent, out, 60.0)
print(table.format_table(out))
print("failed:", failed)
"""


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
