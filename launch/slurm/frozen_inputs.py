"""Copies of the files that a job reads when it starts.

A job may wait in the queue for days; an edit of its config in the meantime must not change it.
"""

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


def freeze_inputs(job: BatchJob, *, write: bool) -> BatchJob:
    """Replace the config and setup files of a job with copies in its folder.

    Args:
        job: The job to submit.
        write: Whether to write the copies; a dry run only names them.

    Raises:
        UserError: A config file has an invalid path.
    """
    words = list(job.module)
    for i, (flag, value) in enumerate(itertools.pairwise(words)):
        if flag != "--config":
            continue
        try:
            file = find_config(expand_path(value))
        except ValueError as error:
            raise UserError(f"{value}: {error}") from None
        # A missing file is reported by the command itself.
        if file.is_file():
            words[i + 1] = str(_copy_file(file, job.folder, write=write))
    setup = job.setup
    if setup is not None:
        setup = _copy_file(setup, job.folder, write=write)
    return dataclasses.replace(job, module=tuple(words), setup=setup)


def _copy_file(file: Path, folder: Path, *, write: bool) -> Path:
    """The path of the copy in `folder/jobs`, named after the content of the file."""
    # Named by content, so that jobs with different contents have different copies.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    copy = folder / "jobs" / f"{file.stem}-{digest}{file.suffix}"
    if write and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return copy
