"""Write a scan as NIfTI, exactly as the other commands read it; or list the series of a DICOM folder.

  liverseg to-nifti study/ --list
  liverseg to-nifti study/ --series 4 --out scan.nii.gz
  liverseg to-nifti series.zip --out scan.nii.gz --fill-gaps

SRC is a DICOM folder, a ZIP or a list of files. The positions of the images decide their order and the
grid; values are HU for CT. A gantry tilt becomes a sheared affine (sform only). Missing slices are
refused, unless --fill-gaps interpolates them.

--list shows the name that each scan has in results, and for each series its number, modality, size and
plane; --text adds paths and SeriesDescription, which may contain the name of a patient. Of several
series the one that is original and has enough slices is read; otherwise --series selects it.
"""

import argparse
from pathlib import Path
from typing import Any

from liverseg_dist.commands.dicom_options import add_dicom, dicom_options
from liverseg_dist.console import write_lines, write_notes
from liverseg_dist.data.io.dicom_geometry import MIN_SLICES
from liverseg_dist.data.io.dicom_series import DicomScan, list_source_stacks, read_dicom_scan
from liverseg_dist.data.io.dicom_sources import find_dicom_scans, has_dicom_files
from liverseg_dist.data.io.nifti import SUFFIXES, write_image
from liverseg_dist.errors import EXIT_DONE, UserError, printable
from liverseg_dist.texts.names import list_some
from liverseg_dist.texts.paths import expand_user_path, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="SRC", help="a DICOM folder, ZIP or files")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="the NIfTI file (.nii.gz or .nii)"
    )
    parser.add_argument("--list", action="store_true", help="list the series and write nothing")
    parser.add_argument(
        "--text",
        action="store_true",
        help="with --list: also paths and SeriesDescription, which may identify the patient",
    )
    add_dicom(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    paths = [expand_user_path(text) for text in args.inputs]
    for number, path in enumerate(paths, start=1):
        # Not by their paths, which often contain the name of a patient.
        if not path.exists():
            raise UserError(f"input {number} of {len(paths)}: no such file or folder")
        if not has_dicom_files(path):
            raise UserError(f"input {number} of {len(paths)}: holds no DICOM file")
    scans = [scan for _, scan in find_dicom_scans(paths, dicom_options(args))]
    if args.list:
        return _list_series(scans, args.text)
    if args.out is None:
        raise UserError("--out FILE.nii.gz is missing; --list shows the series")
    if not args.out.name.endswith(SUFFIXES):
        raise UserError(f"{printable(args.out)}: the name of --out must end in .nii.gz or .nii")
    if len(scans) > 1:
        raise UserError(f"the input has {len(scans)} scans; name one (--list shows them)")
    return _convert(scans[0], args.out)


def _list_series(scans: list[DicomScan], with_text: bool) -> dict[str, Any]:
    content = []
    for scan in scans:
        stacks, read = list_source_stacks(scan)
        places = [printable(path) for path in scan.paths]
        write_lines(f"{scan.name}: {list_some(places, 1)}" if with_text else f"{scan.name}:")
        for stack in stacks:
            few = len(stack.slices) < MIN_SLICES
            note = " (too few slices)" if few else ""
            write_lines(f"  {stack.describe(with_text)}{note}")
        if read.damaged:
            write_lines(f"  {len(read.damaged)} damaged file(s): {read.damaged[0]}")
        series = [
            {
                "series": stack.label,
                "modality": stack.first.modality,
                "slices": len(stack.slices),
                "description": stack.describe(with_text),
            }
            for stack in stacks
        ]
        content.append({"scan": scan.name, "series": series, "damaged": len(read.damaged)})
    return {"scans": content, "exit_code": EXIT_DONE}


def _convert(scan: DicomScan, out: Path) -> dict[str, Any]:
    file = read_dicom_scan(scan)
    volume = file.volume
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, volume.voxels, volume.grid)
    notes = [finding for finding in file.notes if finding.severity != "info"]
    write_notes(*(f"warning: {scan.name}: {finding.message}" for finding in notes))
    shape = " x ".join(map(str, volume.shape[::-1]))
    spacing = " x ".join(f"{mm:.4g}" for mm in volume.spacing_mm[::-1])
    write_lines(
        f"{out}: {file.modality}, {shape} voxels of {spacing} mm, {volume.grid.orientation}"
    )
    return {
        "out": str(out),
        "scan": scan.name,
        "modality": file.modality,
        "findings": [finding.to_json() for finding in file.notes],
        "grid": volume.grid.to_json(),
        "exit_code": EXIT_DONE,
    }
