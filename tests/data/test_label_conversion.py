"""Conversion of data sets with any labels: other organs, regions, merges, files, joined sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.labels import LITS_SCHEME
from tests.data.label_sources import block_label, write_dataset, write_structure_case
from tests.data.sources import convert, run, write_source

AMOS = [
    "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach",
    "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum",
    "bladder", "prostate/uterus",
]  # fmt: skip


def convert_done(source: Path, store: Path, *more: str) -> CaseStore:
    code, _ = convert(source, store, "convert.splits.folds=2", *more)
    assert code == 0
    assert run("verify", store)[0] == 0
    return CaseStore.open(store)


def source_label(store: CaseStore, case_id: str) -> np.ndarray:
    return store.source_label(case_id)


def test_sixteen_classes(tmp_path: Path) -> None:
    labels = {"background": 0, **{name: value for value, name in enumerate(AMOS, 1)}}
    masks = [block_label(list(range(1, 16))), block_label(list(range(1, 12)))]
    store = convert_done(write_dataset(tmp_path / "amos", labels, masks), tmp_path / "s")
    assert store.labels.structure_names == tuple(AMOS)
    assert store.labels.num_classes == 16
    assert np.array_equal(source_label(store, "case_0"), masks[0])
    meta = store.meta("case_0")
    assert meta.class_voxels[1:] == tuple(np.bincount(masks[0].ravel())[1:])
    assert (meta.lesions, meta.annotated) == ({}, tuple(AMOS))
    findings = {f["code"]: f["message"] for f in store.audit["case_1"]["findings"]}
    assert "duodenum, bladder, prostate/uterus" in findings["structures_absent"]
    assert store.root["coverage"]["liver_inside"] == 1.0
    page = (tmp_path / "s/audit.html").read_text()
    assert "prostate/uterus" in page


def test_one_class_with_a_gap(tmp_path: Path) -> None:
    labels = {"0": "background", "7": "spleen"}
    store = convert_done(
        write_dataset(tmp_path / "src", labels, [block_label([7]), block_label([7])]),
        tmp_path / "s",
    )
    assert store.labels.class_names == ("background", "spleen")
    assert set(np.unique(source_label(store, "case_0"))) == {0, 1}


def test_two_lesion_structures_and_their_samples(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "liver tumor": 3, "kidney": 4, "kidney tumor": 9}
    mask = block_label([1, 4])
    mask[8:11, 3:5, 3:5] = 3
    mask[8:10, 3:5, 10:12] = 9
    mask[12:14, 3:4, 11:12] = 9
    store = convert_done(write_dataset(tmp_path / "src", labels, [mask, mask]), tmp_path / "s")
    liver, tumour = store.labels.structure("liver"), store.labels.structure("liver tumor")
    assert set(tumour.values) < set(liver.values)
    assert store.labels.structure("kidney tumor").inside == "kidney"
    assert store.meta("case_0").lesions == {"liver tumor": 1, "kidney tumor": 2}
    rows, stored = store.foreground("case_0"), store.label("case_0")
    assert (stored[tuple(rows[:, 2:].T)] == rows[:, 0]).all()
    assert set(rows[:, 0]) == {1, 2, 3, 4}
    assert store.root["coverage"]["kidney tumors"] == 4  # of both cases


def test_regions_with_ignore(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": [1, 2], "tumour": 2, "ignore": 3}
    mask = block_label([1, 2, 3])
    source = write_dataset(tmp_path / "src", labels, [mask, mask], regions_class_order=[1, 2])
    store = convert_done(source, tmp_path / "s")
    assert store.labels == LITS_SCHEME
    expected = np.where(mask == 3, 255, mask)
    assert np.array_equal(source_label(store, "case_0"), expected)
    assert "ignored_voxels" in {f["code"] for f in store.audit["case_0"]["findings"]}


def test_settings_rename_merge_and_drop(tmp_path: Path) -> None:
    labels = {"background": 0, "right kidney": 2, "left kidney": 3, "liver": 6, "spleen": 9}
    source = write_dataset(tmp_path / "src", labels, [block_label([2, 3, 6, 9])] * 2)
    setting = "convert.labels={hepar: liver, kidneys: [right kidney, 3], spleen: drop}"
    store = convert_done(source, tmp_path / "s", setting)
    assert store.labels.structure_names == ("hepar", "kidneys")
    expected = np.array([0, 0, 2, 2, 0, 0, 1, 0, 0, 0])[block_label([2, 3, 6, 9])]
    assert np.array_equal(source_label(store, "case_0"), expected)
    # The settings are part of the store, and the same line continues it.
    assert store.convert.labels is not None
    assert convert(source, tmp_path / "s", "convert.splits.folds=2", setting)[1]["converted"] == 0


def test_another_scheme_does_not_continue_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2}
    source = write_dataset(tmp_path / "src", labels, [block_label([1, 2])] * 2)
    convert_done(source, tmp_path / "s")
    index = json.loads((source / "dataset.json").read_text())
    index["labels"] = {"background": 0, "liver": 1, "tumour": 2}
    (source / "dataset.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert convert(source, tmp_path / "s", "convert.splits.folds=2")[0] == 2
    error = capsys.readouterr().err
    assert "labels.spleen was" in error
    assert "labels.tumour was none, is" in error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("convert.labels={tumour: cancr}", "no label is called cancr; the labels are 0 background"),
        ("convert.labels={}", "names no label"),
        ('convert.labels={"*": drop}', "no structure is left"),
        ("convert.labels={liver: {inside: torso}}", "inside torso, which is no structure"),
        ("convert.labels={liver: {form: x}}", "form is no setting of a structure"),
        ('convert.annotated={"case_*": [lung]}', "no structure is called lung"),
        ('convert.annotated={"mr_*": [liver]}', "no case is called so"),
        ("convert.slab.around=[lung]", "no structure is called lung"),
    ],
)
def test_a_setting_that_names_nothing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2}
    source = write_dataset(tmp_path / "src", labels, [block_label([1, 2])])
    assert convert(source, tmp_path / "s", setting)[0] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_value_outside_the_scheme_names_file_and_value(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2}
    masks = [block_label([1, 2]), block_label([1, 5])]
    code, result = convert(write_dataset(tmp_path / "src", labels, masks), tmp_path / "s")
    assert code == 0
    (finding,) = [f for f in result["audit"]["case_1"]["findings"] if f["code"] == "label_values"]
    assert "labelsTr/case_1.nii.gz: label values 5 (" in finding["message"]
    assert "expected 0 background, 1 liver, 2 spleen" in finding["message"]


def test_one_file_per_structure(tmp_path: Path) -> None:
    blocks = block_label([1, 2, 3])
    masks = {"liver": blocks == 1, "spleen": blocks == 2, "stomach": blocks == 3}
    masks["stomach"] = masks["stomach"] | ((blocks == 2) & (np.arange(20)[:, None, None] > 12))
    write_structure_case(tmp_path / "ts", "s0001", masks, 0)
    write_structure_case(tmp_path / "ts", "s0002", {**masks, "aorta": blocks == 0}, 1)
    del masks["spleen"]
    write_structure_case(tmp_path / "ts", "s0003", masks, 2)
    settings = "convert.labels={liver: , spleen: , stomach: }"
    store = convert_done(tmp_path / "ts", tmp_path / "s", settings)
    assert store.labels.structure_names == ("liver", "spleen", "stomach")
    label = source_label(store, "s0001")
    assert np.array_equal(label == 3, masks["stomach"])
    assert np.array_equal(label == 1, blocks == 1)
    findings = {f["code"]: f["message"] for f in store.audit["s0001"]["findings"]}
    assert "spleen and stomach in" in findings["structures_overlap"]
    assert store.meta("s0001").annotated == ("liver", "spleen", "stomach")
    assert store.meta("s0003").annotated == ("liver", "stomach")


def test_structure_files_on_different_grids_are_refused(tmp_path: Path) -> None:
    blocks = block_label([1, 2])
    write_structure_case(tmp_path / "ts", "s0001", {"liver": blocks == 1}, 0)
    write_structure_case(
        tmp_path / "ts", "s0002", {"liver": blocks == 1, "spleen": (blocks == 2)[1:]}, 1
    )
    code, result = convert(tmp_path / "ts", tmp_path / "s")
    assert code == 1
    codes = {f["code"] for f in result["audit"]["s0002"]["findings"]}
    assert "structure_grid" in codes


def test_partly_labelled_data_sets_are_joined(tmp_path: Path) -> None:
    lits = write_source(tmp_path / "lits", cases=2, shape=(20, 32, 36))
    labels = {"background": 0, "spleen": 1, "liver": 6}
    organs = write_dataset(tmp_path / "organs", labels, [block_label([1, 6])] * 2)
    store_path = tmp_path / "s"
    code, _ = run(
        "convert",
        lits,
        organs,
        store_path,
        "convert.splits.folds=2",
        "convert.splits.test_fraction=0",
        "convert.workers=1",
    )
    assert code == 0
    assert run("verify", store_path)[0] == 0
    store = CaseStore.open(store_path)
    assert store.labels.structure_names == ("liver", "tumour", "spleen")
    assert store.case_ids == ("lits_liver_0", "lits_liver_1", "organs_case_0", "organs_case_1")
    assert store.meta("lits_liver_0").annotated == ("liver", "tumour")
    assert store.meta("organs_case_0").annotated == ("liver", "spleen")
    # The liver is 6 in one source and 1 in the store, in which the spleen is a class of its own.
    label = source_label(store, "organs_case_0")
    assert np.array_equal(label == 1, block_label([1, 6]) == 6)
    assert np.array_equal(label == 3, block_label([1, 6]) == 1)
    for fold in range(2):
        kinds = {case_id.split("_")[0] for case_id in store.ids("validation", fold)}
        assert kinds == {"lits", "organs"}


def test_cases_list_their_annotated_structures(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2}
    masks = [block_label([1, 2])] * 3
    source = write_dataset(
        tmp_path / "src", labels, masks, annotated={"case_0": ["liver"], "case_1": ["Spleen"]}
    )
    store = convert_done(source, tmp_path / "s")
    found = [store.meta(case_id).annotated for case_id in store.case_ids]
    assert found == [("liver",), ("spleen",), ("liver", "spleen")]
    assert "not_annotated" in {f["code"] for f in store.audit["case_0"]["findings"]}
    table = tmp_path / "annotated.csv"
    table.write_text("case,structures\ncase_2,spleen\n")
    store = convert_done(
        source,
        tmp_path / "other",
        'convert.annotated={"case_[01]": [liver, spleen]}',
        f"convert.annotated_table={table}",
    )
    found = [store.meta(case_id).annotated for case_id in store.case_ids]
    assert found == [("liver", "spleen"), ("liver", "spleen"), ("spleen",)]


def test_the_slab_can_lie_around_some_structures(tmp_path: Path) -> None:
    mask = np.zeros((100, 32, 36), np.uint8)
    mask[5:15, 4:20, 4:20] = 1
    mask[80:95, 4:20, 4:20] = 2
    labels = {"background": 0, "bladder": 1, "liver": 2}
    source = write_dataset(tmp_path / "src", labels, [mask, mask])
    options = ["convert.slab.policy=window", "convert.slab.around=[bladder]"]
    store = convert_done(source, tmp_path / "s", *options)
    counts = store.meta("case_0").class_voxels
    assert counts[1] == (mask == 1).sum()
    assert counts[2] == 0
    findings = {f["code"]: f["message"] for f in store.audit["case_0"]["findings"]}
    assert "100.0 % of the liver" in findings["slab_loss"]
