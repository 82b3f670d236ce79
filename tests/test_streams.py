"""`guard_output_streams` in processes of their own: what is dropped, what is kept, and what is still an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liverseg_dist.errors import EXIT_USER

START = "import os, sys\nfrom liverseg_dist.streams import guard_output_streams, print_checked\nguard_output_streams()\n"


def python(
    body: str, *options: str, before: str = "", **streams: object
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *options, "-c", before + START + body]
    return subprocess.run(command, timeout=60, **({"capture_output": True} | streams))  # type: ignore[call-overload]


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1:strict")
    done = python("print('caf\\xe9 \\u2265 \\udcff'); print('\\u2265', file=sys.stderr)")
    assert done.stdout == b"caf\xe9 \\u2265 \\udcff\n"
    assert done.stderr == b"\\u2265\n"


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_large_output_passes_a_pipe_that_does_not_block(options: tuple[str, ...]) -> None:
    done = python("os.set_blocking(1, False)\nprint('x' * 1_000_000, end='')", *options)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 1_000_000, b"")


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    file = tmp_path / "file"
    closed = "import os\nfor number in (0, 1, 2): os.close(number)\n"
    done = python(
        f"f = open({str(file)!r}, 'w')\nprint('lost', flush=True)\nos.write(2, b'lost')",
        before=closed,
    )
    assert done.returncode == 0
    assert file.read_text() == ""


def test_the_broken_pipe_of_something_else_is_an_error() -> None:
    done = python("read, write = os.pipe()\nos.close(read)\nos.write(write, b'x')")
    assert done.returncode == 1
    assert b"BrokenPipeError" in done.stderr


def test_native_code_and_children_continue_after_the_reader_has_ended() -> None:
    read, write = os.pipe()
    os.close(read)
    body = "print('x', flush=True)\nimport subprocess\nraise SystemExit(subprocess.run(['echo', 'x']).returncode)"
    done = python(body, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("place", "failure"), [("/dev/full", b"'No space left on device'"), ("/dev/null", b"''")]
)
def test_a_full_disk_is_reported_and_a_missing_reader_is_not(place: str, failure: bytes) -> None:
    with open(place, "wb") as file:
        done = python(
            "print('x')\nprint(repr(print_checked('{}')), file=sys.stderr)",
            capture_output=False,
            stdout=file,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr.strip()) == (0, failure)


def test_the_script_of_a_wheel_guards_its_streams() -> None:
    """`liverseg-launch` calls `run`, without the code below `__main__`."""
    script = "import sys; from launch.cli import run; sys.exit(run())"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", script, "unknown"], stderr=full, check=False, timeout=60
        )
    assert result.returncode == EXIT_USER
