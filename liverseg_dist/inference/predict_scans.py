"""Segment scan files into a folder.

Each scan is segmented once, an interrupted call can be continued, and a file that fails does not
stop the others. The audit of conversion checks every scan first (`scan_checks`). Its findings are
kept in the record of the scan and in `volumes.csv`. Used by `liverseg predict`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.nifti import read_scan_file, write_image, write_mask
from liverseg_dist.errors import RankLost, RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.files import file_sha256, natural_key, write_text
from liverseg_dist.inference.postprocess import TUMOUR_CONNECTIVITY, find_foreground_box
from liverseg_dist.inference.scan_checks import (
    Overview,
    ScanRefused,
    check_mask,
    check_scan,
    findings_to_json,
    is_refused,
    join_warnings,
)
from liverseg_dist.inference.segment_scan import (
    Segmentation,
    prepare_for_network,
    segment_to_grid,
)
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.labels import LIVER, STRUCTURES, TUMOUR, structure_mask
from liverseg_dist.texts.csv_output import format_csv
from liverseg_dist.texts.formats import explain_unsupported_format
from liverseg_dist.texts.names import clean_text, derive_scan_id, is_scan_name
from liverseg_dist.volume import Grid, Volume

TABLE_FILE = "volumes.csv"
COLUMNS = (
    "scan",
    "status",
    "liver_ml",
    "tumour_ml",
    "burden",
    "tumours",
    "warnings",
    "mask",
    "error",
)
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
    """

    grid: Grid
    overview: Overview
    findings: tuple[Finding, ...]


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
        scan_ids: ids of the files whose id depends on other files of their folder
            (`scan_files.find_scans`).
    """

    predictor: SlidingWindowPredictor
    settings: Settings
    out: Path
    ledger: Ledger
    with_probabilities: bool = False
    force: bool = False
    recompute: bool = False
    window_scope: Callable[[], AbstractContextManager[None]] | None = None
    scan_ids: Mapping[Path, str] = field(default_factory=dict)

    def get_scan_id(self, file: Path) -> str:
        """The id of the scan in a file; results are stored under it."""
        return self.scan_ids.get(file) or derive_scan_id(file.name)

    def get_mask_file(self, scan: str) -> Path:
        """File of a scan's mask."""
        return self.out / f"{scan}.nii.gz"

    def get_probability_file(self, scan: str, structure: str) -> Path:
        """File of a structure's probabilities."""
        return self.out / "probabilities" / f"{scan}_{structure}.nii.gz"

    def segment_file(self, file: Path) -> tuple[dict[str, Any], bool]:
        """Segment a file and record the result.

        Returns:
            The record (volumes and findings), and whether the file was done already.

        Raises:
            UserError: the file cannot be read, or is no scan.
            ScanRefused: the audit refuses the scan.
            RunFailed: another reason; in all three cases the ledger has the reason.
            RankLost: another rank no longer answers.
        """
        scan = self.get_scan_id(file)
        sha256: str | None = None
        try:
            with self.window_scope() if self.window_scope is not None else nullcontext():
                _check_file_name(file)
                sha256 = file_sha256(file)
                known = self._find_record(scan, sha256)
                if known is not None:
                    return known, True
                image, checked = self._read_scan(file)
                result = segment_to_grid(
                    image, checked.grid, self.predictor, self.settings, self.with_probabilities
                )
            # The checks of the mask need memory of their own.
            del image
            mask = Volume(result.mask_zyx, checked.grid)
            findings = [*checked.findings, *check_mask(mask, checked.overview, self.settings)]
            self._write_result(scan, result, checked.grid)
        except RankLost:
            raise
        except ScanRefused as error:
            details = {"refused": True, "findings": findings_to_json(error.findings)}
            self.ledger.write_failure(scan, _strip_folder(str(error), file), sha256, details)
            raise
        # A file can fail for many reasons (damage, memory); the others must continue.
        except Exception as error:
            message = format_failure(str(file), error)
            self.ledger.write_failure(scan, _strip_folder(message, file), sha256)
            if isinstance(error, UserError):
                raise UserError(message) from error
            raise RunFailed(message) from error
        record = {
            "case_id": scan,
            "mask": self.get_mask_file(scan).name,
            **measure_mask(result.mask_zyx, checked.grid),
            "findings": findings_to_json(findings),
            "forced": is_refused(checked.findings),
        }
        self.ledger.write(scan, record, sha256)
        return record, False

    def compute_shared_windows(self, file: Path) -> None:
        """Compute this process's windows of a scan that another process segments.

        Raises:
            ScanRefused: the audit refuses the scan.
            RunFailed: the scan failed for another reason.
            RankLost: another rank no longer answers.
        """
        assert self.window_scope is not None
        intensity = self.settings.data.intensity
        try:
            with self.window_scope():
                image, _ = self._read_scan(file)
                # The results go to the other process; here only the loop has to run.
                for _ in self.predictor.stream_probabilities(image.voxels, intensity):
                    pass
        except (RankLost, ScanRefused):
            raise
        except Exception as error:
            raise RunFailed(format_failure(str(file), error)) from error

    def _find_record(self, scan: str, sha256: str) -> dict[str, Any] | None:
        """The record of a scan that need not be segmented again."""
        # All ranks must compute a shared scan, or none: only one of them reads the ledger.
        if self.recompute or self.window_scope is not None:
            return None
        known = self.ledger.read(scan, sha256)
        if known is None or (known["forced"] and not self.force):
            return None
        return known if all(path.is_file() for path in self._list_outputs(scan)) else None

    def _read_scan(self, file: Path) -> tuple[Volume, CheckedScan]:
        """The scan prepared for the network, and what is kept of the scan itself.

        Every rank gets the same findings, so all ranks refuse a scan or none.
        """
        read = read_scan_file(file)
        scan = read.volume
        findings = check_scan(scan, read.notes, self.settings)
        if is_refused(findings) and not self.force:
            raise ScanRefused(str(file), findings)
        checked = CheckedScan(scan.grid, Overview.from_scan(scan), tuple(findings))
        return prepare_for_network(scan, self.settings), checked

    def _write_result(self, scan: str, result: Segmentation, grid: Grid) -> None:
        write_mask(self.get_mask_file(scan), result.mask_zyx, grid)
        for structure, values in result.probability_zyx.items():
            write_image(self.get_probability_file(scan, structure), values, grid)

    def _list_outputs(self, scan: str) -> list[Path]:
        files = [self.get_mask_file(scan)]
        if self.with_probabilities:
            for structure in STRUCTURES:
                files.append(self.get_probability_file(scan, structure))
        return files

    def write_volume_table(self) -> Path:
        """Write `volumes.csv`, and return its path.

        It has one row for each scan in the folder, also of earlier calls with the same run and
        settings.
        """
        rows: list[dict[str, object]] = []
        for record in self.ledger.read_all():
            status = FORCED if record["forced"] else "done"
            warnings = join_warnings(record["findings"])
            rows.append(
                {**record, "scan": record["case_id"], "status": status, "warnings": warnings}
            )
        details = self.ledger.failure_details()
        for scan, text in self.ledger.failures().items():
            status = "refused" if scan in details else "failed"
            warnings = join_warnings(details.get(scan, {}).get("findings", []))
            rows.append({"scan": scan, "status": status, "warnings": warnings, "error": text})
        rows.sort(key=lambda row: natural_key(str(row["scan"])))
        write_text(self.out / TABLE_FILE, format_csv(COLUMNS, rows))
        return self.out / TABLE_FILE


def measure_mask(mask_zyx: np.ndarray, grid: Grid) -> dict[str, object]:
    """Volumes and number of tumours of a mask.

    Returns:
        `liver_ml`: volume of the liver with its tumours. `tumour_ml`: volume of the tumours.
        `burden`: tumour volume / liver volume; None without a liver. `tumours`: number of tumours,
        connected by faces as lesions are counted in LiTS.
    """
    counts = _count_labels(mask_zyx)
    tumour, liver = int(counts[TUMOUR]), int(counts[LIVER] + counts[TUMOUR])
    tumour_mask = structure_mask(mask_zyx, "tumour").view(np.uint8)
    # Components need 4 bytes per voxel: only inside the box, because scans can be large.
    box = find_foreground_box(tumour_mask)
    lesions = 0
    if box is not None:
        _, lesions = cc3d.connected_components(
            np.ascontiguousarray(tumour_mask[box]), connectivity=TUMOUR_CONNECTIVITY, return_N=True
        )
    return {
        "liver_ml": liver * grid.voxel_volume_ml,
        "tumour_ml": tumour * grid.voxel_volume_ml,
        "burden": tumour / liver if liver else None,
        "tumours": int(lesions),
    }


def _check_file_name(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: {explain_unsupported_format(file) or 'no such file'}")
    if not is_scan_name(file.name) and (reason := explain_unsupported_format(file)) is not None:
        raise UserError(f"{file}: {reason}")


def _strip_folder(message: str, file: Path) -> str:
    """The message with only the last part of the file's path.

    Results are passed on to others, and folders can contain the name of a patient.
    """
    for path in (str(file), printable(file)):
        message = message.replace(path, clean_text(file.name))
    return printable(message)


def _count_labels(mask_zyx: np.ndarray) -> np.ndarray:
    """Voxels of each label.

    Slice by slice: `bincount` converts its input to 8-byte integers.
    """
    counts = np.zeros(TUMOUR + 1, dtype=np.int64)
    for slice_yx in mask_zyx:
        counts += np.bincount(slice_yx.reshape(-1), minlength=TUMOUR + 1)
    return counts
