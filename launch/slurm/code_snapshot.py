"""A copy of the code in the folder of the run.

A job runs the code that was submitted, also after a requeue, when the working tree has changed in
the meantime.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import liverseg_dist
from liverseg_dist.config.shipped import shipped_configs_folder

from .. import PACKAGE

ROOT = Path(liverseg_dist.__file__).resolve().parents[1]
SOURCES = {
    "liverseg_dist": Path(liverseg_dist.__file__).resolve().parent,
    PACKAGE: Path(__file__).resolve().parents[1],
}
"""Package name in the batch files -> its folder. An editable installation imports the folder
`launch` as `liverseg_launch`, so the two names can differ."""
_configs = shipped_configs_folder()
if _configs is not None and not _configs.is_relative_to(SOURCES["liverseg_dist"]):
    # In a checkout the configs are beside the package; the copy has them where a wheel has them.
    SOURCES["liverseg_dist/configs"] = _configs
EXCLUDED = ("__pycache__", "*.pyc", ".*")


def snapshot_path(folder: Path) -> Path:
    """The folder of a snapshot of the current code."""
    return folder.absolute() / "code" / compute_code_digest()


def write_snapshot(folder: Path) -> Path:
    """Copy the packages to `folder/code/DIGEST`; the same code is copied once.

    The file `COMMIT` in it names the git commit and whether files differed from it.

    Returns:
        The folder of the copy.
    """
    target = snapshot_path(folder)
    if target.is_dir():
        return target
    # Written under another name first: a job must never see half a copy.
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for package, source in SOURCES.items():
        shutil.copytree(source, partial / package, ignore=shutil.ignore_patterns(*EXCLUDED))
    (partial / "COMMIT").write_text(describe_git_commit() + "\n", encoding="utf-8")
    try:
        os.replace(partial, target)
    except OSError:  # another submission has written the same code
        shutil.rmtree(partial, ignore_errors=True)
    return target


def describe_git_commit() -> str:
    """The commit of the working tree, with `+` if files differ from it; `unknown` outside git."""
    # An installed package may be inside another repository (in a .venv), whose commit is unrelated.
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _run_git("rev-parse", "HEAD")
        changes = _run_git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES.values())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changes else head


def _run_git(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def compute_code_digest() -> str:
    """A digest of the names and contents of all files that a snapshot has."""
    total = hashlib.sha256()
    for package, source in SOURCES.items():
        for path in _list_files(source):
            name = "/".join((package, *path.relative_to(source).parts))
            # The separators keep names and contents apart.
            total.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _list_files(source: Path) -> Iterator[Path]:
    """The files of a package that a snapshot has, sorted."""
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        # The same files as EXCLUDED leaves out of the copy.
        is_excluded = any(part.startswith((".", "__pycache__")) for part in parts)
        if path.is_file() and path.suffix != ".pyc" and not is_excluded:
            yield path
