"""Which commit a run is of: in a repository, in a copy of the code, and in an installation."""

import subprocess
from pathlib import Path

import pytest
import torch

from liverseg_dist.tracking import provenance
from liverseg_dist.tracking.provenance import collect_provenance, device_name, git_commit

COMMITTER = ["-c", "user.name=n", "-c", "user.email=n@localhost", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *COMMITTER, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "liverseg_dist").mkdir()
    (tmp_path / "liverseg_dist" / "a.py").write_text("A = 1\n")
    (tmp_path / "README.md").write_text("text\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_changes_of_the_package_are_marked_and_others_are_not(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert git_commit() == head
    (repository / "README.md").write_text("another text\n")
    (repository / "liverseg_dist" / "untracked.py").write_text("")
    assert git_commit() == head
    (repository / "liverseg_dist" / "a.py").write_text("A = 2\n")
    assert git_commit() == f"{head}+"


def test_a_copy_of_the_code_names_the_commit_it_was_made_from(repository: Path) -> None:
    (repository / "COMMIT").write_text("abc123+\n")
    assert git_commit() == "abc123+"


def test_an_installation_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert git_commit() == "unknown"
    # A damaged repository, and a machine without git.
    (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    assert git_commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == "unknown"


def test_all_entries_are_texts_for_json() -> None:
    found = collect_provenance(torch.device("cpu"))
    assert {"commit", "device", "system", "python", "torch", "cuda"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
    assert torch.__version__.startswith(found["torch"])
    assert device_name(torch.device("cpu"))
