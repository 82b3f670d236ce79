"""Options of the commands that read or write DICOM."""

import argparse

from liverseg_dist.clinical.dicom_segmentation import SEG_KINDS
from liverseg_dist.data.io.dicom_sources import DicomOptions
from liverseg_dist.inference.dicom_results import DicomResults


def add_dicom(parser: argparse.ArgumentParser) -> None:
    """Add `--series`, `--fill-gaps` and `--names`, for commands that read scans."""
    parser.add_argument(
        "--series",
        default="",
        metavar="TEXT",
        help="DICOM with several series: SeriesNumber, end of SeriesInstanceUID, or part of "
        "SeriesDescription (liverseg to-nifti --list shows them)",
    )
    parser.add_argument(
        "--fill-gaps",
        action="store_true",
        help="DICOM with missing slices: interpolate them and mark the scan, instead of refusing it",
    )
    parser.add_argument(
        "--names",
        choices=("pseudonym", "folder"),
        default="pseudonym",
        help="names of DICOM scans in results: a keyed hash (default), or the folder's name, which "
        "may identify the patient",
    )


def add_dicom_results(parser: argparse.ArgumentParser) -> None:
    """Add `--dicom-results` and `--seg-type`, for commands that segment scans."""
    parser.add_argument(
        "--dicom-results",
        choices=("seg+sr", "seg", "none"),
        default="seg+sr",
        help="beside the mask of a DICOM scan: NAME.seg.dcm (segmentation) and NAME.sr.dcm "
        "(report with volumes and diameters); both carry the patient of the source",
    )
    parser.add_argument(
        "--seg-type",
        choices=SEG_KINDS,
        default="binary",
        help="binary (default, read by all viewers): organs and lesions overlap; labelmap: organs "
        "without their lesions; fractional: probabilities of each structure; finished scans keep "
        "their kind unless --again is given",
    )
    parser.add_argument(
        "--rtstruct",
        action="store_true",
        help="also NAME.rt.dcm: the outlines of all segments as a structure set (RTSTRUCT)",
    )


def dicom_results(args: argparse.Namespace, model: str) -> DicomResults | None:
    """The options of `add_dicom_results`; `model` identifies the weights."""
    if args.dicom_results == "none":
        return None
    with_report = args.dicom_results == "seg+sr"
    return DicomResults(args.seg_type, with_report, model, args.rtstruct)


def dicom_options(args: argparse.Namespace) -> DicomOptions:
    """The options of `add_dicom`."""
    return DicomOptions(args.series, args.fill_gaps, args.names)
