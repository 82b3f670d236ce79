"""Names of scans, unsupported formats, and paths of users."""

import argparse
import os
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.texts.formats import describe_unread, explain_unsupported_format
from liverseg_dist.texts.names import ScanIndex, assign_scan_ids, derive_scan_id, is_scan_name
from liverseg_dist.texts.paths import expand_path, path_argument, quote_path

NFC, NFD = "Müller_1", unicodedata.normalize("NFD", "Müller_1")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("liver_1.nii.gz", "liver_1"),
        ("liver_1.NII.GZ", "liver_1"),
        ("liver_1.Nii", "liver_1"),
        ("liver_1_0000.nii.gz", "liver_1"),
        ("_0000.nii", "_0000"),
        ("volume-7.nii", "volume-7"),
        (f"{NFD}.nii.gz", NFC),
        (" a\u00a0b .nii", "a b"),
        ("-v.nii", "-v"),
        (os.fsdecode(b"caf\xe9.nii.gz"), "caf%E9"),
        ("a\nb.nii", "a%0Ab"),
    ],
)
def test_scan_ids_of_file_names(file: str, expected: str) -> None:
    assert is_scan_name(file)
    assert derive_scan_id(file) == expected
    assert expected.isprintable()
    expected.encode()


def test_channels_and_case_numbers_are_distinguished() -> None:
    numbered = [f"case_{n:04}.nii.gz" for n in range(20)]
    assert list(assign_scan_ids(numbered).ids.values()) == [f"case_{n:04}" for n in range(20)]
    two = ["a_0000.nii", "a_0001.nii", "b.nii"]
    assert assign_scan_ids(two).ids == {"a_0000.nii": "a", "b.nii": "b"}
    assert assign_scan_ids(two).channels == ("a_0001.nii",)
    assert assign_scan_ids(two, {"a_0000", "a_0001"}).ids == {
        "a_0000.nii": "a_0000",
        "a_0001.nii": "a_0001",
        "b.nii": "b",
    }
    assert assign_scan_ids(["p_0001.nii", "p_0002.nii"]).ids == {
        "p_0001.nii": "p_0001",
        "p_0002.nii": "p_0002",
    }


@pytest.mark.parametrize(
    "text",
    [
        "liver_1",
        " liver_1 ",
        "liver_1.nii.gz",
        "liver_1.NII",
        "liver_1_0000",
        "liver_1_0000.nii.gz",
        "LIVER_1",
        "imagesTr/liver_1.nii.gz",
        "imagesTr\\liver_1.nii.gz",
        "C:\\data\\liver_1.nii.gz",
        "liver_1\u200b",
    ],
)
def test_scan_is_found_in_any_spelling(text: str) -> None:
    assert ScanIndex(["liver_1", "liver_10"]).find_scan(text) == "liver_1"


def test_exact_match_comes_first() -> None:
    index = ScanIndex(["a", "a_0000", "volume-3", "01", "1"])
    assert [
        index.find_scan(text) for text in ("a", "a_0000", "segmentation-3", "01", "1", "001")
    ] == [
        "a",
        "a_0000",
        "volume-3",
        "01",
        "1",
        None,
    ]
    assert ScanIndex([NFC]).find_scan(NFD) == NFC
    assert ScanIndex(["a b"]).find_scan("a\u00a0b") == "a b"


def test_unsupported_formats_are_described_with_remedy(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "IM1").write_bytes(bytes(128) + b"DICM")
    for name in ("a.nrrd", "b.MHA", "c.hdr", "c.img", "d.dcm", "notes.txt"):
        (tmp_path / name).touch()
    messages = " / ".join(describe_unread(tmp_path.iterdir()))
    for text in (
        "NRRD is not read: a.nrrd",
        "MetaImage is not read: b.MHA",
        "two-file NIfTI is not read: c.hdr, c.img",
        "DICOM is not read: d.dcm",
        "liverseg to-nifti",
        "DICOM folder is not read: series/",
        "SimpleITK",
        "not NIfTI: notes.txt",
    ):
        assert text in messages
    assert "liverseg to-nifti" in str(explain_unsupported_format(tmp_path / "series" / "IM1"))
    assert explain_unsupported_format(tmp_path / "notes.txt") is None


PATHS = (
    "a #b: c",
    "2024-11-30",
    "no",
    "1e3",
    "null",
    "[x]",
    "'",
    "{a: b}",
    "- a",
    "&a",
    "*a",
    "a: b",
    "|",
    "!!int 3",
    "true",
    "0x10",
    "%x",
    "@x",
    '"q"',
    "x ",
)


@pytest.mark.parametrize("path", PATHS)
def test_command_line_paths_stay_as_written(path: str) -> None:
    assert load_settings([], [f"run.dir={path}"]).run.dir == Path(path)
    assert load_settings([], [f"data.store={path}"]).data.store == path
    assert load_settings([], [f"model.pretrained_names={path}"]).model.pretrained_names == Path(
        path
    )


@pytest.mark.parametrize("path", ["2024-11-30", "no", "1e3", "0x10", "010", "1:30", "Off"])
def test_config_file_paths_stay_as_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.yaml").write_text(f"run: {{dir: {path}}}\ndata:\n  store: {path}\n")
    settings = load_settings([tmp_path / "a.yaml"])
    assert (settings.run.dir, settings.data.store) == (Path(path), path)
    (tmp_path / "b.yaml").write_text(settings.to_yaml())
    assert load_settings([tmp_path / "b.yaml"]) == settings


def test_values_have_type_of_field() -> None:
    settings = load_settings(
        [],
        [
            "train.max_steps=010",
            "train.learning_rate=1e-3",
            "model.regions=yes",
            "seed=1_000",
            "inference.reach_mm=null",
            "convert.cleaning.noise=tv",
            "data.fold=all",
            "model.features=[4, 8]",
            "model.pretrained=",
        ],
    )
    assert (settings.train.max_steps, settings.train.learning_rate, settings.seed) == (
        10,
        1e-3,
        1000,
    )
    assert settings.model.regions is True
    assert settings.inference.reach_mm is None
    assert (settings.model.features, settings.model.pretrained, settings.data.fold) == (
        (4, 8),
        None,
        "all",
    )


KEYS = (
    "run.dir",
    "data.store",
    "data.cache_dir",
    "model.pretrained",
    "model.pretrained_names",
    "convert.labels_from",
    "convert.splits.file",
    "convert.splits.patients",
    "convert.cleaning.spacing_table",
)


@pytest.mark.parametrize("key", KEYS)
def test_home_and_variables_are_expanded_in_every_path_setting(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", "/w")
    monkeypatch.delenv("ABSENT", raising=False)
    section, _, name = key.rpartition(".")

    def value_of(settings: Settings) -> str:
        found: object = settings
        for part in key.split("."):
            found = getattr(found, part)
        return str(found)

    inner = name
    for text, expected in (
        ("~/x", f"{tmp_path}/x"),
        ("~", str(tmp_path)),
        ("$WORK/x", "/w/x"),
        ("${WORK}y", "/wy"),
        ("a~b", "a~b"),
        ("~root/x", os.path.expanduser("~root/x")),
    ):
        assert value_of(load_settings([], [f"{key}={text}"])) == expected
        body = f"{inner}: '{text}'"
        for part in reversed(section.split(".")):
            body = f"{part}: {{{body}}}"
        (tmp_path / "c.yaml").write_text(body)
        assert value_of(load_settings([tmp_path / "c.yaml"])) == expected
    for text, message in (
        ("$ABSENT/x", "ABSENT is not set"),
        ("~no-such-user/x", "no such user"),
    ):
        with pytest.raises(UserError, match=message):
            load_settings([], [f"{key}={text}"])


def test_existing_path_keeps_dollar_sign(tmp_path: Path) -> None:
    (tmp_path / "a$b").touch()
    assert expand_path(tmp_path / "a$b") == tmp_path / "a$b"
    with pytest.raises(argparse.ArgumentTypeError, match="the environment variable c is not set"):
        path_argument(str(tmp_path / "a$c"))


@pytest.mark.parametrize("path", ["a b", "it's", "$HOME", "a;b", "-x", "ü", "~"])
def test_quoted_paths_can_be_copied_into_a_shell(path: str, tmp_path: Path) -> None:
    (tmp_path / path).mkdir()
    done = subprocess.run(
        ["sh", "-c", f"cd {quote_path(path)} && pwd"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / path)
    assert len(shlex.split(quote_path(path))) == 1
