"""`run_and_exit`: exit functions run, the exit code is kept, and destructors that would abort the process are skipped."""

import subprocess
import sys

import pytest


def run_process(body: str) -> subprocess.CompletedProcess[str]:
    text = f"import atexit, sys\nfrom liverseg_dist.commands.main import run_and_exit\n{body}\nrun_and_exit(main)"
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("return 0", 0),
        ("return 75", 75),
        ("sys.exit(2)", 2),
        ("sys.exit()", 0),
        ("sys.exit('no')", 1),
        ("1 / 0", 1),
    ],
)
def test_exit_code(last: str, code: int) -> None:
    done = run_process(f"def main():\n    atexit.register(print, 'bye', end='')\n    {last}")
    assert done.returncode == code, done.stderr
    assert done.stdout == "bye", "exit functions run, and their output is kept"
    assert ("ZeroDivisionError" in done.stderr) == (last == "1 / 0")


def test_an_abort_in_a_destructor_does_not_change_the_exit_code() -> None:
    """An object that aborts the process when it is deleted, like a static destructor of a library."""
    bomb = "import os\nclass Bomb:\n    def __del__(self, abort=os.abort): abort()\nsys.bomb = Bomb()\n"
    assert run_process(f"{bomb}def main(): return 0").returncode == 0
    plain = subprocess.run(
        [sys.executable, "-c", f"import sys\n{bomb}"], capture_output=True, timeout=60
    )
    assert plain.returncode == -6, "without run_and_exit the process aborts"
