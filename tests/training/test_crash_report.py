"""The file about a crash: everything that helps, and no secret; and the one line for the terminal."""

import errno
import json
from pathlib import Path

import pytest
import torch

from liverseg_dist.errors import RunFailed
from liverseg_dist.training.crash_report import summarize_exception, write_crash_report


def make_error() -> ValueError:
    try:
        raise ValueError("a bad value")
    except ValueError as error:
        return error


def test_the_report_has_rank_step_samples_and_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for reports")
    path = write_crash_report(tmp_path, make_error(), 3, 41, ["164 (liver_7)"])
    assert path is not None
    assert path.parent == tmp_path / "errors"
    assert path.name.endswith("_rank3.txt")
    text = path.read_text()
    head, _, trace = text.partition("\n\n")
    facts = json.loads(head)
    assert (facts["rank"], facts["step"]) == (3, 41)
    assert facts["last_samples"] == ["164 (liver_7)"]
    assert facts["variables"]["NCCL_DEBUG"] == "INFO"
    assert "not for reports" not in text
    assert trace.startswith("Traceback (most recent call last):")
    assert trace.rstrip().endswith("ValueError: a bad value")


def test_a_report_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    (tmp_path / "errors").write_text("a file in the place of the folder")
    assert write_crash_report(tmp_path, make_error(), 0, -1) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunFailed("run: no case could be scored"), "run: no case could be scored"),
        (make_error(), "ValueError: a bad value"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
        (MemoryError("1 GiB"), "the host has no free memory (1 GiB); use fewer data.workers"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Make train.micro_batch_size or"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/a"), "No space left on device"),
        (OSError("without a number"), "OSError: without a number"),
    ],
)
def test_one_line_with_the_remedy(error: BaseException, expected: str) -> None:
    line = summarize_exception(error)
    assert expected in line
    assert "\n" not in line


def test_a_long_reason_is_cut() -> None:
    assert len(summarize_exception(RuntimeError("x" * 10_000))) < 300
