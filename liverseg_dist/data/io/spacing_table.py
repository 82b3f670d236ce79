"""The remedy for scans whose header lost its voxel size: a table of case -> (z, y, x) in mm.

LiTS volumes 28 to 47 are known to carry identity affines (https://github.com/PatrickChrist/LITS-CHALLENGE, issue 14).
"""

import csv
import math
from pathlib import Path

import numpy as np

from liverseg_dist.config.yaml_text import parse_yaml
from liverseg_dist.data.nifti_geometry import SPACING_LIMITS_MM
from liverseg_dist.errors import UserError, printable
from liverseg_dist.volume import Float3, Grid

COLUMNS = ("case", "z_mm", "y_mm", "x_mm")


def read_spacing_table(path: Path) -> dict[str, Float3]:
    """CSV with the columns case, z_mm, y_mm, x_mm, or YAML `case: [z, y, x]`. Raises `UserError`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = _yaml_rows(text) if Path(path).suffix in (".yaml", ".yml") else _csv_rows(text, path)
    except FileNotFoundError:
        raise UserError(
            f"{printable(path)}: no such file (convert.cleaning.spacing_table)"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{printable(path)}: not a spacing table: {' '.join(str(error).split())}"
        ) from None
    return {case: _spacing(case, values, path) for case, values in rows.items()}


def with_true_spacing(grid: Grid, spacing_mm: Float3) -> Grid:
    """The same directions and origin with voxels of `spacing_mm` (z, y, x)."""
    affine = grid.affine.copy()
    affine[:3, :3] *= np.asarray(spacing_mm)[::-1] / np.asarray(grid.spacing_mm)[::-1]
    return Grid(grid.shape, affine)


def _csv_rows(text: str, path: Path) -> dict[str, list[object]]:
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"{printable(path)}: column {missing[0]} is missing; expected {','.join(COLUMNS)}"
        )
    return {str(row["case"]).strip(): [row[name] for name in COLUMNS[1:]] for row in reader}


def _yaml_rows(text: str) -> dict[str, list[object]]:
    content = parse_yaml(text)
    if not isinstance(content, dict):
        raise ValueError("expected `case: [z, y, x]` lines")
    return {
        str(case): values if isinstance(values, list) else [values]
        for case, values in content.items()
    }


def _spacing(case: str, values: list[object], path: Path) -> Float3:
    low, high = SPACING_LIMITS_MM
    try:
        z, y, x = (float(str(value)) for value in values)
        if all(math.isfinite(mm) and low <= mm <= high for mm in (z, y, x)):
            return z, y, x
    except ValueError:
        pass
    shown = ", ".join(map(str, values))
    raise UserError(
        f"{printable(path)}: {printable(case)} has '{printable(shown)}'; three sizes in mm (z, y, x) are needed"
    )
