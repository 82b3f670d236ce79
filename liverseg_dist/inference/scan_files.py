"""Find the scans that `predict`, `quantify --run` and `follow --run` are given, with their channels.

A scan has one file for each channel of the run (nnU-Net's `_0000`, `_0001`, ..., or the files that
`--channel NAME=PATH` names), or one 4D file for all channels. The scan id is the file name without
suffix and without the channel number (`texts.names`). DICOM inputs (`data.io.dicom_sources`) have a
pseudonym as id.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.data.io.dicom_sources import DicomOptions, find_dicom_scans, is_dicom_source
from liverseg_dist.data.io.nifti import ScanFile
from liverseg_dist.data.io.scan_reader import (
    ScanSource,
    hash_source,
    locate_source,
    name_source,
    read_scan,
    read_scan_volumes,
    size_of_source,
)
from liverseg_dist.errors import UserError, printable
from liverseg_dist.evaluation.ledger import fingerprint_of
from liverseg_dist.texts.formats import describe_unread
from liverseg_dist.texts.names import (
    assign_scan_ids,
    clean_text,
    derive_scan_id,
    fold_id,
    is_scan_name,
    list_some,
)
from liverseg_dist.texts.paths import expand_user_path

_NUMBERED = re.compile(r"(?s)(.+)_(\d{4})")
"""nnU-Net's channel number at the end of a name."""


@dataclass(frozen=True)
class ScanFiles:
    """The files of one scan.

    Attributes:
        scan_id: results are stored under it.
        files: one for each channel of the run, None for an absent one; or one with all channels.
        channel_count: channels of the run.
    """

    scan_id: str
    files: tuple[ScanSource | None, ...]
    channel_count: int = 1

    @property
    def paths(self) -> tuple[ScanSource, ...]:
        """The files that the scan has."""
        return tuple(path for path in self.files if path is not None)

    @property
    def first(self) -> ScanSource:
        """The file of the first channel that the scan has; masks have its grid."""
        return self.paths[0]

    @property
    def name(self) -> str:
        """Name of the first file, for messages."""
        return name_source(self.first)

    @property
    def location(self) -> str:
        """Path of the first file, for messages on the terminal; the name of a DICOM scan."""
        return locate_source(self.first)

    @property
    def size_bytes(self) -> int:
        """Size of the files that exist, as an estimate of the computing time."""
        return sum(size_of_source(path) for path in self.paths)

    def compute_sha256(self) -> str:
        """Checksum of the only file, or of all channels."""
        if len(self.files) == 1:
            return hash_source(self.first)
        sums = [None if path is None else hash_source(path) for path in self.files]
        return fingerprint_of({"channels": sums})

    def read_channels(self) -> list[ScanFile | None]:
        """Read the scan: one entry for each channel of the run, None for an absent one.

        Raises:
            UserError: a file cannot be read, or has another number of channels.
        """
        if len(self.files) < self.channel_count:
            return list(read_scan_volumes(self.first, self.channel_count))
        return [None if path is None else read_scan(path) for path in self.files]


def find_scans(
    inputs: Sequence[Path],
    out: Path,
    channels: Sequence[ChannelConfig] = CT_CHANNELS,
    dicom: DicomOptions | None = None,
) -> dict[str, ScanFiles]:
    """The scans by their id, in order.

    Args:
        inputs: files, and folders that contain scans.
        out: folder of the results.
        channels: channels of the run. With one channel each file is a scan.
        dicom: how DICOM inputs are read and named; None for the defaults.

    Raises:
        UserError: a folder holds no scan, two scans have the same id, a scan is in `out`, or a file
            is a channel that the run does not have.
    """
    # Keyed by id, so that two scans with one name are noticed before any file is read.
    files: dict[str, ScanFiles] = {}
    by_folded_id: dict[str, ScanSource] = {}
    for scan in _group_inputs(inputs, channels, dicom):
        name, file = scan.scan_id, scan.first
        # The same file may be given twice, for example by name and with its folder.
        if name in files and files[name] == scan:
            continue
        # Ids that differ only in case are one file on some file systems.
        other = by_folded_id.setdefault(fold_id(name), file)
        if other != file:
            both = f"{printable(locate_source(other))} and {printable(locate_source(file))}"
            raise UserError(f"{both} would both become {name}.nii.gz; give them different names")
        _check_not_in_output(scan, out)
        files[name] = scan
    return files


def _group_inputs(
    inputs: Sequence[Path], channels: Sequence[ChannelConfig], options: DicomOptions | None
) -> list[ScanFiles]:
    """The scans of NIfTI and DICOM inputs in the order of the inputs."""
    dicom = [path for path in inputs if is_dicom_source(path)]
    if not dicom:
        return _group_files(inputs, channels)
    found: dict[Path, list[ScanFiles]] = {}
    for path, scan in find_dicom_scans(dicom, options):
        found.setdefault(path, []).append(ScanFiles(scan.name, (scan,), len(channels)))
    nifti = [path for path in inputs if path not in dicom]
    if len(channels) > 1:
        # The numbers of the channels are found over all files.
        joined = _group_files(nifti, channels) if nifti else []
        for group in found.values():
            joined += group
        return joined
    scans: list[ScanFiles] = []
    for path in dict.fromkeys(inputs):
        scans += found.get(path, []) if path in dicom else _group_files([path], channels)
    return scans


def find_named_channels(
    options: Sequence[str],
    out: Path,
    channels: Sequence[ChannelConfig],
    dicom: DicomOptions | None = None,
) -> dict[str, ScanFiles]:
    """The scans of `--channel NAME=PATH`: one scan of files, or the scans of folders by their id.

    Args:
        options: one for each channel that the scans have.
        out: folder of the results.
        channels: channels of the run.
        dicom: how DICOM inputs are read and named; None for the defaults.

    Raises:
        UserError: an option is malformed, names no channel of the run, or the paths do not fit.
    """
    paths = _parse_channel_options(options, channels)
    if any(is_dicom_source(path) for path in paths.values()):
        joined = _join_dicom_channels(paths, channels, dicom)
        _check_not_in_output(joined, out)
        return {joined.scan_id: joined}
    are_folders = {path.is_dir() for path in paths.values()}
    if len(are_folders) > 1:
        raise UserError("--channel: give either files of one scan or folders, not both")
    by_scan: dict[str, dict[str, Path]] = {}
    if are_folders == {True}:
        for name, folder in paths.items():
            for scan, file in _name_files([folder]):
                by_scan.setdefault(scan, {})[name] = file
    else:
        first = next(paths[channel.name] for channel in channels if channel.name in paths)
        by_scan[derive_scan_id(first.name)] = paths
    scans = {}
    for scan_id in sorted(by_scan):
        files = tuple(by_scan[scan_id].get(channel.name) for channel in channels)
        scans[scan_id] = ScanFiles(scan_id, files, len(channels))
        _check_not_in_output(scans[scan_id], out)
    return scans


def _join_dicom_channels(
    paths: Mapping[str, Path], channels: Sequence[ChannelConfig], options: DicomOptions | None
) -> ScanFiles:
    """One scan with a DICOM series (or a NIfTI file) for each channel."""
    files: list[ScanSource | None] = []
    for channel in channels:
        path = paths.get(channel.name)
        source: ScanSource | None = path
        if path is not None and is_dicom_source(path):
            found = [scan for _, scan in find_dicom_scans([path], options)]
            if len(found) > 1:
                raise UserError(
                    f"--channel {channel.name}: the folder has {len(found)} scans; name one"
                )
            source = found[0]
        files.append(source)
    first = next(file for file in files if isinstance(file, DicomScan))
    return ScanFiles(first.name, tuple(files), len(channels))


def _parse_channel_options(
    options: Sequence[str], channels: Sequence[ChannelConfig]
) -> dict[str, Path]:
    # Users write the names of channels in any case.
    known = {channel.name.casefold(): channel.name for channel in channels}
    paths: dict[str, Path] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not text:
            raise UserError(f"--channel {printable(option)}: expected NAME=PATH")
        found = known.get(name.strip().casefold())
        if found is None:
            raise UserError(
                f"--channel {printable(name)}: the run has no such channel; its channels are "
                f"{', '.join(known.values())}"
            )
        if found in paths:
            raise UserError(f"--channel: {found} is given twice")
        paths[found] = expand_user_path(text)
    return paths


def _check_not_in_output(scan: ScanFiles, out: Path) -> None:
    for file in scan.paths:
        if isinstance(file, DicomScan):
            _check_not_in_dicom(file, out)
        # Compared with resolved paths, because --out may be a link to the input.
        elif file.parent.resolve() == out.resolve():
            raise UserError(
                f"{printable(file)}: lies in --out, where its mask would replace it; "
                "choose another --out"
            )


def _check_not_in_dicom(scan: DicomScan, out: Path) -> None:
    """Results in the folder of a series would count as a part of it at the next call."""
    target = out.resolve()
    for path in scan.paths:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        if folder == target or (path.is_dir() and folder in target.parents):
            raise UserError(f"{scan.name}: --out is in its DICOM folder; choose another --out")


def _group_files(inputs: Sequence[Path], channels: Sequence[ChannelConfig]) -> list[ScanFiles]:
    """The scans of files and folders, in order."""
    if len(channels) == 1:
        return [ScanFiles(scan, (file,)) for scan, file in _name_files(inputs)]
    found: dict[str, dict[int | None, Path]] = {}
    for file in _list_files(inputs):
        # With several channels the number at the end of a name is that of the channel.
        scan, number = _split_channel_number(file, channels)
        earlier = found.setdefault(scan, {}).setdefault(number, file)
        if earlier.resolve() != file.resolve():
            both = f"{printable(earlier)} and {printable(file)}"
            raise UserError(f"{both} would both become {scan}.nii.gz; give them different names")
    scans = []
    for scan, by_number in found.items():
        if None in by_number:
            if len(by_number) > 1:
                both = ", ".join(printable(path) for path in by_number.values())
                raise UserError(f"{both}: one file with all channels or one for each, not both")
            scans.append(ScanFiles(scan, (by_number[None],), len(channels)))
            continue
        files = tuple(by_number.get(number) for number in range(len(channels)))
        scans.append(ScanFiles(scan, files, len(channels)))
    return scans


def _split_channel_number(file: Path, channels: Sequence[ChannelConfig]) -> tuple[str, int | None]:
    """The scan id and the channel of a file; None for a file with all channels."""
    stem = derive_scan_id(file.name, keep_channel=True)
    match = _NUMBERED.fullmatch(stem)
    if match is None:
        return stem, None
    number = int(match[2])
    if number >= len(channels):
        names = ", ".join(channel.name for channel in channels)
        raise UserError(
            f"{printable(file)}: is channel {number} (counted from 0), but the run has "
            f"{len(channels)}: {names}"
        )
    return match[1], number


def _list_files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        files += _list_scans_in_folder(path) if path.is_dir() else [path]
    return files


def _name_files(inputs: Sequence[Path]) -> list[tuple[str, Path]]:
    """(id, file) of each scan; ids of files in a folder depend on the other files there."""
    named: list[tuple[str, Path]] = []
    for path in inputs:
        if not path.is_dir():
            # A missing file is an error of this scan only; the others are segmented.
            named.append((derive_scan_id(path.name), path))
            continue
        inside = _list_scans_in_folder(path)
        ids = assign_scan_ids(file.name for file in inside).ids
        for file in inside:
            if file.name in ids:
                named.append((ids[file.name], file))
    return named


def _list_scans_in_folder(path: Path) -> list[Path]:
    inside = _list_scan_files(path)
    if not inside:
        rest = "; ".join(describe_unread(list_visible_entries(path)))
        details = f" ({rest})" if rest else ""
        raise UserError(f"{printable(path)}: holds no .nii or .nii.gz file{details}")
    return inside


def describe_skipped_files(inputs: Sequence[Path], channel_count: int = 1) -> list[str]:
    """One line for each kind of file in the given folders that is not segmented.

    Args:
        inputs: files and folders.
        channel_count: channels of the run.
    """
    lines = []
    for folder in inputs:
        if not folder.is_dir() or is_dicom_source(folder):
            continue
        scans = _list_scan_files(folder)
        others = [path for path in list_visible_entries(folder) if path not in scans]
        notes = describe_unread(others)
        channels = []
        # With several channels, each numbered file is one of them.
        if channel_count == 1:
            for name in assign_scan_ids(file.name for file in scans).channels:
                channels.append(clean_text(name))
        if channels:
            notes.append(
                "further channels of a scan are not read, the run has one: "
                f"{list_some(channels)}; "
                "if they are scans of their own, give the files or rename them"
            )
        for note in notes:
            lines.append(f"{printable(folder)}: {note}")
    return lines


def list_visible_entries(folder: Path) -> list[Path]:
    """The entries of a folder without hidden ones, sorted."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _list_scan_files(folder: Path) -> list[Path]:
    scans = []
    for path in list_visible_entries(folder):
        if is_scan_name(path.name) and not path.is_dir():
            scans.append(path)
    return scans
