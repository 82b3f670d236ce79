"""The loading index: the same samples with it, fewer calls, and never that of another content."""

import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liverseg_dist.config import DataConfig
from liverseg_dist.data.loading import PatchSource
from liverseg_dist.data.loading.index_writer import add_index, has_complete_index
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import INDEX_FILE
from liverseg_dist.data.store.verify_store import verify_store
from tests.data.sources import convert, run, tree, write_source

SETTINGS = DataConfig(patch_size=(16, 16, 16), augmentation="strong", oversample_foreground=0.5)
SAMPLES = 12


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only. Three labelled cases."""
    folder = tmp_path_factory.mktemp("index")
    source = write_source(folder / "src", cases=3, shape=(66, 24, 28))
    assert convert(source, folder / "s.zarr")[0] == 0
    return folder / "s.zarr"


@pytest.fixture
def store(undamaged: Path, tmp_path: Path) -> Path:
    shutil.copytree(undamaged, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture
def without_index(store: Path) -> Path:
    """A store as an earlier version has written it."""
    (store / INDEX_FILE).unlink()
    sums = (store / "SHA256SUMS").read_text().splitlines(keepends=True)
    (store / "SHA256SUMS").write_text("".join(line for line in sums if INDEX_FILE not in line))
    return store


def open_source(store: Path | str) -> PatchSource:
    opened = CaseStore.open(store)
    return PatchSource(opened, opened.ids("train", "all"), SETTINGS, 3, 4)


def samples(store: Path | str) -> list[tuple]:
    source = open_source(store)
    found = []
    for patch in map(source.read_sample, range(SAMPLES)):
        voxels = patch.image_CDHW.tobytes() + patch.label_DHW.tobytes()
        found.append((patch.plan, patch.traits, voxels))
    source.close()
    return found


def test_samples_are_the_same_bytes_with_and_without_the_index(
    undamaged: Path, without_index: Path
) -> None:
    expected = samples(without_index)
    assert open_source(undamaged)._index is not None
    assert open_source(without_index)._index is None
    assert samples(undamaged) == expected
    assert samples(f"file://{undamaged}") == expected
    assert any(plan.centre is not None for plan, _, _ in expected)


WATCHED: list[Counter[str]] = []
"""Audit hooks cannot be removed: the last counter counts, if there is one."""


def _count_open(event: str, arguments: tuple) -> None:
    if WATCHED and event == "open" and INDEX_STORE[-1] in str(arguments[0]):
        WATCHED[-1]["open"] += 1


INDEX_STORE: list[str] = []


@contextmanager
def counted_calls(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count opens and stats below a store."""
    if not INDEX_STORE:
        sys.addaudithook(_count_open)
    INDEX_STORE.append(str(store))
    counter: Counter[str] = Counter()
    real = os.stat

    def stat(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if str(store) in str(path):
            counter["stat"] += 1
        return real(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        WATCHED.append(counter)
        try:
            yield counter
        finally:
            WATCHED.clear()


def test_a_sample_of_an_unknown_case_opens_its_two_shards_only(
    undamaged: Path, without_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sample of a known case does when its files are closed. Without the index: 6 more."""
    counts = {}
    for name, path in (("with", undamaged), ("without", without_index)):
        source = open_source(path)
        cases = [source.plan_sample(0).case_id]
        source.read_sample(0)
        first_new = next(n for n in range(1, 40) if _case_of(source, n) not in cases)
        with counted_calls(path, monkeypatch) as counter:
            source.read_sample(first_new)
        counts[name] = dict(counter)
        with counted_calls(path, monkeypatch) as counter:
            source.read_sample(first_new)
        assert dict(counter) == {}
        source.close()
    assert counts["with"] == {"open": 2}
    assert counts["without"]["open"] >= 7
    assert counts["without"]["stat"] >= 1


def _case_of(source: PatchSource, index: int) -> str:
    """The case of a sample, without opening it."""
    return source._order.draw_sample(index).case_id


def test_an_index_of_another_content_is_not_used(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = samples(store)
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["liverseg"]["content_sha256"] = "0" * 64
    (store / "zarr.json").write_text(json.dumps(root))
    with caplog.at_level(logging.WARNING):
        assert open_source(store)._index is None
    assert "another version of the store" in caplog.text
    assert samples(store) == expected
    assert not has_complete_index(CaseStore.open(store))
    (store / "SHA256SUMS").unlink()
    shutil.rmtree(store / ".liverseg")
    assert [str(defect) for defect in verify_store(store, lambda case_id: None)] == [
        f"{INDEX_FILE}: belongs to another version of the store; run liverseg index"
    ]


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.97, 1.0])
def test_damage_changes_no_sample(
    undamaged: Path, store: Path, caplog: pytest.LogCaptureFixture, position: float
) -> None:
    """Bits of records, directory and trailer; one warning, and `verify` and `convert` notice it."""
    path = store / INDEX_FILE
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(position * len(content)))] ^= 0b100
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert samples(store) == samples(undamaged)
    assert len([r for r in caplog.records if INDEX_FILE in r.message]) == 1
    defects = verify_store(store, lambda case_id: None)
    assert [(defect.case_id, defect.where) for defect in defects] == [("", INDEX_FILE)]
    assert not has_complete_index(CaseStore.open(store))


@pytest.mark.parametrize("length", [0, 10, 300])
def test_a_truncated_index_changes_no_sample(undamaged: Path, store: Path, length: int) -> None:
    path = store / INDEX_FILE
    path.write_bytes(path.read_bytes()[:length])
    assert samples(store) == samples(undamaged)


def test_verify_compares_the_index_with_the_arrays(store: Path, undamaged: Path) -> None:
    """An index whose checksums are right, but which was made from other foreground voxels."""
    opened = CaseStore.open(store)
    genuine = CaseStore.foreground

    class Forged(CaseStore):
        def foreground(self, case_id: str) -> np.ndarray:
            rows = genuine(self, case_id)
            return rows[1:] if case_id == "liver_1" else rows

    add_index(Forged(opened.path, opened.root), lambda case_id: None)
    assert [str(defect) for defect in verify_store(store, lambda case_id: None)] == [
        f"case liver_1, {INDEX_FILE}: differs from the arrays of the case; run liverseg index"
    ]
    assert run("index", store)[0] == 0
    assert tree(store) == tree(undamaged)


def test_the_command_adds_the_index_to_an_earlier_store(
    undamaged: Path, without_index: Path
) -> None:
    assert verify_store(without_index, lambda case_id: None) == []
    # What a killed process leaves.
    (without_index / f".{INDEX_FILE}.1.tmp").write_bytes(b"half")
    code, result = run("index", without_index)
    assert (code, result["left_out"]) == (0, {})
    assert tree(without_index) == tree(undamaged)
    assert verify_store(without_index, lambda case_id: None) == []


def test_a_process_killed_before_the_checksum_leaves_a_correct_store(
    without_index: Path, undamaged: Path
) -> None:
    shutil.copy(undamaged / INDEX_FILE, without_index / INDEX_FILE)
    assert verify_store(without_index, lambda case_id: None) == []
    assert samples(without_index) == samples(undamaged)


def test_a_damaged_case_is_left_out_and_named(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = store / "cases/liver_2/image/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, result = run("index", store)
    assert (code, list(result["left_out"])) == (1, ["liver_2"])
    assert "case liver_2: " in capsys.readouterr().err
