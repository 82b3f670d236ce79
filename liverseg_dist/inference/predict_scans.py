"""Segment scan files into a folder: each once, resumable, a bad file does not take the rest down.

Every scan passes the audit of conversion first (`scan_checks`). Its findings are kept in the record of the
scan and in `volumes.csv`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.io.nifti import read_scan_file, write_image, write_mask
from liverseg_dist.errors import RankLost, RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.files import file_sha256, natural_key, write_text
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
from liverseg_dist.texts.csv_output import format_csv
from liverseg_dist.texts.formats import describe_unread, refusal
from liverseg_dist.texts.names import (
    clean_text,
    fold_id,
    is_scan_name,
    list_some,
    name_scans,
    scan_id,
)
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
    names: Mapping[Path, str] = field(default_factory=dict)
    """Ids of scans where the neighbours of a file have a say (`find_scans`)."""

    def name_of(self, file: Path) -> str:
        """The id of the scan in a file, by which results are kept."""
        return self.names.get(file) or scan_id(file.name)

    def run_file(self, file: Path) -> tuple[dict[str, Any], bool]:
        """Segment a file and record it: (its volumes, whether it was done already).

        Raises `UserError` or `RunFailed`, `ScanRefused` among them; the ledger keeps the reason.
        """
        name = self.name_of(file)
        inputs: str | None = None
        try:
            with self.together() if self.together is not None else nullcontext():
                if not file.is_file():
                    raise UserError(f"{file}: {refusal(file) or 'no such file'}")
                if not is_scan_name(file.name) and (reason := refusal(file)) is not None:
                    raise UserError(f"{file}: {reason}")
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
            message = _without_folder(str(error), file)
            self.ledger.write_failure(name, message, inputs, details)
            raise
        except Exception as error:  # one file must not stop the others, whatever is wrong with it
            message = failure_line(str(file), error)
            self.ledger.write_failure(name, _without_folder(message, file), inputs)
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
        """`volumes.csv`: a row per scan of this folder, also of earlier calls with the same run and settings."""
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
        write_text(self.out / "volumes.csv", format_csv(COLUMNS, rows))
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


def find_scans(inputs: Sequence[Path], out: Path) -> dict[str, Path]:
    """The scan files among files and folders by the id of the scan, in order. Raises `UserError`."""
    named: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_dir():
            inside = _scans_in(path)
            if not inside:
                rest = "; ".join(describe_unread(visible_entries(path)))
                raise UserError(
                    f"{printable(path)}: holds no .nii or .nii.gz file{f' ({rest})' if rest else ''}"
                )
            ids = name_scans(file.name for file in inside).ids
            named += [(ids[file.name], file) for file in inside if file.name in ids]
        else:
            # A missing file fails when its turn comes; the others are segmented.
            named.append((scan_id(path.name), path))
    files: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    for name, file in named:
        if name in files and files[name] == file:
            continue
        other = folded.setdefault(fold_id(name), file)
        if other != file:
            both = f"{printable(other)} and {printable(file)}"
            raise UserError(f"{both} would both become {name}.nii.gz; give them different names")
        if file.parent.resolve() == out.resolve():
            raise UserError(
                f"{printable(file)}: lies in --out, where its mask would replace it; choose another --out"
            )
        files[name] = file
    return files


def describe_left_out(inputs: Sequence[Path]) -> list[str]:
    """Lines on what lies in the given folders and is not segmented."""
    lines = []
    for folder in inputs:
        if not folder.is_dir():
            continue
        scans = _scans_in(folder)
        left = describe_unread(path for path in visible_entries(folder) if path not in scans)
        channels = [clean_text(name) for name in name_scans(file.name for file in scans).channels]
        if channels:
            text = f"further channels of a scan are not read, a CT has one: {list_some(channels)}"
            left.append(f"{text}; if they are scans of their own, give the files or rename them")
        lines += [f"{printable(folder)}: {line}" for line in left]
    return lines


def visible_entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _scans_in(folder: Path) -> list[Path]:
    return [
        path for path in visible_entries(folder) if is_scan_name(path.name) and not path.is_dir()
    ]


def _without_folder(message: str, file: Path) -> str:
    """As results keep it: of the file's path only the last part."""
    for path in (str(file), printable(file)):
        message = message.replace(path, clean_text(file.name))
    return printable(message)


def _counts(mask_zyx: np.ndarray) -> np.ndarray:
    """Voxels per label, slice by slice: bincount makes 8-byte integers of what it counts."""
    return np.sum(
        [np.bincount(slice_yx.reshape(-1), minlength=TUMOUR + 1) for slice_yx in mask_zyx], axis=0
    )
