"""How a process ends: exit functions run, its code is kept, destructors that would abort it are not waited for."""

import subprocess
import sys

import pytest


def ended(body: str) -> subprocess.CompletedProcess[str]:
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
    done = ended(f"def main():\n    atexit.register(print, 'bye', end='')\n    {last}")
    assert done.returncode == code, done.stderr
    assert done.stdout == "bye", "exit functions run, and what they print is not lost"
    assert ("ZeroDivisionError" in done.stderr) == (last == "1 / 0")


def test_what_aborts_in_teardown_does_not_spoil_the_code() -> None:
    """As a static destructor of a library does: an object in sys.modules that kills the process when it is dropped."""
    bomb = "import os\nclass Bomb:\n    def __del__(self, abort=os.abort): abort()\nsys.bomb = Bomb()\n"
    assert ended(f"{bomb}def main(): return 0").returncode == 0
    plain = subprocess.run(
        [sys.executable, "-c", f"import sys\n{bomb}"], capture_output=True, timeout=60
    )
    assert plain.returncode == -6, "without it"
