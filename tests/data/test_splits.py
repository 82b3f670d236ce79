"""Splits: nnU-Net's folds, patients in one part, strata, split files."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import KFold

from liverseg_dist.config import SplitConfig
from liverseg_dist.data.patients import read_patients
from liverseg_dist.data.splits import (
    Splits,
    build_nnunet_folds,
    check_split_files,
    make_splits,
)
from liverseg_dist.errors import UserError


def burdens(count: int, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"liver_{i}": float(b) for i, b in enumerate(rng.gamma(1, 0.05, count))}


def patient_per_case(cases: dict[str, float]) -> dict[str, str]:
    return {case: case for case in cases}


def assert_each_case_once(splits: Splits, cases: dict[str, float]) -> None:
    parts = [splits.test, *splits.folds]
    assert sorted(case for part in parts for case in part) == sorted(cases)


def test_nnunet_folds_equal_published_list() -> None:
    published = (
        Path(__file__).resolve().parents[3] / "shared" / "reference" / "task03_nnunet_5folds.json"
    )
    if not published.is_file():
        pytest.skip(f"the published split is not at {published}")
    content = json.loads(published.read_text())
    folds = build_nnunet_folds(
        [Path(case["image"]).name.removesuffix(".nii.gz") for case in content["training"]]
    )
    for number, fold in enumerate(folds):
        expected = [
            Path(case["image"]).name.removesuffix(".nii.gz")
            for case in content[f"validation_fold{number}"]
        ]
        assert list(fold) == sorted(expected)


@pytest.mark.parametrize("count", [5, 7, 131])
def test_nnunet_folds_equal_scikit_learn(count: int) -> None:
    ids = sorted(f"case_{i}" for i in range(count))
    kfold = KFold(5, shuffle=True, random_state=12345).split(ids)
    assert build_nnunet_folds(ids) == tuple(
        tuple(ids[i] for i in validation) for _, validation in kfold
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 12, 131])
def test_every_case_is_in_one_part_and_every_fold_has_cases(count: int) -> None:
    cases = burdens(count)
    splits = make_splits(cases, patient_per_case(cases), SplitConfig())
    assert_each_case_once(splits, cases)
    if count >= 2:
        assert all(splits.folds)
        assert len(splits.folds) >= 2
    if count == 131:
        assert len(splits.test) == 26


def test_splits_do_not_depend_on_case_order() -> None:
    cases = burdens(30)
    reordered = dict(reversed(cases.items()))
    assert make_splits(cases, patient_per_case(cases), SplitConfig()) == make_splits(
        reordered, patient_per_case(cases), SplitConfig()
    )


def test_patients_stay_in_one_part() -> None:
    cases = burdens(40)
    patients = {case: f"p{int(case[6:]) % 13}" for case in cases}
    splits = make_splits(cases, patients, SplitConfig())
    assert_each_case_once(splits, cases)
    patients_by_part = [{patients[case] for case in part} for part in (splits.test, *splits.folds)]
    assert sum(map(len, patients_by_part)) == 13


def test_burden_is_balanced() -> None:
    cases = burdens(131)
    splits = make_splits(cases, patient_per_case(cases), SplitConfig())
    means = [np.mean([cases[case] for case in part]) for part in (splits.test, *splits.folds)]
    assert max(means) < 1.6 * min(means)


def test_split_file(tmp_path: Path) -> None:
    cases = burdens(4)
    file = tmp_path / "splits.json"
    file.write_text(
        json.dumps({"test": ["liver_3"], "folds": [["liver_0"], ["liver_2", "liver_1"]]})
    )
    splits = make_splits(cases, patient_per_case(cases), SplitConfig(kind="file", file=file))
    assert splits == Splits(("liver_3",), (("liver_0",), ("liver_1", "liver_2")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"folds": [["liver_0"], ["liver_0"]]}', "liver_0 occurs in more than one part"),
        ('{"folds": [["liver_9"]]}', "no part has a labelled case"),
        ("[]", "names no fold"),
        ("[3]", "not a JSON"),
        ("{", "not a JSON"),
    ],
)
def test_invalid_split_file_is_user_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.json").write_text(content)
    cases = burdens(2)
    with pytest.raises(UserError, match=message):
        make_splits(
            cases, patient_per_case(cases), SplitConfig(kind="file", file=tmp_path / "s.json")
        )


def test_nnunet_splits_final_json(tmp_path: Path) -> None:
    """`splits_final.json` of a preprocessed data set."""
    cases = burdens(4)
    a, b, c, d = sorted(cases)
    folds = [{"train": [c, d], "val": [b, a]}, {"train": [a, b], "val": [c, d]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    splits = make_splits(
        cases,
        patient_per_case(cases),
        SplitConfig(kind="file", file=tmp_path / "splits_final.json"),
    )
    assert splits == Splits((), ((a, b), (c, d)))


def test_unused_and_unknown_names_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = burdens(13)
    first, second, *rest = sorted(cases)
    (tmp_path / "s.json").write_text(json.dumps({"folds": [[first, "liver_999"], [second]]}))
    config = SplitConfig(kind="file", file=tmp_path / "s.json")
    assert make_splits(cases, patient_per_case(cases), config) == Splits((), ((first,), (second,)))
    assert "liver_999: no labelled case" in caplog.text
    assert f"never used: {', '.join(rest[:10])} and 1 more" in caplog.text
    (tmp_path / "t.json").write_text(json.dumps({"test": sorted(cases), "folds": [[]]}))
    everything = make_splits(
        cases, patient_per_case(cases), SplitConfig(kind="file", file=tmp_path / "t.json")
    )
    assert everything == Splits(tuple(sorted(cases)), ((),)), (
        "as for a store that is used for testing only"
    )
    (tmp_path / "e.json").write_text(json.dumps({"folds": [[first, second], ["liver_999"]]}))
    make_splits(cases, patient_per_case(cases), SplitConfig(kind="file", file=tmp_path / "e.json"))
    assert "fold 1 has no labelled case" in caplog.text
    check_split_files(config, [*cases, "liver_999"])
    with pytest.raises(UserError, match="liver_999: no scan of this data set"):
        check_split_files(config, list(cases))
    check_split_files(config, [*rest, "liver_999", first, second.removesuffix("_tile0")])


@pytest.mark.parametrize("kind", ["nnunet", "file"])
def test_slabs_of_scan_stay_in_one_part(kind: str, tmp_path: Path) -> None:
    """Folds of nnU-Net and of files consist of scans; a file may also name slabs."""
    scans = {f"liver_{n}_tile{tile}": f"liver_{n}" for n in range(7) for tile in range(n % 3 + 1)}
    cases = dict.fromkeys(scans, 0.1)
    folds = build_nnunet_folds(sorted(set(scans.values())))
    (tmp_path / "s.json").write_text(json.dumps({"folds": folds}))
    splits = make_splits(
        cases, patient_per_case(cases), SplitConfig(kind=kind, file=tmp_path / "s.json"), (), scans
    )
    assert [sorted({scans[case] for case in fold}) for fold in splits.folds] == [
        sorted(fold) for fold in folds
    ]
    assert sorted(case for fold in splits.folds for case in fold) == sorted(cases)
    if kind == "file":
        (tmp_path / "s.json").write_text(json.dumps({"folds": [["liver_2_tile1"], ["liver_3"]]}))
        splits = make_splits(
            cases,
            patient_per_case(cases),
            SplitConfig(kind=kind, file=tmp_path / "s.json"),
            (),
            scans,
        )
        assert splits.folds == (("liver_2_tile1",), ("liver_3_tile0",))


def test_patient_names_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("case,patient\na,Jane Doe\nb,Jane Doe\nc,John Roe\n")
    patients = read_patients(tmp_path / "p.csv", ["a", "b", "c", "d"])
    assert patients["a"] == patients["b"] != patients["c"]
    assert patients["d"] == "d"
    assert "Doe" not in str(patients)
    (tmp_path / "q.csv").write_text("case,patient\na,\n")
    with pytest.raises(UserError, match="line 2 lacks"):
        read_patients(tmp_path / "q.csv", ["a"])


def test_deep_or_long_split_file_is_read_in_time(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a JSON"):
        check_split_files(SplitConfig(kind="file", file=file), [])
    for folds in ("abc", 3, {"a": ["b"]}, [["a"], [["b"]]]):
        file.write_text(json.dumps({"folds": folds}))
        with pytest.raises(UserError, match="not a JSON"):
            check_split_files(SplitConfig(kind="file", file=file), [])
    file.write_text(json.dumps({"folds": [[f"liver_{n}" for n in range(200_000)], ["liver_7"]]}))
    with pytest.raises(UserError, match="liver_7 occurs in more than one part"):
        check_split_files(SplitConfig(kind="file", file=file), [])
