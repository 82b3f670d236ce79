"""Which checkpoints are valid, and which are skipped. Resuming itself: test_resume."""

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from liverseg_dist.errors import RunFailed
from liverseg_dist.training.checkpoint import MANIFEST, STATE, Checkpoints
from liverseg_dist.training.resume_state import parse_progress

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of step 5."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(5, {"a": torch.arange(6.0)}, {"progress": {"step": 5}}, wait=True)
    checkpoints.close()
    return tmp_path / "step_5"


def newest(folder: Path) -> dict | None:
    checkpoints = Checkpoints(folder.parent, keep_last=2)
    try:
        return checkpoints.newest()
    finally:
        checkpoints.close()


def sign(folder: Path) -> None:
    sums = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "sha256": sums}))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "5", '{"schema": 1}', '{"schema": 1, "sha256": []}', ""]
)
def test_a_damaged_manifest_is_skipped(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / MANIFEST).write_text(text)
    assert newest(folder) is None
    assert "step_5 is skipped" in caplog.text


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", "{}", '{"step": 4}', '{"step": "5"}'])
def test_an_invalid_state_with_a_valid_checksum_is_skipped(folder: Path, text: str) -> None:
    (folder / STATE).write_text(text)
    sign(folder)
    assert newest(folder) is None


def test_names_that_only_look_like_numbers_are_no_checkpoints(folder: Path) -> None:
    (folder.parent / "step_²").mkdir()
    (folder.parent / "step_٣").mkdir()
    state = newest(folder)
    assert state is not None
    assert parse_progress(state).step == 5


@pytest.mark.parametrize("progress", [{"step": 4}, {"step": 5, "strange": 1}, [], None])
def test_progress_of_another_version_is_an_error_of_one_line(progress: object) -> None:
    with pytest.raises(RunFailed, match="the checkpoint of step 5 cannot be read by this version"):
        parse_progress({"step": 5, "progress": progress})


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), False),
    ],
)
def test_a_failed_write_gives_a_warning_unless_a_rank_was_lost(
    error: Exception, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost rank ends the run, and the run reports that instead."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    failed: Future[None] = Future()
    failed.set_exception(error)
    checkpoints._pending = failed
    assert not checkpoints.finish()
    assert ("could not be written" in caplog.text) == warned
