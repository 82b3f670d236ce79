"""A copy of the project's code in the run's folder, so that a job runs what was submitted, also after a requeue."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import liverseg_dist

ROOT = Path(liverseg_dist.__file__).resolve().parents[1]
PACKAGES = ("liverseg_dist", "launch")
LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def snapshot_path(folder: Path) -> Path:
    """Where the snapshot of today's code lies, or would lie."""
    return folder.absolute() / "code" / code_digest()


def take_snapshot(folder: Path) -> Path:
    """Copy the packages to `folder/code/DIGEST`; returns that path. The same code is copied once.

    `COMMIT` in it names the git commit, and says whether files had been edited since.
    """
    target = snapshot_path(folder)
    if target.is_dir():
        return target
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, aside / package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (aside / "COMMIT").write_text(git_commit() + "\n", encoding="utf-8")
    try:
        os.replace(aside, target)
    except OSError:  # another submission was faster with the same code
        shutil.rmtree(aside, ignore_errors=True)
    return target


def git_commit() -> str:
    """The commit of the working tree, with `+` when files differ from it; `unknown` outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", *PACKAGES) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def code_digest() -> str:
    """Of all files that are copied: names and contents."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            parts = path.relative_to(ROOT).parts
            if (
                path.is_file()
                and path.suffix != ".pyc"
                and not any(p.startswith((".", "__pycache__")) for p in parts)
            ):
                total.update("/".join(parts).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
