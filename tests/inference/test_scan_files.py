"""Which files make up a scan: names, channels, folders, and every mistake in them."""

from pathlib import Path

import pytest

from liverseg_dist.config.channels import CT_CHANNELS, ChannelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.inference.scan_files import (
    ScanFiles,
    describe_skipped_files,
    find_named_channels,
    find_scans,
)

TWO = (
    ChannelConfig(name="CT", modality="CT", intensity="ct"),
    ChannelConfig(name="T2", modality="MR", intensity="zscore"),
)


def touch(folder: Path, *names: str) -> list[Path]:
    """Empty files: nothing here reads a scan."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in names]
    for file in files:
        file.touch()
    return files


def test_each_file_of_a_folder_is_a_scan(tmp_path: Path) -> None:
    touch(tmp_path / "in", "b.nii", "a.nii.gz", ".hidden.nii", "notes.txt")
    found = find_scans([tmp_path / "in"], tmp_path / "out")
    assert sorted(found) == ["a", "b"]
    assert found["a"].files == (tmp_path / "in" / "a.nii.gz",)


def test_the_channel_number_is_not_part_of_the_id(tmp_path: Path) -> None:
    (file,) = touch(tmp_path / "in", "liver_1_0000.nii.gz")
    assert list(find_scans([file], tmp_path / "out")) == ["liver_1"]


def test_a_file_given_by_name_and_by_its_folder_is_one_scan(tmp_path: Path) -> None:
    (file,) = touch(tmp_path / "in", "a.nii.gz")
    assert list(find_scans([file, tmp_path / "in"], tmp_path / "out")) == ["a"]


def test_two_scans_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = touch(tmp_path / "x", "a.nii.gz") + touch(tmp_path / "y", "A.nii")
    with pytest.raises(UserError, match=r"would both become [aA]\.nii\.gz"):
        find_scans([first, second], tmp_path / "out")


def test_a_scan_in_the_output_is_refused(tmp_path: Path) -> None:
    (file,) = touch(tmp_path / "out", "a.nii.gz")
    with pytest.raises(UserError, match="lies in --out, where its mask would replace it"):
        find_scans([file], tmp_path / "out")


def test_an_output_behind_a_link_is_found(tmp_path: Path) -> None:
    (file,) = touch(tmp_path / "in", "a.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "in", target_is_directory=True)
    with pytest.raises(UserError, match="lies in --out"):
        find_scans([file], tmp_path / "link")


def test_a_folder_without_scans_says_what_it_has(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.mha", "b.mha")
    with pytest.raises(UserError, match=r"holds no \.nii or \.nii\.gz file"):
        find_scans([tmp_path / "in"], tmp_path / "out")


def test_numbered_files_are_the_channels_of_one_scan(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz")
    found = find_scans([tmp_path / "in"], tmp_path / "out", TWO)
    folder = tmp_path / "in"
    assert found["a"].files == (folder / "a_0000.nii.gz", folder / "a_0001.nii.gz")
    assert found["b"].files == (None, folder / "b_0001.nii.gz")
    assert found["b"].paths == (folder / "b_0001.nii.gz",)


def test_a_file_without_a_number_holds_all_channels(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.nii.gz")
    (scan,) = find_scans([tmp_path / "in"], tmp_path / "out", TWO).values()
    assert (len(scan.files), scan.channel_count) == (1, 2)


def test_one_file_with_all_channels_and_one_for_each_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.nii.gz", "a_0000.nii.gz")
    with pytest.raises(UserError, match="one file with all channels or one for each, not both"):
        find_scans([tmp_path / "in"], tmp_path / "out", TWO)


def test_a_channel_that_the_run_does_not_have_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a_0000.nii.gz", "a_0002.nii.gz")
    with pytest.raises(UserError, match=r"is channel 2 \(counted from 0\), but the run has 2"):
        find_scans([tmp_path / "in"], tmp_path / "out", TWO)


def test_options_name_the_channels_in_any_case(tmp_path: Path) -> None:
    ct, mr = touch(tmp_path / "in", "first.nii.gz", "second.nii.gz")
    found = find_named_channels([f"t2={mr}", f"ct={ct}"], tmp_path / "out", TWO)
    (scan,) = found.values()
    assert (scan.scan_id, scan.files) == ("first", (ct, mr))


def test_one_option_leaves_the_other_channel_absent(tmp_path: Path) -> None:
    (mr,) = touch(tmp_path / "in", "second.nii.gz")
    (scan,) = find_named_channels([f"T2={mr}"], tmp_path / "out", TWO).values()
    assert (scan.scan_id, scan.files) == ("second", (None, mr))


def test_folders_are_joined_by_the_names_of_their_scans(tmp_path: Path) -> None:
    touch(tmp_path / "ct", "a.nii.gz", "b.nii.gz")
    touch(tmp_path / "mr", "b.nii.gz", "c.nii.gz")
    options = [f"CT={tmp_path / 'ct'}", f"T2={tmp_path / 'mr'}"]
    found = find_named_channels(options, tmp_path / "out", TWO)
    present = {name: [file is not None for file in scan.files] for name, scan in found.items()}
    assert present == {"a": [True, False], "b": [True, True], "c": [False, True]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["CT"], "expected NAME=PATH"),
        (["CT="], "expected NAME=PATH"),
        (["PET=a.nii.gz"], "the run has no such channel; its channels are CT, T2"),
        (["CT=a.nii.gz", "ct=b.nii.gz"], "CT is given twice"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_named_channels(options, tmp_path / "out", TWO)


def test_files_and_folders_are_not_mixed(tmp_path: Path) -> None:
    (file,) = touch(tmp_path / "in", "a.nii.gz")
    with pytest.raises(UserError, match="either files of one scan or folders, not both"):
        find_named_channels([f"CT={file}", f"T2={tmp_path / 'in'}"], tmp_path / "out", TWO)


def test_further_channels_of_a_run_with_one_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a_0000.nii.gz", "a_0001.nii.gz")
    found = find_scans([tmp_path / "in"], tmp_path / "out", CT_CHANNELS)
    assert list(found) == ["a"]
    (line,) = describe_skipped_files([tmp_path / "in"])
    assert "further channels of a scan are not read, the run has one" in line


def test_a_checksum_covers_all_channels(tmp_path: Path) -> None:
    ct, mr = touch(tmp_path / "in", "a_0000.nii.gz", "a_0001.nii.gz")
    scan = ScanFiles("a", (ct, mr), 2)
    before = scan.compute_sha256()
    mr.write_bytes(b"other")
    assert scan.compute_sha256() != before
    assert ScanFiles("a", (ct, None), 2).compute_sha256() != before
    assert scan.size_bytes == len(b"other")
