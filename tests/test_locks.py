"""Locks on file systems that differ from this machine's, by their rules as the kernel has them."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from launch.sweep.fold import is_any_fold_running
from launch.sweep.journal import Journal
from liverseg_dist.commands.main import main
from liverseg_dist.errors import UserError
from liverseg_dist.locks import hold_lock
from tests.data.sources import convert, write_source

flock = fcntl.flock


def as_nfs_4(file: int, operation: int) -> None:
    """A lock is shared with who may read, exclusive to who may write (nfs4_proc_lock in fs/nfs/nfs4proc.c)."""
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == (os.O_WRONLY if operation & fcntl.LOCK_SH else os.O_RDONLY):
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(file, operation)


def without_locks(file: int, operation: int) -> None:
    """Lustre without `-o flock`."""
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.fixture(params=[as_nfs_4, without_locks])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(fcntl, "flock", request.param)
    return request.param


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_is_taken_or_reported_as_unsupported(
    file_system: object, shared: bool, tmp_path: Path
) -> None:
    with hold_lock(tmp_path / "x", shared=shared, wait=False) as works:
        assert works == (file_system is as_nfs_4)
        if works:
            with pytest.raises(BlockingIOError), hold_lock(tmp_path / "x", wait=False):
                pass


def test_a_group_shares_a_lock_if_the_umask_allows_it(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with hold_lock(tmp_path / "x"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o664


def test_a_conversion_runs(file_system: object, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", cases=2)
    code, output = convert(source, tmp_path / "store")
    assert code == 0, output


def test_doctor_reports_it(
    file_system: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--folder", str(tmp_path)])
    assert ("has no file locks: mount it with file locks" in capsys.readouterr().out) == (
        file_system is without_locks
    )


def test_a_sweep_starts_with_a_warning(
    file_system: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trials" / "a").mkdir(parents=True)
    (tmp_path / "trials" / "a" / "fold_0.lock").touch()
    with Journal(tmp_path):
        assert ("has no locks: make sure" in caplog.text) == (file_system is without_locks)
        assert is_any_fold_running(tmp_path) == (file_system is without_locks), (
            "it might, and nobody could tell"
        )
        if file_system is as_nfs_4:
            with pytest.raises(UserError, match="another sweep uses this folder"):
                Journal(tmp_path)
