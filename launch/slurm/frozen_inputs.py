"""Copies of the files that a job reads when it starts: an edit must not change a job that waits in the queue."""

import dataclasses
import hashlib
import itertools
import shutil
from pathlib import Path

from liverseg_dist.config.shipped import find_config
from liverseg_dist.errors import UserError
from liverseg_dist.texts.paths import expand_path

from .sbatch import BatchJob


def find_setup_file(file: Path | None) -> Path | None:
    """The file of `--setup` as an absolute path. Raises `UserError` when it is missing."""
    if file is None:
        return None
    if not file.expanduser().is_file():
        raise UserError(f"--setup {file}: no such file")
    return file.expanduser().absolute()


def freeze_configs(job: BatchJob, *, write: bool) -> BatchJob:
    """Let the job read copies of its config and setup files: an edit must not change a job that waits in the queue."""
    words = list(job.module)
    for i, (flag, value) in enumerate(itertools.pairwise(words)):
        if flag != "--config":
            continue
        try:
            file = find_config(expand_path(value))
        except ValueError as error:
            raise UserError(f"{value}: {error}") from None
        if file.is_file():
            words[i + 1] = str(_keep_copy(file, job.folder, write=write))
    setup = job.setup
    if setup is not None:
        setup = _keep_copy(setup, job.folder, write=write)
    return dataclasses.replace(job, module=tuple(words), setup=setup)


def _keep_copy(file: Path, folder: Path, *, write: bool) -> Path:
    """The file's copy in `folder/jobs`, named after its content."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    copy = folder / "jobs" / f"{file.stem}-{digest}{file.suffix}"
    if write and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return copy
