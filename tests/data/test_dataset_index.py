"""Reading a data set: listed cases, missing files, refused indexes, unread files."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liverseg_dist.data.io.dataset_index import DatasetIndex, read_dataset
from liverseg_dist.errors import UserError

INDEX = {
    "name": "Liver",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "cancer"},
    "training": [
        {"image": "./imagesTr/liver_10.nii.gz", "label": "./labelsTr/liver_10.nii.gz"},
        {"image": "./imagesTr/liver_2.nii.gz", "label": "./labelsTr/liver_2.nii.gz"},
    ],
    "test": ["./imagesTs/liver_3.nii.gz"],
}
FILES = (
    "imagesTr/liver_10.nii.gz",
    "imagesTr/liver_2.nii.gz",
    "imagesTs/liver_3.nii.gz",
    "labelsTr/liver_10.nii.gz",
    "labelsTr/liver_2.nii.gz",
)


def write_files(folder: Path, index: object | None = INDEX, files: tuple[str, ...] = FILES) -> Path:
    """A folder of empty files: listing a data set opens no scan."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if index is not None:
        (folder / "dataset.json").write_text(
            index if isinstance(index, str) else json.dumps(index), encoding="utf-8"
        )
    return folder


def index_with(**keys: object) -> dict:
    """INDEX with other keys."""
    return {**INDEX, **keys}


def list_ids(dataset: DatasetIndex) -> list[str]:
    return [case.case_id for case in (*dataset.training, *dataset.test)]


def test_cases_are_sorted_by_id(tmp_path: Path) -> None:
    dataset = read_dataset(write_files(tmp_path))
    assert dataset.name == "Liver"
    assert list_ids(dataset) == ["liver_10", "liver_2", "liver_3"]
    assert dataset.training[0].image == tmp_path / "imagesTr/liver_10.nii.gz"
    assert dataset.training[0].label == tmp_path / "labelsTr/liver_10.nii.gz"
    assert dataset.test[0].label is None
    assert not dataset.notes
    assert not any(case.findings for case in (*dataset.training, *dataset.test))


def test_missing_files_are_findings_of_cases(tmp_path: Path) -> None:
    dataset = read_dataset(write_files(tmp_path, files=("imagesTr/liver_10.nii.gz",)))
    first, second = dataset.training
    assert [(f.severity, f.code) for f in first.findings] == [("warning", "label_missing")]
    assert [(f.severity, f.code) for f in second.findings] == [
        ("error", "image_missing"),
        ("warning", "label_missing"),
    ]
    assert first.label is None
    assert [f.code for f in dataset.test[0].findings] == ["image_missing"]
    assert "labelsTr/liver_10.nii.gz" in first.findings[0].message


def test_training_entry_without_label(tmp_path: Path) -> None:
    dataset = read_dataset(
        write_files(tmp_path, index_with(training=[{"image": "imagesTr/liver_2.nii.gz"}]))
    )
    assert dataset.training[0].label is None


def test_macos_metadata_files_are_ignored(tmp_path: Path) -> None:
    metadata = {"image": "./imagesTr/._liver_2.nii.gz", "label": "./labelsTr/._liver_2.nii.gz"}
    dataset = read_dataset(
        write_files(
            tmp_path, index_with(training=[*INDEX["training"], metadata], test=["imagesTs/._x.nii"])
        )
    )
    assert list_ids(dataset) == ["liver_10", "liver_2"]
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "imagesTr" / "._liver_2.nii.gz").touch()
    assert list_ids(read_dataset(tmp_path)) == ["liver_10", "liver_2", "liver_3"]


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "liver", "2": "tumour"},
        {"0": "background", "1": "Liver", "2": "Tumor"},
        {"background": 0, "liver": 1, "tumor": 2},
    ],
)
def test_label_name_spellings(tmp_path: Path, labels: dict) -> None:
    assert len(read_dataset(write_files(tmp_path, index_with(labels=labels))).training) == 2


def test_nnunet_dataset_json_without_scan_list(tmp_path: Path) -> None:
    """nnU-Net since version 2. Its region names liver with tumour."""
    labels = {"background": 0, "liver": [1, 2], "tumor": 2}
    folder = write_files(
        tmp_path, {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    )
    for image in (folder / "imagesTr").iterdir():
        image.rename(image.with_name(image.name.replace(".nii", "_0000.nii")))
    dataset = read_dataset(folder)
    assert dataset.training
    assert all(case.label is not None and "_0000" not in case.case_id for case in dataset.training)
    (note,) = [note for note in dataset.notes if "lists no scans" in note.message]
    assert "images and labels are paired" in note.message
    # It is the usual form, so no warning.
    assert note.severity == "info"


def test_monai_list(tmp_path: Path) -> None:
    content = json.loads(json.dumps(index_with(labels=None)))
    tests = content.pop("test")
    content["testing"] = [{"image": name} for name in tests]
    content["validation"] = content["training"][:1]
    for entry in content["training"]:
        entry["fold"] = 0
    dataset = read_dataset(write_files(tmp_path, content))
    assert len(dataset.test) == len(tests)
    messages = " ".join(note.message for note in dataset.notes)
    for text in ("names no labels", "1 scans under validation, which is not read", "names a fold"):
        assert text in messages


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"1": "background", "2": "liver", "3": "cancer"}, "background is .*; it is always 0"),
        (["background", "liver", "cancer"], "a mapping such as"),
        ({}, "a mapping such as"),
        ({"0": "background"}, "no structure is named"),
        ({"background": 0, "liver": "one"}, "liver is .one.; expected a label value"),
        ({"background": 0, "liver": 1000}, "value 1000 is not from 0 to 255"),
        (
            {"0": "background", "1": "liver", "01": "spleen"},
            "liver and spleen have the same values",
        ),
    ],
)
def test_labels_that_are_no_scheme_are_refused(tmp_path: Path, labels: object, reason: str) -> None:
    with pytest.raises(UserError, match=f"dataset.json: labels: .*{reason}"):
        read_dataset(write_files(tmp_path, index_with(labels=labels)))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../other/scan.nii.gz",
        "imagesTr/../../scan.nii.gz",
        "..",
        "",
        " ",
        "imagesTr/a\0b.nii",
        5,
        None,
        [],
    ],
)
@pytest.mark.parametrize("place", ["image", "label", "test"])
def test_paths_outside_folder_are_refused(tmp_path: Path, name: object, place: str) -> None:
    entry = {"image": "imagesTr/liver_2.nii.gz", "label": "labelsTr/liver_2.nii.gz"}
    if place == "label" and name is None:
        assert (
            read_dataset(write_files(tmp_path, index_with(training=[{**entry, "label": None}])))
            .training[0]
            .label
            is None
        )
        return
    index = (
        index_with(test=[name])
        if place == "test"
        else index_with(training=[{**entry, place: name}])
    )
    with pytest.raises(UserError, match=r"dataset\.json") as caught:
        read_dataset(write_files(tmp_path, index))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not valid JSON"),
        (index_with(training="liver"), "a list"),
        (index_with(training=["liver_1.nii.gz"]), "a training entry is"),
        (index_with(training=[{"label": "x.nii"}]), "a training entry is"),
        (index_with(training=[], test=[]), "names no scan"),
        (index_with(test=["imagesTs/liver_2.nii.gz"]), "two scans are called liver_2"),
        (index_with(test=["imagesTs/.hidden.nii.gz"]), "cannot name a case"),
        (index_with(test=["imagesTs/__x.nii.gz"]), "cannot name a case"),
        (index_with(test=["imagesTs/a\nb.nii.gz"]), "cannot name a case"),
        (index_with(test=["imagesTs/\ud800.nii.gz"]), "cannot name a case"),
        (index_with(test=["imagesTs/" + "x" * 201 + ".nii.gz"]), "cannot name a case"),
    ],
)
def test_invalid_index_is_user_error(tmp_path: Path, index: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_dataset(write_files(tmp_path, index))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_is_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_dataset(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        read_dataset(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no dataset\.json"):
        read_dataset(tmp_path / "empty")


def test_link_loops(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "imagesTr/liver_2.nii.gz").unlink()
    (tmp_path / "imagesTr/liver_2.nii.gz").symlink_to(tmp_path / "imagesTr/liver_2.nii.gz")
    assert [f.code for f in read_dataset(tmp_path).training[1].findings] == ["image_missing"]
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").symlink_to(tmp_path / "dataset.json")
    with pytest.raises(UserError, match="broken link"):
        read_dataset(tmp_path)


def test_folder_of_links(tmp_path: Path) -> None:
    write_files(tmp_path / "source")
    (tmp_path / "links" / "imagesTr").mkdir(parents=True)
    (tmp_path / "links" / "imagesTr" / "liver_2.nii.gz").symlink_to(
        tmp_path / "source/imagesTr/liver_2.nii.gz"
    )
    assert list_ids(read_dataset(tmp_path / "links")) == ["liver_2"]


def test_pairing_by_file_name_without_index(tmp_path: Path) -> None:
    files = (
        "imagesTr/liver_1_0000.nii.gz",
        "imagesTr/liver_2.nii",
        "imagesTr/notes.txt",
        "imagesTs/liver_3_0000.nii.gz",
        "labelsTr/liver_1.nii.gz",
        "labelsTr/liver_9.nii.gz",
    )
    dataset = read_dataset(write_files(tmp_path, None, files))
    assert list_ids(dataset) == ["liver_1", "liver_2", "liver_3"]
    assert dataset.training[0].label == tmp_path / "labelsTr/liver_1.nii.gz"
    assert [f.code for f in dataset.training[1].findings] == ["label_missing"]
    assert dataset.test[0].findings == ()
    assert [note.code for note in dataset.notes] == [
        "no_index",
        "label_without_image",
        "unread_files",
    ]
    assert "imagesTr/: not read, because they are not NIfTI: notes.txt" in dataset.notes[-1].message


def test_name_is_printable_and_short(tmp_path: Path) -> None:
    assert (
        read_dataset(write_files(tmp_path, index_with(name="Li\0v\ner\ud800" + "x" * 500))).name
        == "Li?v?er?" + "x" * 192
    )


def test_findings_about_data_set(tmp_path: Path) -> None:
    dataset = read_dataset(
        write_files(tmp_path, index_with(numTraining=131, modality={"0": "MRI"}))
    )
    assert [note.code for note in dataset.notes] == ["not_ct", "case_count"]


def test_ten_thousand_cases(tmp_path: Path) -> None:
    training = [
        {"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/c{n}.nii.gz"} for n in range(10_000)
    ]
    dataset = read_dataset(write_files(tmp_path, index_with(training=training), files=()))
    assert len(dataset.training) == 10_000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(FILES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*INDEX, "image", "label", "0", "1", "2"]), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(list(INDEX)), json_values))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_index_gives_cases_or_user_error(tmp_path: Path, keys: dict) -> None:
    write_files(tmp_path, json.dumps(index_with(**keys)))
    try:
        dataset = read_dataset(tmp_path)
    except UserError:
        return
    for case in (*dataset.training, *dataset.test):
        assert case.image.is_relative_to(tmp_path)
        assert ".." not in case.image.parts


@pytest.mark.real_mini
def test_real_data_set(real_mini: Path) -> None:
    dataset = read_dataset(real_mini)
    assert list_ids(dataset) == [
        "liver_28",
        "liver_900",
        "liver_901",
        "liver_902",
        "liver_903",
        "liver_950",
    ]
    assert {c.case_id: [f.code for f in c.findings] for c in dataset.training if c.findings} == {
        "liver_903": ["label_missing"]
    }


def test_listed_files_are_found_under_similar_names(tmp_path: Path) -> None:
    """Upper-case suffixes, nnU-Net's channel, Windows separators, Unicode forms."""
    nfd = unicodedata.normalize("NFD", "Müller")
    files = (
        "imagesTr/liver_10_0000.nii.gz",
        "labelsTr/liver_10.NII.GZ",
        "imagesTr/liver_2.nii",
        "labelsTr/liver_2.nii.gz",
        f"imagesTs/{nfd}.NII.gz",
    )
    index = index_with(test=["imagesTs\\Müller.nii.gz"])
    index["training"] = json.loads(json.dumps(INDEX["training"]).replace("/", "\\\\"))
    dataset = read_dataset(write_files(tmp_path, index, files))
    assert list_ids(dataset) == ["liver_10", "liver_2", "Müller"]
    cases = (*dataset.training, *dataset.test)
    assert not any(case.findings for case in cases)
    found = {
        path.relative_to(tmp_path).as_posix()
        for case in cases
        for path in (case.image, case.label)
        if path
    }
    assert found == set(files)
    assert not dataset.notes


def test_windows_paths_outside_folder_are_refused(tmp_path: Path) -> None:
    for name in (
        "..\\x.nii",
        "imagesTr\\..\\..\\x.nii",
        "C:\\x.nii",
        "\\\\server\\x.nii",
        "C:x.nii",
        "\\x.nii",
    ):
        with pytest.raises(UserError, match="leaves the data set's folder"):
            read_dataset(write_files(tmp_path, index_with(test=[name])))


def test_ambiguous_files_are_named(tmp_path: Path) -> None:
    files = (*FILES, "imagesTr/liver_5.nii", "imagesTr/liver_5_0000.nii.gz")
    dataset = read_dataset(
        write_files(tmp_path, index_with(test=["imagesTr/liver_5.nii.gz"]), files)
    )
    assert "liver_5.nii, liver_5_0000.nii.gz" in dataset.test[0].findings[0].message


def test_pairing_by_file_name_with_any_spelling(tmp_path: Path) -> None:
    files = (
        "imagesTr/volume-3.nii",
        "labelsTr/segmentation-3.NII",
        "imagesTr/a.NII.GZ",
        "labelsTr/a.nii.gz",
        "imagesTr/case_0001.nii",
        "labelsTr/case_0001.nii",
        "imagesTr/case_0000.nii",
        "labelsTr/case_0000.nii",
        "imagesTr/b_0000.nii",
        "imagesTr/b_0001.nii",
        "labelsTr/b.nii",
        "imagesTs/-x y.nii.gz",
    )
    dataset = read_dataset(write_files(tmp_path, None, files))
    assert list_ids(dataset) == ["a", "b", "case_0000", "case_0001", "volume-3", "-x y"]
    assert all(case.label is not None and not case.findings for case in dataset.training)
    assert [note.code for note in dataset.notes] == ["no_index", "channels"]
    assert "b_0001.nii" in dataset.notes[1].message


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    dataset = read_dataset(
        write_files(
            tmp_path, None, (f"imagesTr/{name}.nii", f"labelsTr/{name}.nii", "imagesTr/b.nii")
        )
    )
    assert list_ids(dataset) == ["b", "caf%E9"]
    assert dataset.training[1].label is not None
    assert all(note.message.isprintable() for note in dataset.notes)


def test_every_unread_file_has_finding(tmp_path: Path) -> None:
    files = (
        *FILES,
        "imagesTr/extra.nii.gz",
        "labelsTr/extra.nii.gz",
        "imagesTs/a.nrrd",
        "imagesTr/.b.nii.gz",
        "imagesTr/sub/c.nii.gz",
        "labelsTs/liver_3.nii.gz",
        "top.NII",
        "imagesTr/._liver_2.nii.gz",
    )
    write_files(tmp_path, INDEX, files)
    (tmp_path / "imagesTs/broken.nii.gz").symlink_to("nowhere")
    messages = " / ".join(note.message for note in read_dataset(tmp_path).notes)
    for text in (
        "does not list 1 file(s) of imagesTr/, which are not read: extra.nii.gz",
        "does not list 1 file(s) of labelsTr/",
        "imagesTs/: NRRD is not read: a.nrrd",
        "hidden files are not read: .b.nii.gz",
        "sub/",
        "labelsTs/ is read only",
        "top.NII",
        "broken.nii.gz",
    ):
        assert text in messages, messages
    assert "._liver_2" not in messages


@pytest.mark.parametrize(
    ("index", "files", "message"),
    [
        (
            None,
            ("imagesTr/a.nrrd",),
            r"no dataset.json, and no scans .* NRRD is not read: a.nrrd; .*SimpleITK",
        ),
        (
            {"labels": INDEX["labels"], "dataset": {"a": {"images": ["a.nrrd"]}}},
            ("imagesTr/a.mha",),
            r"dataset.json lists no scans, .* MetaImage is not read: a.mha",
        ),
        (None, ("volume-0.nii", "segmentation-0.nii"), r"2 scan\(s\) are in the folder itself"),
        (
            None,
            ("imagesTr/a.nii", "imagesTs/a.nii"),
            r"called a, imagesTr/a.nii and imagesTs/a.nii; .*rename",
        ),
        (
            None,
            ("imagesTr/a.nii", "imagesTr/A.nii.gz"),
            r"called a \(upper and lower case count as equal\), imagesTr/A",
        ),
        (None, ("imagesTr/a.nii", "imagesTr/a.nii.gz"), r"imagesTr/a.nii and imagesTr/a.nii.gz"),
        (
            None,
            ("imagesTr/a.nii", "labelsTr/a.nii", "labelsTr/a.nii.gz"),
            "are labels of the same case",
        ),
        (
            '{"labels": {},\n "labels": {}}',
            FILES,
            "the key 'labels' occurs twice, in lines 1 and 2",
        ),
    ],
)
def test_unreadable_data_set_error_names_remedy(
    tmp_path: Path, index: object, files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_dataset(write_files(tmp_path, index, files))


def test_nnunet_scan_list_has_finding(tmp_path: Path) -> None:
    dataset = read_dataset(
        write_files(tmp_path, {"labels": INDEX["labels"], "dataset": {}, "file_ending": ".nrrd"})
    )
    messages = " / ".join(note.message for note in dataset.notes)
    assert "lists scans under `dataset` (nnU-Net), which is not read" in messages
    assert "file_ending .nrrd, which is not read" in messages


@pytest.mark.parametrize(
    "labels",
    [
        {"background": "0", "liver": "1", "tumor": "2"},
        {"background": 0, "liver": "1", "tumor": 2.0},
        {"00": "background", " 1": "liver", "2": "cancer"},
        {"background": "0", "liver": ["1", "2"], "tumor": "2"},
    ],
)
def test_label_values_may_be_text(tmp_path: Path, labels: dict) -> None:
    assert len(read_dataset(write_files(tmp_path, index_with(labels=labels))).training) == 2
