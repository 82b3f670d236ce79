"""Segment scan files into a folder: each once, resumable, a bad file does not take the rest down.

Every scan passes the audit of conversion first (`scan_checks`). Its findings are kept in the record of the
scan and in `mask_volumes.csv`.
"""

import csv
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.io.nifti import SUFFIXES, read_scan_file, write_image, write_mask
from liverseg_dist.errors import RankLost, RunFailed, UserError
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.files import natural_key, write_text
from liverseg_dist.inference.load_run import file_sha256
from liverseg_dist.inference.postprocess import TUMOUR_CONNECTIVITY, foreground_box
from liverseg_dist.inference.scan_checks import (
    Overview,
    ScanRefused,
    check_mask,
    check_scan,
    is_refused,
    to_json,
    warnings_text,
)
from liverseg_dist.inference.segment_scan import prepare_for_network, segment_onto
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.work_division import failure_line
from liverseg_dist.labels import STRUCTURES, TUMOUR, structure_mask
from liverseg_dist.volume import Grid, Volume

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
"""Status of a scan that was refused and segmented all the same."""


@dataclass(frozen=True)
class Prediction:
    """All it takes to segment a file."""

    predictor: SlidingWindowPredictor
    settings: Settings
    out: Path
    ledger: Ledger
    probabilities: bool = False
    force: bool = False
    """Segment scans that the audit refuses, and mark them."""
    again: bool = False
    """Segment scans that are done already."""
    together: Callable[[], AbstractContextManager[None]] | None = None
    """Entered while several processes compute one scan's windows; nothing of it is taken from the ledger."""

    def run_file(self, file: Path) -> tuple[dict[str, Any], bool]:
        """Segment a file and record it: (its volumes, whether it was done already).

        Raises `UserError` or `RunFailed`, `ScanRefused` among them; the ledger keeps the reason.
        """
        name = scan_name(file)
        inputs: str | None = None
        try:
            with self.together() if self.together is not None else nullcontext():
                if not file.is_file():
                    raise UserError(f"{file}: no such file")
                inputs = file_sha256(file)
                known = self._known(name, inputs)
                if known is not None:
                    return known, True
                image, checked = self._read(file)
                grid = checked.grid
                result = segment_onto(
                    image, grid, self.predictor, self.settings, self.probabilities
                )
            del image  # the checks of the mask need memory of their own
            findings = [*checked.findings, *self._check_mask(result.mask_zyx, checked)]
            write_mask(self.mask_file(name), result.mask_zyx, grid)
            for structure, values in result.probability_zyx.items():
                write_image(self.probability_file(name, structure), values, grid)
        except RankLost:
            raise
        except ScanRefused as error:
            details = {"refused": True, "findings": to_json(error.findings)}
            self.ledger.write_failure(
                name, str(error).replace(str(file), file.name), inputs, details
            )
            raise
        except Exception as error:  # one file must not stop the others, whatever is wrong with it
            message = failure_line(str(file), error)
            self.ledger.write_failure(name, message.replace(str(file), file.name), inputs)
            if isinstance(error, UserError):
                raise UserError(message) from error
            raise RunFailed(message) from error
        record = {
            "case_id": name,
            "mask": self.mask_file(name).name,
            **mask_volumes(result.mask_zyx, grid),
            "findings": to_json(findings),
            "forced": is_refused(checked.findings),
        }
        self.ledger.write(name, record, inputs)
        return record, False

    def help_file(self, file: Path) -> None:
        """Compute this process's windows of a scan that another one segments. Raises `RunFailed`."""
        assert self.together is not None
        try:
            with self.together():
                image, _ = self._read(file)
                for _ in self.predictor.stream(image.voxels, self.settings.data.intensity):
                    pass
        except (RankLost, ScanRefused):
            raise
        except Exception as error:
            raise RunFailed(failure_line(str(file), error)) from error

    def _known(self, name: str, inputs: str) -> dict[str, Any] | None:
        """The record of a scan that need not be segmented again."""
        if self.again or self.together is not None:
            return None
        known = self.ledger.read(name, inputs)
        if known is None or (known["forced"] and not self.force):
            return None
        return known if all(path.is_file() for path in self._files(name)) else None

    def _read(self, file: Path) -> tuple[Volume, "CheckedScan"]:
        """(the scan as the network knows it, what is kept of the file's own voxels).

        Every rank comes to the same findings, so that all ranks refuse a scan. Raises `ScanRefused`.
        """
        read = read_scan_file(file)
        scan = read.volume
        findings = check_scan(scan, read.notes, self.settings)
        if is_refused(findings) and not self.force:
            raise ScanRefused(str(file), findings)
        return prepare_for_network(scan, self.settings), CheckedScan(
            scan.grid, Overview.of_scan(scan), tuple(findings)
        )

    def _check_mask(self, mask_zyx: np.ndarray, checked: "CheckedScan") -> list[Finding]:
        return check_mask(Volume(mask_zyx, checked.grid), checked.overview, self.settings)

    def mask_file(self, name: str) -> Path:
        return self.out / f"{name}.nii.gz"

    def probability_file(self, name: str, structure: str) -> Path:
        return self.out / "probabilities" / f"{name}_{structure}.nii.gz"

    def _files(self, name: str) -> list[Path]:
        wanted = (
            [self.probability_file(name, structure) for structure in STRUCTURES]
            if self.probabilities
            else []
        )
        return [self.mask_file(name), *wanted]

    def write_table(self) -> Path:
        """`mask_volumes.csv`: a row per scan of this folder, also of earlier calls with the same run and settings."""
        rows: list[dict[str, object]] = [
            {
                **record,
                "scan": record["case_id"],
                "status": FORCED if record["forced"] else "done",
                "warnings": warnings_text(record["findings"]),
            }
            for record in self.ledger.read_all()
        ]
        details = self.ledger.failure_details()
        for name, text in self.ledger.failures().items():
            findings = details.get(name, {}).get("findings", [])
            status = "refused" if name in details else "failed"
            rows.append(
                {"scan": name, "status": status, "warnings": warnings_text(findings), "error": text}
            )
        rows.sort(key=lambda row: natural_key(str(row["scan"])))
        table = io.StringIO()
        writer = csv.DictWriter(
            table, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        write_text(self.out / "volumes.csv", table.getvalue())
        return self.out / "volumes.csv"


@dataclass(frozen=True)
class CheckedScan:
    """What is kept of a scan that may be segmented; its own voxels are not: in large scans they count."""

    grid: Grid
    overview: Overview
    findings: tuple[Finding, ...]


def mask_volumes(mask_zyx: np.ndarray, grid: Grid) -> dict[str, object]:
    """Volume of liver (with its tumours) and of tumour in ml, tumour burden (tumour / liver, null without a liver),
    number of tumours (by faces, as LiTS counts lesions)."""
    counts = _counts(mask_zyx)
    tumour, liver = int(counts[TUMOUR]), int(counts[1] + counts[TUMOUR])
    tumour_mask = structure_mask(mask_zyx, "tumour").view(np.uint8)
    box = foreground_box(
        tumour_mask
    )  # in large scans the numbers of components, 4 bytes a voxel, count
    lesions = 0
    if box is not None:
        inner = np.ascontiguousarray(tumour_mask[box])
        lesions = int(
            cc3d.connected_components(inner, connectivity=TUMOUR_CONNECTIVITY, return_N=True)[1]
        )
    return {
        "liver_ml": liver * grid.voxel_volume_ml,
        "tumour_ml": tumour * grid.voxel_volume_ml,
        "burden": tumour / liver if liver else None,
        "tumours": lesions,
    }


def find_scans(inputs: Sequence[Path], out: Path) -> list[Path]:
    """The scan files among files and folders, in order, each once. Raises `UserError`."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.name.endswith(SUFFIXES) and not p.name.startswith(".")
            )
            if not inside:
                raise UserError(f"{path}: holds no .nii or .nii.gz file")
            files += inside
        else:
            files.append(
                path
            )  # a missing file is told when its turn comes; the others are segmented
    names: dict[str, Path] = {}
    for file in files:
        name = scan_name(file)
        if names.setdefault(name, file) != file:
            raise UserError(
                f"{names[name]} and {file} would both become {name}.nii.gz; give them different names"
            )
        if file.parent.resolve() == out.resolve():
            raise UserError(
                f"{file}: lies in --out, where its mask would replace it; choose another --out"
            )
    return list(names.values())


def scan_name(file: Path) -> str:
    """File name without .nii or .nii.gz; a channel number (`_0000`) stays, so that names match the images'."""
    for suffix in SUFFIXES:
        if file.name.endswith(suffix):
            return file.name.removesuffix(suffix)
    return file.name


def _counts(mask_zyx: np.ndarray) -> np.ndarray:
    """Voxels per label, slice by slice: bincount makes 8-byte integers of what it counts."""
    return np.sum(
        [np.bincount(slice_yx.reshape(-1), minlength=TUMOUR + 1) for slice_yx in mask_zyx], axis=0
    )


def _cell(value: object) -> object:
    if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}:
        return f"'{value}"  # a spreadsheet would take it for a formula
    return "" if value is None else value
