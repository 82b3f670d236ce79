"""Paths in `dataset.json` or in a store lead nowhere but into their own folder; tried through the commands."""

import json
import shutil
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.errors import EXIT_USER
from tests.data.sources import convert, write_index, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", cases=2)


@pytest.mark.parametrize("where", ["absolute", "climbing", "hidden in the middle"])
@pytest.mark.parametrize("which", ["image", "label"])
def test_a_data_set_cannot_name_files_elsewhere(
    where: str, which: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source / "imagesTr", tmp_path / "private")
    path = {
        "absolute": str(tmp_path / "private" / "liver_0.nii.gz"),
        "climbing": "../private/liver_0.nii.gz",
        "hidden in the middle": "imagesTr/../../private/liver_0.nii.gz",
    }[where]
    index = json.loads((source / "dataset.json").read_text())
    index["training"][0][which] = path
    (source / "dataset.json").write_text(json.dumps(index))
    assert convert(source, tmp_path / "s.zarr")[0] == EXIT_USER
    assert "leaves the data set's folder" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


def test_links_out_of_a_data_set_are_followed_with_a_warning(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders of links are how clusters share data; a link inside the folder is worth no word."""
    links = tmp_path / "links"
    (links / "imagesTr").mkdir(parents=True)
    shutil.copytree(source / "labelsTr", links / "labelsTr")
    shutil.copy(source / "imagesTr" / "liver_0.nii.gz", links / "imagesTr" / "liver_0.nii.gz")
    (links / "imagesTr" / "liver_1.nii.gz").symlink_to(source / "imagesTr" / "liver_1.nii.gz")
    (links / "imagesTr" / "liver_2.nii.gz").symlink_to(links / "imagesTr" / "liver_0.nii.gz")
    shutil.copy(links / "labelsTr" / "liver_0.nii.gz", links / "labelsTr" / "liver_2.nii.gz")
    write_index(links, ["liver_0", "liver_1", "liver_2"])
    assert (
        main(["convert", str(links), str(tmp_path / "s.zarr"), "--dry-run", "convert.workers=1"])
        == 0
    )
    said = capsys.readouterr().out
    assert "warning: files of 1 scan(s) are links out of the folder: liver_1\n" in said


@pytest.mark.parametrize("command", ["train", "plan", "verify", "preview"])
@pytest.mark.parametrize("place", ["case_id", "parent"])
def test_a_store_cannot_name_cases_elsewhere(
    command: str,
    place: str,
    phantom_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "s.zarr"
    store.mkdir()
    root = json.loads((phantom_store / "zarr.json").read_text())
    cases = root["attributes"]["liverseg"]["cases"]
    name, case = sorted(cases.items())[0]
    if place == "parent":
        case["parent"] = "../../elsewhere"
    else:
        cases["../../elsewhere"] = cases.pop(name)
    (store / "zarr.json").write_text(json.dumps(root))
    words = {
        "train": ["train", f"data.store={store}", f"run.dir={tmp_path / 'run'}"],
        "plan": ["plan", str(store)],
        "verify": ["verify", str(store)],
        "preview": ["preview", str(store), "--out", str(tmp_path / "p.png")],
    }[command]
    assert main(words) == EXIT_USER
    assert "'../../elsewhere' cannot name a case" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr"]


@pytest.mark.parametrize("name", ["cases", ".liverseg", ".liverseg/records", ".liverseg/aside"])
def test_conversion_does_not_clear_what_lies_behind_a_link(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversion removes what it does not know in `cases` and in what it remembers."""
    home, store = tmp_path / "home", tmp_path / "s.zarr"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "chapter.json").write_text("ten years of work")
    (store / ".liverseg").mkdir(parents=True)
    if name == ".liverseg":
        (store / name).rmdir()
    (store / name).symlink_to(home)
    assert convert(source, store)[0] == EXIT_USER
    assert f"{store / name}: is a symbolic link" in capsys.readouterr().err
    assert (home / "thesis" / "chapter.json").read_text() == "ten years of work"
    assert [path.name for path in home.iterdir()] == ["thesis"]
