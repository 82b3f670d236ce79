"""A copy of the project's code in the run's folder, so that a job runs what was submitted, also after a requeue."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import liverseg_dist
from liverseg_dist.config.shipped import shipped_configs_folder

from .. import PACKAGE

ROOT = Path(liverseg_dist.__file__).resolve().parents[1]
SOURCES = {
    "liverseg_dist": Path(liverseg_dist.__file__).resolve().parent,
    PACKAGE: Path(__file__).resolve().parents[1],
}
"""Package, by the name under which job files start it, and its folder. An editable installation imports the folder
`launch` as `liverseg_launch`, so the two names can differ."""
_configs = shipped_configs_folder()
if _configs is not None and not _configs.is_relative_to(SOURCES["liverseg_dist"]):
    # A checkout keeps them beside the package; in a copy they lie where a wheel has them.
    SOURCES["liverseg_dist/configs"] = _configs
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
    for package, source in SOURCES.items():
        shutil.copytree(source, aside / package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (aside / "COMMIT").write_text(git_commit() + "\n", encoding="utf-8")
    try:
        os.replace(aside, target)
    except OSError:  # another submission was faster with the same code
        shutil.rmtree(aside, ignore_errors=True)
    return target


def git_commit() -> str:
    """The commit of the working tree, with `+` when files differ from it; `unknown` outside git.

    An installed package may lie inside somebody's repository (a .venv there): its commit is not ours.
    """
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "HEAD")
        return head + (
            "+"
            if _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES.values())
            else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str | Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def code_digest() -> str:
    """Of all files that are copied: names and contents."""
    total = hashlib.sha256()
    for package, source in SOURCES.items():
        for path in sorted(source.rglob("*")):
            parts = (package, *path.relative_to(source).parts)
            if (
                path.is_file()
                and path.suffix != ".pyc"
                and not any(p.startswith((".", "__pycache__")) for p in parts)
            ):
                total.update("/".join(parts).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
