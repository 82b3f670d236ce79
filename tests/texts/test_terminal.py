"""Paths are not wrapped on a narrow terminal, so that they can be copied."""

import os
import pty
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from liverseg_dist.tracking.progress import show_progress
with show_progress("predict", 3) as line:
    for n in range(3):
        print(sys.argv[1])
        print(sys.argv[1], file=sys.stderr)
        line.advance(note="liver_1 " + "x" * 60)
        time.sleep(0.15)
"""


def test_paths_are_not_wrapped_beside_progress_bar(tmp_path: Path) -> None:
    path = "/data/" + "/".join(f"folder_{n}" for n in range(12)) + "/scan.nii.gz"
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "LINES": "20", "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the child process has ended
            break
        if not part:
            break
        shown += part
    assert child.wait(timeout=60) == 0
    os.close(leader)
    assert shown.count(path.encode()) == 6, shown.decode(errors="replace")
