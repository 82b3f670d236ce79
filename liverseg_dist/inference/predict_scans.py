"""Segment scan files into a folder.

Each scan is segmented once, an interrupted call can be continued, and a file that fails does not
stop the others. The audit of conversion checks every scan first (`scan_checks`). Its findings are
kept in the record of the scan and in `volumes.csv`. Used by `liverseg predict`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dicom_sources import is_dicom_source
from liverseg_dist.data.io.nifti import write_image, write_mask
from liverseg_dist.data.io.scan_reader import as_dicom, hide_paths
from liverseg_dist.errors import RankLost, RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.files import natural_key, write_text
from liverseg_dist.inference.dicom_results import DicomResults, write_dicom_results
from liverseg_dist.inference.mask_table import list_volume_columns, measure_mask
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.scan_checks import (
    Overview,
    ScanRefused,
    check_channels,
    check_mask,
    findings_to_json,
    is_refused,
    join_warnings,
)
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.inference.segment_scan import (
    NetworkImage,
    Segmentation,
    check_present_channels,
    prepare_for_network,
    segment_to_grid,
    stream_image,
)
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.csv_output import format_csv
from liverseg_dist.texts.formats import explain_unsupported_format
from liverseg_dist.texts.names import is_scan_name
from liverseg_dist.volume import Grid, Volume

TABLE_FILE = "volumes.csv"
PROBABILITIES = "probabilities"
FORCED = "forced"
"""Status of a scan that was refused but segmented because of `--force`."""


@dataclass(frozen=True)
class CheckedScan:
    """What is kept of a checked scan while it is segmented.

    Its own voxels are not kept, because they need much memory for large scans.

    Attributes:
        grid: the scan's own grid.
        overview: coarse copy for the checks of the mask.
        findings: findings of the file.
        channels: names of the channels that the scan has.
    """

    grid: Grid
    overview: Overview
    findings: tuple[Finding, ...]
    channels: tuple[str, ...]


@dataclass(eq=False)
class ScanInWork:
    """A scan on its way through the stages of `ScanPredictor`.

    Attributes:
        files: the scan's files.
        sha256: their checksum.
        known: the record of an earlier call; then the other stages are skipped.
        image: the prepared image; None once the mask is computed.
        checked: what is kept of the scan.
        result: the mask before post-processing, and the probabilities.
    """

    files: ScanFiles
    sha256: str | None = None
    known: dict[str, Any] | None = None
    image: NetworkImage | None = None
    checked: CheckedScan | None = None
    result: Segmentation | None = None


@dataclass(frozen=True)
class ScanPredictor:
    """Segments files.

    Attributes:
        predictor: the run's predictor.
        settings: the run's resolved settings.
        out: folder of the results.
        ledger: record of the results.
        with_probabilities: whether to write the probabilities as well.
        force: whether to segment scans that the audit refuses; they are marked.
        recompute: whether to segment scans that are done already.
        window_scope: entered while several processes compute the windows of one scan. Such a scan
            is always computed, even if the ledger has it.
        dicom: what is written for DICOM scans beside the mask; None for nothing.
    """

    predictor: SlidingWindowPredictor
    settings: Settings
    out: Path
    ledger: Ledger
    with_probabilities: bool = False
    force: bool = False
    recompute: bool = False
    window_scope: Callable[[], AbstractContextManager[None]] | None = None
    dicom: DicomResults | None = None

    @property
    def labels(self) -> LabelScheme:
        """Class values and structures of the masks."""
        return self.predictor.outputs.labels

    def get_mask_file(self, scan: str) -> Path:
        """File of a scan's mask."""
        return self.out / f"{scan}.nii.gz"

    def list_dicom_files(self, scans: Sequence[str]) -> list[Path]:
        """The DICOM results of scans that exist."""
        files: list[Path] = []
        for scan in scans:
            candidates = [] if self.dicom is None else self.dicom.list_files(self.out, scan)
            files += [file for file in candidates if file.is_file()]
        return files

    def get_probability_file(self, scan: str, structure: str) -> Path:
        """File of a structure's probabilities."""
        return self.out / PROBABILITIES / name_probability_file(scan, structure)

    def segment_scan(self, files: ScanFiles) -> tuple[dict[str, Any], bool]:
        """Segment a scan and record the result.

        Returns:
            The record (volumes and findings), and whether the scan was done already.

        Raises:
            UserError: a file cannot be read, is no scan, or a channel is missing.
            ScanRefused: the audit refuses the scan.
            RunFailed: another reason; in all three cases the ledger has the reason.
            RankLost: another rank no longer answers.
        """
        work = ScanInWork(files)
        with self.window_scope() if self.window_scope is not None else nullcontext():
            self.read_scan(work)
            if work.known is None:
                self.compute_mask(work)
        if work.known is not None:
            return work.known, True
        return self.finish_scan(work), False

    def read_scan(self, work: ScanInWork) -> None:
        """First stage: find a known result, or read, check and prepare the scan.

        Raises:
            As `segment_scan`; the ledger has the reason. The same holds for the other stages.
        """
        with self._recorded_failure(work):
            # All names are checked before the checksums, which read the whole files.
            for file in work.files.paths:
                if isinstance(file, Path):
                    _check_file_name(file)
            work.sha256 = work.files.compute_sha256()
            work.known = self._find_record(work.files, work.sha256)
            if work.known is None:
                work.image, work.checked = self._read_scan(work.files)

    def compute_mask(self, work: ScanInWork) -> None:
        """Second stage: the network, and the mask on the grid of the scan."""
        assert work.image is not None
        assert work.checked is not None
        with self._recorded_failure(work):
            work.result = segment_to_grid(
                work.image,
                work.checked.grid,
                self.predictor,
                self.with_probabilities or self._needs_probabilities(work.files),
                postprocess=False,
            )
        # The image has the voxel size of the network and can be larger than the scan; the last
        # stage needs memory of its own.
        work.image = None

    def finish_scan(self, work: ScanInWork) -> dict[str, Any]:
        """Last stage: post-process, check, write and record the mask; returns the record."""
        assert work.result is not None
        assert work.checked is not None
        result, checked, scan = work.result, work.checked, work.files.scan_id
        with self._recorded_failure(work):
            postprocess_mask(
                result.mask_zyx, checked.grid.spacing_mm, self.predictor.config, self.labels
            )
            mask = Volume(result.mask_zyx, checked.grid)
            findings = [*checked.findings, *check_mask(mask, checked.overview, self.settings)]
            self._write_result(work.files, result, checked.grid)
        # Measured once and recorded: the table is written from the records, also those of other
        # ranks.
        record = {
            "case_id": scan,
            "mask": self.get_mask_file(scan).name,
            **measure_mask(result.mask_zyx, checked.grid, self.labels),
            "findings": findings_to_json(findings),
            "forced": is_refused(checked.findings),
        }
        # Runs of one channel have no choice: their records keep the keys of earlier versions.
        if len(self.settings.data.image_channels) > 1:
            record["channels"] = list(checked.channels)
        # Last of all: only a scan with an entry counts as done.
        self.ledger.write(scan, record, work.sha256)
        return record

    @contextmanager
    def _recorded_failure(self, work: ScanInWork) -> Iterator[None]:
        """Record the reason in the ledger if a stage fails, and raise it as one line."""
        files, scan = work.files, work.files.scan_id
        try:
            yield
        except RankLost:
            raise
        except ScanRefused as error:
            details = {"refused": True, "findings": findings_to_json(error.findings)}
            text = _strip_folders(str(error), files)
            self.ledger.write_failure(scan, text, work.sha256, details)
            raise
        # A file can fail for many reasons (damage, memory); the others must continue.
        except Exception as error:
            message = format_failure(files.location, error)
            self.ledger.write_failure(scan, _strip_folders(message, files), work.sha256)
            if isinstance(error, UserError):
                raise UserError(message) from error
            raise RunFailed(message) from error

    def compute_shared_windows(self, files: ScanFiles) -> None:
        """Compute this process's windows of a scan that another process segments.

        Raises:
            ScanRefused: the audit refuses the scan.
            RunFailed: the scan failed for another reason.
            RankLost: another rank no longer answers.
        """
        assert self.window_scope is not None
        try:
            with self.window_scope():
                image, _ = self._read_scan(files)
                # The results go to the other process; here only the loop has to run.
                for _ in stream_image(image, self.predictor):
                    pass
        except (RankLost, ScanRefused):
            raise
        except Exception as error:
            raise RunFailed(format_failure(files.location, error)) from error

    def _find_record(self, files: ScanFiles, sha256: str) -> dict[str, Any] | None:
        """The record of a scan that need not be segmented again."""
        # All ranks must compute a shared scan, or none: only one of them reads the ledger.
        if self.recompute or self.window_scope is not None:
            return None
        known = self.ledger.read(files.scan_id, sha256)
        # A forced mask is not reused silently when the option is no longer given.
        if known is None or (known["forced"] and not self.force):
            return None
        outputs = self._list_outputs(files, known)
        # The ledger alone is not enough; somebody may have deleted a mask.
        return known if all(path.is_file() for path in outputs) else None

    def _read_scan(self, files: ScanFiles) -> tuple[NetworkImage, CheckedScan]:
        """The scan prepared for the network, and what is kept of the scan itself.

        Every rank gets the same findings, so all ranks refuse a scan or none.
        """
        # Before the files are read: missing channels are known from their number.
        if len(files.files) == files.channel_count:
            check_present_channels([path is not None for path in files.files], self.settings)
        read = files.read_channels()
        findings = check_channels(read, self.settings)
        if is_refused(findings) and not self.force:
            raise ScanRefused(files.location, findings)
        volumes = [None if one is None else one.volume for one in read]
        number = next(at for at, volume in enumerate(volumes) if volume is not None)
        first = volumes[number]
        assert first is not None
        names = []
        for channel, volume in zip(self.settings.data.image_channels, volumes, strict=True):
            if volume is not None:
                names.append(channel.name)
        # Taken before the scan is resampled, because the scan itself is not kept.
        overview = Overview.from_scan(first, number)
        checked = CheckedScan(first.grid, overview, tuple(findings), tuple(names))
        return prepare_for_network(volumes, self.settings), checked

    def _write_result(self, files: ScanFiles, result: Segmentation, grid: Grid) -> None:
        scan = files.scan_id
        write_mask(self.get_mask_file(scan), result.mask_zyx, grid)
        if self.with_probabilities:
            for structure, values in result.probability_zyx.items():
                write_image(self.get_probability_file(scan, structure), values, grid)
        source = as_dicom(files.first)
        if source is not None and self.dicom is not None:
            mask = Volume(result.mask_zyx, grid)
            write_dicom_results(
                source, mask, self.labels, self.out, self.dicom, result.probability_zyx
            )

    def _needs_probabilities(self, files: ScanFiles) -> bool:
        """Whether the SEG of a DICOM scan holds probabilities."""
        is_fractional = self.dicom is not None and self.dicom.kind == "fractional"
        return is_fractional and as_dicom(files.first) is not None

    def _list_outputs(self, files: ScanFiles, record: Mapping[str, Any]) -> list[Path]:
        outputs = [self.get_mask_file(files.scan_id)]
        if self.with_probabilities:
            for structure in self.labels.structure_names:
                outputs.append(self.get_probability_file(files.scan_id, structure))
        # A mask without foreground has no DICOM results.
        has_foreground = any(record[f"{name}_ml"] for name in self.labels.structure_names)
        if self.dicom is not None and has_foreground and as_dicom(files.first) is not None:
            outputs += self.dicom.list_files(self.out, files.scan_id)
        return outputs

    def write_volume_table(self) -> Path:
        """Write `volumes.csv`, and return its path.

        It has one row for each scan in the folder, also of earlier calls with the same run and
        settings.
        """
        rows: list[dict[str, object]] = []
        for record in self.ledger.read_all():
            status = FORCED if record["forced"] else "done"
            rows.append(
                {
                    **record,
                    "scan": record["case_id"],
                    "status": status,
                    "channels": " | ".join(record.get("channels", [])),
                    "warnings": join_warnings(record["findings"]),
                }
            )
        details = self.ledger.failure_details()
        for scan, text in self.ledger.failures().items():
            status = "refused" if scan in details else "failed"
            warnings = join_warnings(details.get(scan, {}).get("findings", []))
            rows.append({"scan": scan, "status": status, "warnings": warnings, "error": text})
        # Natural order, so that case 2 comes before case 10.
        rows.sort(key=lambda row: natural_key(str(row["scan"])))
        has_channels = len(self.settings.data.image_channels) > 1
        columns = list_volume_columns(self.labels, with_channels=has_channels)
        write_text(self.out / TABLE_FILE, format_csv(columns, rows))
        return self.out / TABLE_FILE


def name_probability_file(scan: str, structure: str) -> str:
    """File name of a structure's probabilities; names of structures may hold any character."""
    return f"{scan}_{encode_file_name(structure)}.nii.gz"


def _check_file_name(file: Path) -> None:
    # A DICOM file or ZIP is checked when it is read.
    if is_dicom_source(file):
        return
    if not file.is_file():
        raise UserError(f"{file}: {explain_unsupported_format(file) or 'no such file'}")
    if not is_scan_name(file.name) and (reason := explain_unsupported_format(file)) is not None:
        raise UserError(f"{file}: {reason}")


def _strip_folders(message: str, files: ScanFiles) -> str:
    """The message with only the last part of the files' paths.

    Results are passed on to others, and folders can contain the name of a patient.
    """
    for file in files.paths:
        message = hide_paths(message, file)
    return printable(message)
