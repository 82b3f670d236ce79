"""Parse `dataset.json`, the index of a data set, into a typed record.

Three dialects are read: the Medical Segmentation Decathlon's, nnU-Net's (version 2 lists no scans)
and MONAI's (`testing` for `test`). The file comes with a download, so it is untrusted: a path that
is absolute or leaves the folder (`..`) is refused. This module opens no scan and does not check
that the listed files exist; `dataset_index` does.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dataset_folder import MACOS_METADATA_PREFIX, parse_relative_path
from liverseg_dist.data.io.modality import MODALITY_KEYS, read_channels
from liverseg_dist.data.io.source_labels import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    SourceLabels,
    read_source_labels,
)
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import SUFFIXES, get_file_name, is_scan_name
from liverseg_dist.texts.structured import read_json

MAX_SHOWN_CHARACTERS = 80
TRAINING_KEY = "training"
TEST_KEYS = ("test", "testing")


@dataclass(frozen=True)
class ListedScan:
    """The files of a case, as the index lists them."""

    images: tuple[Path, ...]
    """One file; or one for each channel, if the entry is a list or a mapping."""
    label: Path | None
    channel_names: tuple[str, ...] | None = None
    """Channels of `images`, if the entry is a mapping from channel to file."""


@dataclass(frozen=True)
class IndexContent:
    """What `dataset.json` lists. The files may be missing."""

    name: str | None
    channels: tuple[ChannelConfig, ...]
    training: tuple[ListedScan, ...]
    test: tuple[ListedScan, ...]
    lists_scans: bool
    """False if the file has none of the keys training, test and testing."""
    notes: tuple[Finding, ...]
    labels: SourceLabels


def read_index(
    folder: Path, index: Path, channels: tuple[ChannelConfig, ...] | None = None
) -> IndexContent:
    """Read and check a data set's `dataset.json`.

    Args:
        folder: The data set; listed paths are relative to it.
        index: The `dataset.json`.
        channels: Channels of the images; None: those that the index names, else one of CT.

    Raises:
        UserError: No such JSON object, labels that are no scheme, channels without names of their
            own, or an entry that does not name a file within the folder.
    """
    content = _read_json_object(index)
    labels, notes = read_source_labels(content, index)
    if channels is None:
        channels, channel_notes = _read_channels(content, index)
        notes += channel_notes
    notes += _find_ignored_content(content)
    lists_scans = bool(content.keys() & {TRAINING_KEY, *TEST_KEYS})
    training = []
    for entry in _list_entries(content, TRAINING_KEY, index):
        training.append(_parse_training_entry(folder, index, entry))
    test = []
    for key in TEST_KEYS:
        for entry in _list_entries(content, key, index):
            test.append(_parse_test_entry(folder, index, entry))
    if lists_scans and not training and not test:
        raise UserError(f"{printable(index)}: names no scan under training or test")
    if lists_scans:
        notes += _check_counts(content, len(training), len(test))
    name = content.get("name")
    return IndexContent(
        name=name if isinstance(name, str) and name else None,
        channels=channels,
        training=tuple(training),
        test=tuple(test),
        lists_scans=lists_scans,
        notes=tuple(notes),
        labels=labels,
    )


def _read_json_object(index: Path) -> dict[str, Any]:
    if not index.is_file():
        raise UserError(f"{printable(index)}: not a file (a broken link?)")
    content = read_json(index, max_bytes=MAX_INDEX_BYTES)
    if not isinstance(content, dict):
        raise UserError(
            f"{printable(index)}: expected a JSON object with training, test and labels"
        )
    return content


# --- modality -------------------------------------------------------------------------------------


def _read_channels(
    content: Mapping[str, Any], index: Path
) -> tuple[tuple[ChannelConfig, ...], list[Finding]]:
    for key in MODALITY_KEYS:
        if content.get(key) is not None:
            try:
                return read_channels(INDEX_FILE, content[key])
            except UserError as error:
                # The index knows the folder; the message starts with the name of the file.
                raise UserError(f"{printable(index.parent)}/{error}") from None
    return CT_CHANNELS, []


# --- content that is not read ------------------------------------------------------------------


def _find_ignored_content(content: Mapping[str, Any]) -> list[Finding]:
    """Report lists of scans, file types and folds that are present but not read."""
    notes = []
    # Silence would let users believe that these lists define the data set.
    if isinstance(content.get("dataset"), dict):
        message = (
            f"{INDEX_FILE} lists scans under `dataset` (nnU-Net), which is not read; scans are "
            "taken from training and test, or else from the file names"
        )
        notes.append(Finding("warning", "unread_list", message))
    ending = content.get("file_ending", SUFFIXES[0])
    if isinstance(ending, str) and not ending.lower().endswith(SUFFIXES):
        message = (
            f"{INDEX_FILE} has file_ending {printable(ending)}, which is not read; "
            "convert the scans to .nii.gz"
        )
        notes.append(Finding("warning", "file_ending", message))
    for key, value in content.items():
        if key in (TRAINING_KEY, *TEST_KEYS) or not isinstance(value, list):
            continue
        if any(map(_is_scan_entry, value)):
            message = (
                f"{INDEX_FILE} lists {len(value)} scans under {printable(key)}, which is not "
                "read; only training and test are"
            )
            notes.append(Finding("warning", "unread_list", message))
    if _has_folds(content.get(TRAINING_KEY)):
        message = (
            f"{INDEX_FILE} names a fold for scans, which is not read; "
            "convert.splits.kind=file takes folds from a file"
        )
        notes.append(Finding("warning", "unread_folds", message))
    return notes


def _has_folds(training: object) -> bool:
    if not isinstance(training, list):
        return False
    return any(isinstance(entry, dict) and "fold" in entry for entry in training)


def _check_counts(content: Mapping[str, Any], training: int, test: int) -> list[Finding]:
    notes = []
    for key, count in (("numTraining", training), ("numTest", test)):
        claimed = content.get(key)
        # The counts are not needed for reading, so a wrong one is only a warning.
        if isinstance(claimed, int) and claimed != count:
            message = f"{INDEX_FILE} has {key} {claimed} but lists {count}"
            notes.append(Finding("warning", "case_count", message))
    return notes


# --- entries -----------------------------------------------------------------------------------


def _list_entries(content: Mapping[str, Any], key: str, index: Path) -> list[Any]:
    """The entries under a key, without the metadata files that macOS adds."""
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise UserError(
            f"{printable(index)}: {key} must be a list of files, not {type(entries).__name__}"
        )
    return [entry for entry in entries if not _is_macos_metadata(entry)]


def _get_image_name(entry: object) -> object:
    """The image of an entry: a name, or a list or mapping of one name for each channel."""
    return entry.get("image") if isinstance(entry, dict) else entry


def _get_first_name(entry: object) -> object:
    image = _get_image_name(entry)
    if isinstance(image, dict):
        image = list(image.values())
    return image[0] if isinstance(image, list) and image else image


def _is_scan_entry(entry: object) -> bool:
    name = _get_first_name(entry)
    return isinstance(name, str) and is_scan_name(get_file_name(name))


def _is_macos_metadata(entry: object) -> bool:
    name = _get_first_name(entry)
    return isinstance(name, str) and get_file_name(name).startswith(MACOS_METADATA_PREFIX)


def _parse_training_entry(folder: Path, index: Path, entry: object) -> ListedScan:
    if not isinstance(entry, dict) or "image" not in entry:
        raise UserError(
            f'{printable(index)}: a training entry is {{"image": ..., "label": ...}}, '
            f"not {_format_value(entry)}"
        )
    return _parse_test_entry(folder, index, entry)


def _parse_test_entry(folder: Path, index: Path, entry: object) -> ListedScan:
    """A test entry is a file name, or a mapping as under `training`."""
    image = _get_image_name(entry)
    channel_names = None
    if isinstance(image, dict) and image:
        channel_names = tuple(map(str, image))
        image = list(image.values())
    # An empty list is no file name, which `_resolve_path` reports.
    names = image if isinstance(image, list) and image else [image]
    images = [_resolve_path(folder, index, name) for name in names]
    label = entry.get("label") if isinstance(entry, dict) else None
    return ListedScan(
        images=tuple(images),
        label=None if label is None else _resolve_path(folder, index, label),
        channel_names=channel_names,
    )


def _resolve_path(folder: Path, index: Path, name: object) -> Path:
    """The path of a listed file. Raise `UserError` if it leaves the folder."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{printable(index)}: expected a file name, not {_format_value(name)}")
    path = parse_relative_path(name)
    if path is None:
        raise UserError(
            f"{printable(index)}: {_format_value(name)} leaves the data set's folder; "
            "paths are relative to it"
        )
    # Such a name would become an id that cannot be printed.
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise UserError(
            f"{printable(index)}: {_format_value(name)} cannot name a case; rename the file"
        )
    return folder / path


def _format_value(value: object) -> str:
    if isinstance(value, str):
        return f"'{printable(value)[:MAX_SHOWN_CHARACTERS]}'"
    return type(value).__name__
