"""`liverseg verify` finds and names every damage of a store."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr

from liverseg_dist.commands.main import main
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.verify_store import StoreDefect, verify_store
from tests.data.sources import convert, run, tree, write_source


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("store")
    assert convert(write_source(folder / "src", cases=3, test=1), folder / "s.zarr")[0] == 0
    return folder / "s.zarr"


@pytest.fixture
def store(undamaged: Path, tmp_path: Path) -> Path:
    shutil.copytree(undamaged, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def damage(store: Path) -> list[StoreDefect]:
    return verify_store(store, lambda case_id: None)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0b100
    path.write_bytes(content)


def test_an_undamaged_store_has_no_defects(undamaged: Path) -> None:
    before = tree(undamaged)
    code, result = run("verify", undamaged)
    assert (code, result["cases"], result["damage"]) == (0, 3, [])
    assert tree(undamaged) == before  # verification changes nothing


def test_sha256sum_agrees(undamaged: Path) -> None:
    """The checksums can be checked without this package, and every file has one."""
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=undamaged, check=True
    )
    listed = {
        line.split("  ", 1)[1] for line in (undamaged / "SHA256SUMS").read_text().splitlines()
    }
    files = {p.relative_to(undamaged).as_posix() for p in undamaged.rglob("*") if p.is_file()}
    assert {name for name in files if not name.startswith(".liverseg/locks")} - listed == {
        "SHA256SUMS"
    }


def test_a_flipped_bit_in_any_file_is_found_and_named(undamaged: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [line.split("  ", 1)[1] for line in (undamaged / "SHA256SUMS").read_text().splitlines()]
    shutil.copytree(undamaged, tmp_path / "s.zarr")
    for name in [*names, "SHA256SUMS"]:
        path = tmp_path / "s.zarr" / name
        flip(path, int(rng.integers(path.stat().st_size)))
        found = damage(tmp_path / "s.zarr")
        shutil.copyfile(undamaged / name, path)
        parts = name.split("/")
        case_id, where = (
            (parts[1], "/".join(parts[2:]))
            if len(parts) > 2 and parts[0] == "cases"
            else ("", name)
        )
        assert found, f"a flipped bit in {name} goes unnoticed"
        if name != "SHA256SUMS":
            assert any((d.case_id, d.where) == (case_id, where) for d in found), f"{name}: {found}"
    assert damage(tmp_path / "s.zarr") == []


def test_the_damaged_chunk_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bit is flipped within the inner chunk (0, 0, 1, 0), whose position is in the shard's index."""
    shard = store / "cases/liver_1/image/c/0/0/0/0"
    counts = (1, 1, 3, 1)  # 1 x 64 x 40 x 44 in chunks of 1 x 64 x 16 x 64
    index = np.frombuffer(
        shard.read_bytes()[-16 * int(np.prod(counts)) - 4 : -4], dtype="<u8"
    ).reshape(*counts, 2)
    offset, length = index[0, 0, 1, 0]
    flip(shard, int(offset + length // 2))
    assert main(["verify", str(store)]) == 1
    message = capsys.readouterr().err
    assert "case liver_1, image/c/0/0/0/0: has changed, chunk 0,0,1,0 (" in message
    assert message.count("liver_1") == 1


def test_a_damaged_index_gives_a_short_message(store: Path) -> None:
    shard = store / "cases/liver_1/source_label/c/0/0/0"
    flip(shard, shard.stat().st_size - 1)
    (found,) = damage(store)
    assert (found.case_id, len(found.what) < 800) == ("liver_1", True)


def test_missing_and_unlisted_files_are_found(store: Path) -> None:
    (store / "cases/liver_0/label/c/0/0/0").unlink()
    (store / "cases/liver_9").mkdir()
    message = [str(d) for d in damage(store)]
    assert message == [
        "case liver_0, label/c/0/0/0: is missing",
        "case liver_9, cases/liver_9: exists but is not listed by the store; convert again",
    ]


def test_impossible_names_and_sizes_are_damage(store: Path) -> None:
    """A zero byte in a name; an array with too many chunks (10^15) to check."""
    with (store / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  cases/liver_0/a\0b\n")
    assert [str(d) for d in damage(store)] == [
        "case liver_0, a?b: cannot be read (embedded null byte)"
    ]
    (store / "SHA256SUMS").unlink()
    metadata = store / "cases/liver_1/label/zarr.json"
    content = json.loads(metadata.read_text())
    content["shape"] = [10**7] * 3
    metadata.write_text(json.dumps(content))
    assert "case liver_1, label: is damaged, chunk (metadata: ValueError)" in [
        str(d) for d in damage(store)
    ]


def test_checksums_that_lost_lines_are_damage(store: Path) -> None:
    sums = store / "SHA256SUMS"
    undamaged = sums.read_text().splitlines(keepends=True)
    sums.write_text(
        "".join(
            line
            for line in undamaged
            if "liver_1/label/c/" not in line and "  zarr.json" not in line
        )
    )
    assert [str(d) for d in damage(store)] == [
        "SHA256SUMS: does not list zarr.json; lines are missing",
        "case liver_1, label/c/0/0/0: is not listed in SHA256SUMS",
    ]
    sums.write_text("")
    assert [str(d) for d in damage(store)] == [
        "SHA256SUMS: does not list zarr.json; lines are missing"
    ]


def test_a_damaged_root_is_found_though_it_does_not_open(store: Path) -> None:
    (store / "zarr.json").write_text("{")
    assert {d.where for d in damage(store)} == {"zarr.json"}
    assert main(["verify", str(store)]) == 1


def test_a_folder_that_is_not_a_store_is_exit_2(tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path)]) == 2


def test_a_copy_without_the_private_folder_is_undamaged(store: Path) -> None:
    shutil.rmtree(store / ".liverseg")
    assert damage(store) == []


def test_without_checksum_file_the_chunks_are_checked(store: Path) -> None:
    (store / "SHA256SUMS").unlink()
    shard = store / "cases/liver_2/label/c/0/0/0"
    flip(shard, shard.stat().st_size // 4)
    found = damage(store)
    assert [(d.case_id, d.where) for d in found] == [("", "SHA256SUMS"), ("liver_2", "label")]


def rewrite_root(store: Path, edit: str) -> None:
    """Change the root and remove its checksum."""
    text = (store / "zarr.json").read_text()
    root = json.loads(text)
    attributes = root["attributes"]["liverseg"]
    exec(edit, {"root": attributes})
    (store / "zarr.json").write_text(json.dumps(root))
    sums = [
        line
        for line in (store / "SHA256SUMS").read_text().splitlines()
        if not line.endswith("  zarr.json")
    ]
    (store / "SHA256SUMS").write_text("\n".join(sums) + "\n")


@pytest.mark.parametrize(
    ("edit", "case_id", "message"),
    [
        (
            "root['splits']['folds'][1] += root['splits']['folds'][0]",
            "liver_",
            "is in more than one part",
        ),
        (
            "root['splits']['folds'][1].append('liver_7')",
            "liver_7",
            "is in a part but not stored",
        ),
        (
            "root['cases']['liver_0']['patient'] = root['cases']['liver_1']['patient']",
            "",
            "are in several parts",
        ),
        (
            "root['cases']['liver_0']['labelled'] = False",
            "liver_0",
            "is in a part but has no label",
        ),
        ("del root['audit']['liver_2']", "", "metadata is damaged (KeyError"),
        (
            "root['audit']['liver_2']['stored_as'] = []",
            "liver_2",
            "the entry of its scan does not name it",
        ),
        ("root['audit']['liver_3']['stored_as'] = ['liver_3']", "liver_3", "but not stored"),
        ("root['convert']['slab']['margin_mm'] = 11", "", "settings do not match their hash"),
        ("root['intensity']['std'] = 0", "", "metadata is damaged"),
        ("root['cases']['liver_1']['class_voxels'][2] += 1", "liver_1", "voxels per class"),
        ("root['cases']['liver_1']['valid_slices'] = [2, 64]", "liver_1", "padding is not marked"),
        (
            "root['cases']['liver_1']['grid']['shape_zyx'] = [64, 40, 45]",
            "liver_1",
            "but its metadata has (64, 40, 45)",
        ),
    ],
)
def test_contradictions_of_the_metadata_are_found(
    store: Path, edit: str, case_id: str, message: str
) -> None:
    rewrite_root(store, edit)
    found = [d for d in damage(store) if message in d.what]
    assert found
    assert found[0].case_id.startswith(case_id)


def test_a_wrong_foreground_sample_is_found(store: Path) -> None:
    samples = zarr.open_array(str(store / "cases/liver_0/foreground"), mode="r+")
    samples[0, 2:] = [0, 0, 0]
    (store / "SHA256SUMS").unlink()
    assert any(d.where == "foreground" and "another class" in d.what for d in damage(store))
    assert CaseStore.open(store).case_ids
