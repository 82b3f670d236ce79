"""The node's cache: one copy of each case, limited size, complete files, removed at the end."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liverseg_dist.config import DataConfig
from liverseg_dist.data.loading import PatchSource
from liverseg_dist.data.loading.array_reader import MemoryArray
from liverseg_dist.data.loading.node_cache import NodeCache
from liverseg_dist.errors import UserError
from tests.data.mini_store import MiniStore, write_store

SHAPE = (16, 32, 32)
CASE_BYTES = 3 * int(np.prod(SHAPE))
GIB = 2**30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MiniStore:
    return write_store(tmp_path_factory.mktemp("cache") / "store.zarr", cases=4, shape=SHAPE)


def source(store: MiniStore, folder: Path, limit_bytes: float) -> PatchSource:
    settings = DataConfig(
        patch_size=(8, 16, 16), augmentation="none", cache_gib=limit_bytes / GIB, cache_dir=folder
    )
    return PatchSource(store, store.case_ids, settings, 0, 2)


def content(source: PatchSource, count: int = 24) -> list[bytes]:
    return [
        patch.image_CDHW.tobytes() + patch.label_DHW.tobytes()
        for patch in map(source.read_sample, range(count))
    ]


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("liverseg-*/case*"))


@pytest.mark.parametrize(("cases_that_fit", "files"), [(0.5, 0), (2.5, 4), (9, 8)])
def test_same_samples_and_limited_folder(
    store: MiniStore, tmp_path: Path, cases_that_fit: float, files: int
) -> None:
    uncached = source(store, tmp_path, 0)
    result = source(store, tmp_path, cases_that_fit * CASE_BYTES)
    assert content(result) == content(uncached)
    assert len(cached(tmp_path)) == files
    result.close()
    uncached.close()
    assert list(tmp_path.iterdir()) == []


def test_two_users_share_one_copy_which_the_last_one_removes(
    store: MiniStore, tmp_path: Path
) -> None:
    first, second = (source(store, tmp_path, 9 * CASE_BYTES) for _ in range(2))
    content(first)
    inodes = {path: path.stat().st_ino for path in tmp_path.glob("*/case*")}
    assert content(second) == content(first)
    assert {path: path.stat().st_ino for path in tmp_path.glob("*/case*")} == inodes
    first.close()
    assert len(cached(tmp_path)) == 8
    content(second)
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_case_that_another_process_is_writing_is_read_from_the_store(tmp_path: Path) -> None:
    voxels, labels = np.ones(SHAPE, np.int16), np.ones(SHAPE, np.uint8)
    cache = NodeCache(tmp_path, "store", b"", 9 * CASE_BYTES)
    (cache.folder / "a.image.part").touch()
    pair = (MemoryArray(voxels), MemoryArray(labels))
    assert cache.get_readers("a", *pair) is None
    assert cache.get_readers("b", *pair) is not None
    (cache.folder / "a.image.part").unlink()
    assert cache.get_readers("a", *pair) is not None
    cache.close()


class UnreadableArray(MemoryArray):
    def read_box(self, start: tuple[int, ...], out: np.ndarray) -> None:
        raise ValueError("damaged")


class BlockedArray(MemoryArray):
    """Decoding begins, and ends when the test allows it."""

    def __init__(self, voxels: np.ndarray) -> None:
        super().__init__(voxels)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def read_box(self, start: tuple[int, ...], out: np.ndarray) -> None:
        self.has_begun.set()
        assert self.may_end.wait(60)
        super().read_box(start, out)


def test_no_thread_waits_while_another_one_decodes(tmp_path: Path) -> None:
    """The cached case is there at once; the case that is being decoded is read from the store."""
    image, label = np.ones((1, *SHAPE), np.int16), np.ones(SHAPE, np.uint8)
    cache = NodeCache(tmp_path, "store", b"", 9 * CASE_BYTES)
    pair = (MemoryArray(image), MemoryArray(label))
    assert cache.get_readers("case_ready", *pair) is not None
    slow = BlockedArray(image)
    with ThreadPoolExecutor(2) as pool:
        decoded = pool.submit(cache.get_readers, "case_slow", slow, pair[1])
        assert slow.has_begun.wait(60)
        try:
            assert pool.submit(cache.get_readers, "case_ready", *pair).result(60) is not None
            assert pool.submit(cache.get_readers, "case_slow", *pair).result(60) is None
            assert pool.submit(cache.get_readers, "case_new", *pair).result(60) is not None
        finally:
            slow.may_end.set()
        assert decoded.result(60) is not None
    assert cached(tmp_path) == [
        f"case_{case}.{name}" for case in ("new", "ready", "slow") for name in ("image", "label")
    ]
    cache.close()


def test_adding_a_case_does_not_look_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of stat and listdir for one more case, with 5 and with 50 cases in the folder."""
    pair = (MemoryArray(np.ones((1, *SHAPE), np.int16)), MemoryArray(np.ones(SHAPE, np.uint8)))
    cache = NodeCache(tmp_path, "store", b"", 99 * CASE_BYTES)
    calls: Counter[str] = Counter()
    for name in ("stat", "listdir", "scandir"):
        real = getattr(os, name)

        def count(*arguments: Any, _real: Any = real, _name: str = name, **named: Any) -> Any:
            calls[_name] += 1
            return _real(*arguments, **named)

        monkeypatch.setattr(os, name, count)
    for_case = {}
    for number in range(51):
        calls.clear()
        assert cache.get_readers(f"case_{number}", *pair) is not None
        for_case[number] = dict(calls)
    assert for_case[50] == for_case[5]
    cache.close()


def test_the_limit_holds_after_a_failed_decode(tmp_path: Path) -> None:
    """A failed case gives its bytes back; a damaged ledger is made again from the files."""
    pair = (MemoryArray(np.ones((1, *SHAPE), np.int16)), MemoryArray(np.ones(SHAPE, np.uint8)))
    cache = NodeCache(tmp_path, "store", b"", 2 * CASE_BYTES)
    with pytest.raises(ValueError, match="damaged"):
        cache.get_readers("case_a", pair[0], UnreadableArray(np.ones(SHAPE, np.uint8)))
    assert cache.get_readers("case_b", *pair) is not None
    (cache.folder / ".ledger").write_bytes(b"0000x")
    other = NodeCache(tmp_path, "store", b"", 2 * CASE_BYTES + 64)
    assert other.get_readers("case_c", *pair) is not None
    assert other.get_readers("case_d", *pair) is None
    assert len(cached(tmp_path)) == 4
    other.close()
    cache.close()


def test_failed_decode_leaves_no_files(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, "store", b"", 9 * CASE_BYTES)
    unreadable = UnreadableArray(np.ones(SHAPE, np.uint8))
    with pytest.raises(ValueError, match="damaged"):
        cache.get_readers("a", MemoryArray(np.ones((1, *SHAPE), np.int16)), unreadable)
    assert cached(tmp_path) == []
    cache.close()


def test_another_version_of_the_store_is_another_cache(tmp_path: Path) -> None:
    old, new = NodeCache(tmp_path, "store", b"1", GIB), NodeCache(tmp_path, "store", b"2", GIB)
    assert old.folder != new.folder
    old.close()
    assert new.folder.exists()
    new.close()


def test_files_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from liverseg_dist.data.loading.node_cache import NodeCache\n"
        "cache = NodeCache(pathlib.Path(sys.argv[1]), 'other store', b'', 2**20)\n"
        "print(cache.folder, flush=True)\n"
        "time.sleep(120)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    alive = NodeCache(tmp_path, "store", b"", GIB)
    assert left.exists(), "a living process keeps its cache"
    alive.close()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert left.exists()
    NodeCache(tmp_path, "store", b"", GIB).close()
    assert list(tmp_path.iterdir()) == []


def test_processes_fill_one_cache(store: MiniStore, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from tests.data import test_node_cache as t\n"
        "from tests.data.mini_store import MiniStore\n"
        "store = MiniStore(pathlib.Path(sys.argv[1]), [f'case_{i}' for i in range(4)])\n"
        "result = t.source(store, pathlib.Path(sys.argv[2]), 9 * t.CASE_BYTES)\n"
        "import hashlib; print(hashlib.sha256(b''.join(t.content(result))).hexdigest())\n"
        "result.close()\n"
    )
    command = [sys.executable, "-c", code, str(store.path), str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    printed = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(printed) == 1
    assert list(tmp_path.iterdir()) == []


def test_unusable_folder_is_a_user_error(store: MiniStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_dir"):
        source(store, tmp_path / "missing", GIB)
