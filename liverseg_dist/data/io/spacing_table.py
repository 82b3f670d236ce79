"""A table case -> voxel size (z, y, x) in mm, for scans whose header lost its voxel size.

`convert.cleaning.spacing_table` names the file; the conversion replaces the size of the header.
LiTS volumes 28 to 47 are known to have identity affines
(https://github.com/PatrickChrist/LITS-CHALLENGE, issue 14).
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from liverseg_dist.data.io.nifti_geometry import SPACING_LIMITS_MM
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.matching import TableEntry, match_entries
from liverseg_dist.texts.structured import read_yaml
from liverseg_dist.texts.tables import read_table
from liverseg_dist.volume import Float3, Grid

COLUMNS = ("case", "z_mm", "y_mm", "x_mm")
PURPOSE = " (convert.cleaning.spacing_table)"
YAML_SUFFIXES = (".yaml", ".yml", ".json")


def read_spacing_table(path: Path, scans: Collection[str] | None = None) -> dict[str, Float3]:
    """Read the voxel size (z, y, x) in mm of each scan.

    Args:
        path: CSV or TSV with the columns case, z_mm, y_mm, x_mm, or YAML `case: [z, y, x]`.
        scans: Ids of the data set; the names in the table are matched with them. None: the names
            are used as written.

    Raises:
        UserError: Not such a table, a scan with two rows, or no row for any of `scans`.
    """
    entries = _read_entries(Path(path))
    if scans is None:
        scans = {entry.name for entry in entries}
    matches = match_entries(path, entries, scans)
    return {scan: entry.value for scan, entry in matches.by_scan.items()}


def describe_unmatched(path: Path, scans: Collection[str]) -> list[str]:
    """List the rows without a scan and the scans without a row, one message for each kind.

    Raises:
        UserError: see `read_spacing_table`.
    """
    matches = match_entries(path, _read_entries(Path(path)), scans)
    return matches.describe(path, "so they keep the voxel size of their header")


def replace_spacing(grid: Grid, spacing_mm: Float3) -> Grid:
    """A grid with the same directions and origin, and voxels of `spacing_mm` (z, y, x)."""
    affine = grid.affine.copy()
    # Spacing is z, y, x; columns of the affine are x, y, z.
    affine[:3, :3] *= np.asarray(spacing_mm)[::-1] / np.asarray(grid.spacing_mm)[::-1]
    return Grid(grid.shape, affine)


def _read_entries(path: Path) -> list[TableEntry[Float3]]:
    if path.suffix.lower() in YAML_SUFFIXES:
        return _read_yaml_entries(path)
    table = read_table(path, COLUMNS, PURPOSE)
    entries = []
    for row in table.rows:
        values = [row[name] for name in COLUMNS[1:]]
        # Spreadsheets in many languages write 2,5 for 2.5.
        if table.separator != ",":
            values = [value.replace(",", ".") for value in values]
        name, where = row["case"], f"line {row.line}"
        if not name:
            raise UserError(f"{printable(path)}: {where} has no case{PURPOSE}")
        entries.append(TableEntry(where, name, _parse_spacing(name, values, path, where)))
    if not entries:
        raise UserError(f"{printable(path)}: has no rows{PURPOSE}")
    return entries


def _read_yaml_entries(path: Path) -> list[TableEntry[Float3]]:
    content = read_yaml(path, f"; not a spacing table{PURPOSE}")
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{printable(path)}: not a spacing table: expected `case: [z, y, x]` lines{PURPOSE}"
        )
    entries = []
    for name, value in content.items():
        # A scalar becomes a list of one, which is refused with the other wrong lengths.
        values = value if isinstance(value, list) else [value]
        where = f"the key {printable(name)}"
        entries.append(TableEntry(where, name, _parse_spacing(name, values, path, where)))
    return entries


def _parse_spacing(name: str, values: Sequence[object], path: Path, where: str) -> Float3:
    low, high = SPACING_LIMITS_MM
    try:
        z, y, x = (float(str(value)) for value in values)
        if all(math.isfinite(mm) and low <= mm <= high for mm in (z, y, x)):
            return z, y, x
    except ValueError:  # not numbers, or not three: the error below names them
        pass
    shown = printable(", ".join(map(str, values)))
    raise UserError(
        f"{printable(path)}: {where}: {printable(name)} has '{shown}'; "
        "three sizes in mm (z, y, x) are needed"
    )
