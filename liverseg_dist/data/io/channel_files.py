"""Which files hold the channels of a scan: nnU-Net's `_0000`, `_0001`, ..., or one file in 4D.

    channels in files of their own   case_0000.nii.gz  case_0001.nii.gz    one entry per channel
    channels in one file             case.nii.gz, 4D                       one entry

`read_channel_files` reads both. A channel whose file is missing has the entry None. A single entry
for several channels is a file in 4D (Decathlon); `scan_reader.read_scan_volumes` checks its number of
volumes.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from liverseg_dist.config import ChannelConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.nifti import ScanFile
from liverseg_dist.data.io.scan_reader import ScanSource, read_scan, read_scan_volumes
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import derive_scan_id, list_some

_NUMBERED = re.compile(r"(?s)(.+)_(\d{4})")

ChannelFiles = tuple[ScanSource | None, ...]
"""One source for each channel, or a single file that holds all channels."""


def read_channel_files(files: ChannelFiles, count: int) -> list[ScanFile | None]:
    """Read the channels of a scan.

    Args:
        files: One file for each channel, None for an absent one; or one file that holds all.
        count: Number of channels of the data set.

    Returns:
        One entry for each channel; None for an absent one.

    Raises:
        ScanFileError: A file cannot be read as a scan, or holds another number of volumes.
    """
    if len(files) == 1 and files[0] is not None:
        return list(read_scan_volumes(files[0], count))
    return [None if path is None else read_scan(path) for path in files]


def split_channel_number(stem: str) -> tuple[str, int] | None:
    """Case name and channel of `case_0001`; None for a name without a channel number."""
    match = _NUMBERED.fullmatch(stem)
    return (match[1], int(match[2])) if match else None


def group_channel_files(
    files: Iterable[Path], label_ids: Collection[str], channels: Sequence[ChannelConfig]
) -> list[tuple[str, ChannelFiles]]:
    """Group the files of a folder by scan, for a data set of several channels.

    A number at the end of a name is a channel, unless a label has such a number too (then it belongs
    to the names of the cases), or unless the numbers of a name go beyond the channels and do not
    start at 0000.

    Args:
        files: Scans of one folder.
        label_ids: Ids of the label files, with numbers.
        channels: Channels of the data set.

    Returns:
        (scan id, files) in the order of the files.

    Raises:
        UserError: A file has the number of a channel that the data set does not have.
    """
    numbered_cases = set()
    for label_id in label_ids:
        parts = split_channel_number(label_id)
        if parts is not None:
            numbered_cases.add(parts[0])
    groups: dict[str, dict[int, list[Path]]] = {}
    scans: list[tuple[str, ChannelFiles]] = []
    for path in files:
        stem = derive_scan_id(path.name, keep_channel=True)
        parts = split_channel_number(stem)
        if parts is None or parts[0] in numbered_cases:
            scans.append((stem, (path,)))
        else:
            groups.setdefault(parts[0], {}).setdefault(parts[1], []).append(path)
    for name, numbers in groups.items():
        is_numbered_case = 0 not in numbers and max(numbers) >= len(channels)
        if is_numbered_case:
            for number, paths in numbers.items():
                scans += [(f"{name}_{number:04d}", (path,)) for path in paths]
            continue
        scans.append((name, _arrange_files(name, numbers, channels)))
    return scans


def _arrange_files(
    name: str, numbers: dict[int, list[Path]], channels: Sequence[ChannelConfig]
) -> ChannelFiles:
    """The files of one scan in the order of the channels."""
    for number, paths in sorted(numbers.items()):
        if len(paths) > 1:
            names = list_some([printable(path.name) for path in paths])
            raise UserError(f"channel {number} of {printable(name)} has several files: {names}")
        if number >= len(channels):
            raise UserError(
                f"{printable(paths[0].name)} is channel {number}, but the data set has "
                f"{len(channels)} channels, numbered from 0 "
                f"({', '.join(channel.name for channel in channels)})"
            )
    files: list[Path | None] = []
    for number in range(len(channels)):
        paths = numbers.get(number, [])
        files.append(paths[0] if paths else None)
    return tuple(files)


def report_missing_channels(
    files: ChannelFiles, channels: Sequence[ChannelConfig]
) -> list[Finding]:
    """A warning that names the channels without a file; none for a single file."""
    if len(files) != len(channels) or None not in files:
        return []
    names = []
    for channel, path in zip(channels, files, strict=True):
        if path is None:
            names.append(channel.name)
    noun = "channel" if len(names) == 1 else "channels"
    message = f"no file for {noun} {', '.join(names)}: absent in this scan"
    return [Finding("warning", "channel_missing", message)]


def order_named_files(
    named: Sequence[tuple[str, Path]], channels: Sequence[ChannelConfig], where: str
) -> tuple[Path | None, ...]:
    """The files of an entry `{"T1": "a.nii.gz", "T2": "b.nii.gz"}` in the order of the channels.

    Raises:
        UserError: A name is none of the channels.
    """
    known = {channel.name.casefold(): number for number, channel in enumerate(channels)}
    files: list[Path | None] = [None] * len(channels)
    for name, path in named:
        number = known.get(name.casefold())
        if number is None:
            raise UserError(
                f"{where}: {printable(path.name)} is of channel {printable(name)[:80]}; the "
                f"channels are {', '.join(channel.name for channel in channels)}"
            )
        files[number] = path
    return tuple(files)
