"""Small data sets in the Task03 layout, written by nibabel, and helpers of conversion tests."""

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from liverseg_dist.commands.main import main
from tests.data.mini_store import ct_like

SHAPE = (70, 40, 44)
"""z, y, x: a few more slices than a slab has."""
LPS = np.diag([-1.5, -1.5, 2.0, 1.0])
RAS = np.diag([1.5, 1.5, 2.0, 1.0])


def write_nifti(
    path: Path, voxels_zyx: np.ndarray, affine: np.ndarray = LPS, **header: Any
) -> None:
    """`header`: fields such as descrip, written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels_zyx.T, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)


def write_index(folder: Path, training: list[str], test: list[str] = ()) -> None:  # type: ignore[assignment]
    index = {
        "name": "Tiny",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in training
        ],
        "test": [f"./imagesTs/{n}.nii.gz" for n in test],
    }
    (folder / "dataset.json").write_text(json.dumps(index))


def write_source(
    folder: Path,
    cases: int = 3,
    test: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    affine: np.ndarray = LPS,
) -> Path:
    """liver_0, liver_1 ... with labels, and `test` scans without."""
    names, tests = [f"liver_{n}" for n in range(cases)], [f"liver_{cases + n}" for n in range(test)]
    for seed, name in enumerate([*names, *tests]):
        image, label = ct_like(shape, seed)
        write_nifti(
            folder / ("imagesTr" if seed < cases else "imagesTs") / f"{name}.nii.gz", image, affine
        )
        if seed < cases:
            write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label, affine)
    write_index(folder, names, tests)
    return folder


def convert(source: Path, store: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and --json result of `liverseg convert`, with one worker unless `more` sets it."""
    overrides = [] if any("convert.workers" in option for option in more) else ["convert.workers=1"]
    return run("convert", source, store, *overrides, *more)


def convert_command(source: Path, store: Path, *more: str) -> list[str]:
    """The same as a command line for another process."""
    return [
        sys.executable,
        "-m",
        "liverseg_dist",
        "convert",
        str(source),
        str(store),
        "--json",
        *more,
    ]


def run(command: str, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and --json result of a command, run in this process; empty when it printed none."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main([command, *map(str, arguments), "--json"])
    lines = stdout.getvalue().splitlines()
    return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def tree(store: Path) -> Mapping[str, str]:
    """SHA-256 of every file except locks; and every empty folder that was left behind."""
    found = {}
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if name.startswith(".liverseg/locks"):
            continue
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()) and name != ".liverseg/aside":
            found[name] = "an empty folder"
    return found
