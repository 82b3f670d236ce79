"""The ledger: whole or absent, never stale."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liverseg_dist.evaluation import Ledger
from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.files import write_json

SCORES = {"case_id": "liver_1", "liver": {"dice": 0.1 + 0.2, "hd95_mm": None}}


def test_floats_are_read_bit_for_bit(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES)
    assert ledger.read_all() == [SCORES]
    assert ledger.done() == {"liver_1"}


def test_entries_of_another_model_are_ignored(tmp_path: Path) -> None:
    Ledger(tmp_path, {"weights_sha256": "aa", "overlap": 0.5}).write("liver_1", SCORES)
    assert Ledger(tmp_path, {"overlap": 0.5, "weights_sha256": "aa"}).done() == {"liver_1"}
    assert Ledger(tmp_path, {"weights_sha256": "bb", "overlap": 0.5}).done() == set()
    assert Ledger(tmp_path, {"weights_sha256": "aa", "overlap": 0.25}).read_all() == []
    assert Ledger(tmp_path).read("liver_1") is None


def test_entries_of_another_metrics_version_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(tmp_path).write("liver_1", SCORES)
    monkeypatch.setattr("liverseg_dist.evaluation.ledger.METRICS_VERSION", -1)
    assert Ledger(tmp_path).done() == set()


def test_cases_with_changed_inputs_are_not_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES, inputs="old files")
    assert ledger.done({"liver_1": "old files"}) == {"liver_1"}
    assert ledger.done({"liver_1": "new files"}) == set()
    assert ledger.read("liver_1", "new files") is None


def test_a_failure_is_kept_and_not_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write_failure("liver_2", "the file ends early")
    assert ledger.done() == set()
    assert ledger.read_all() == []
    assert ledger.failures() == {"liver_2": "the file ends early"}
    ledger.write("liver_2", SCORES)
    assert ledger.failures() == {}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"case_id": "liver_1"}', "\x00\x00", "[" * 100_000]
)
def test_a_damaged_entry_counts_as_absent(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    assert ledger.done() == set()
    assert ledger.failures() == {}


def test_any_cut_of_an_entry_counts_as_absent(tmp_path: Path) -> None:
    """A file may end anywhere after a crash."""
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES)
    (file,) = tmp_path.iterdir()
    whole = file.read_text().rstrip()
    for length in range(len(whole)):
        file.write_text(whole[:length])
        assert ledger.read_all() == []


def test_an_entry_under_another_name_counts_as_absent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES)
    (tmp_path / "liver_1.json").rename(tmp_path / "liver_2.json")
    assert ledger.done() == set()


def test_no_folder_yet(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "later").done() == set()


@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_any_case_id_has_its_own_plain_file_name(ids: list[str]) -> None:
    names = [encode_file_name(case_id) for case_id in ids]
    assert names[0] != names[1]
    for name in names:
        assert "/" not in name
        assert "\0" not in name
        assert not name.startswith(".")
        assert 0 < len(name.encode()) <= 200


def test_nan_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"new": float("nan")})
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_changed_digit_counts_as_damage(tmp_path: Path) -> None:
    """What still is JSON, but not what was written."""
    ledger = Ledger(tmp_path)
    ledger.write("liver_1", SCORES, inputs="a")
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for digit in ("0.30000000000000004", "null"):
        assert digit in whole
        file.write_text(whole.replace(digit, "0.9"))
        assert ledger.read_all() == []
        assert ledger.failures() == {}
    file.write_text(whole)
    assert ledger.read("liver_1", "a") == SCORES
