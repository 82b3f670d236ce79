"""Write phantoms as DICOM: one series of classic CT or MR images for each scan.

All names and numbers are made up; UIDs follow from a text, so that the same phantom gives the same
files. Used by `liverseg phantom --format dicom` and by the tests of the reader.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from liverseg_dist.data.io.dicom_geometry import LPS_TO_RAS
from liverseg_dist.optional_packages import load_module, quiet_pydicom
from liverseg_dist.texts.uids import derive_uid
from liverseg_dist.volume import Volume

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
MAX_DS_CHARACTERS = 16
"""Longest decimal string that the standard allows."""


@dataclass(frozen=True)
class SeriesOptions:
    """How a series is written.

    Attributes:
        key: text that all UIDs follow from.
        patient: text that the study's UIDs follow from; "" for the key.
        modality: CT (stored unsigned, with an offset) or MR (stored as it is).
        number: SeriesNumber.
        description: SeriesDescription.
        is_signed: signed stored values.
        slope, intercept: of the rescaling; the stored values are (value - intercept) / slope.
    """

    key: str
    patient: str = ""
    modality: Literal["CT", "MR"] = "CT"
    number: int = 3
    description: str = "Phantom"
    is_signed: bool = False
    slope: float = 1.0
    intercept: float = -1024.0


def build_series(volume: Volume, options: SeriesOptions) -> list[Any]:
    """One pydicom data set for each slice (z) of a volume in any orientation."""
    if not options.is_signed:
        # Unsigned values cannot hold padding below the offset, such as -2000.
        lowest = float(np.floor(volume.voxels.min()))
        options = replace(options, intercept=min(options.intercept, lowest))
    affine_lps = np.eye(4)
    affine_lps[:3] = LPS_TO_RAS @ volume.affine[:3]
    datasets = []
    with quiet_pydicom():
        for z in range(volume.shape[0]):
            datasets.append(_build_slice(volume.voxels[z], affine_lps, z, options))
    return datasets


def write_series(folder: Path, datasets: list[Any]) -> None:
    """Write data sets as IM0001.dcm, IM0002.dcm, ...; a folder that exists is complete."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        with quiet_pydicom():
            for number, dataset in enumerate(datasets, start=1):
                dataset.save_as(staging / f"IM{number:04d}.dcm", enforce_file_format=True)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def format_decimal(value: float) -> str:
    """A decimal string of at most 16 characters."""
    for digits in range(MAX_DS_CHARACTERS, 0, -1):
        text = f"{float(value):.{digits}g}"
        if len(text) <= MAX_DS_CHARACTERS:
            return text
    raise ValueError(f"{value} does not fit a decimal string")


def _build_slice(
    values_yx: np.ndarray, affine_lps: np.ndarray, z: int, options: SeriesOptions
) -> Any:
    pydicom = load_module("pydicom")
    storage = CT_STORAGE if options.modality == "CT" else MR_STORAGE
    sop_uid = derive_uid(options.key, options.number, z)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = sop_uid
    meta.TransferSyntaxUID = EXPLICIT_LITTLE_ENDIAN
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = storage
    dataset.SOPInstanceUID = sop_uid
    _set_study(dataset, options)
    dataset.InstanceNumber = z + 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if options.modality == "CT" else "M"]
    _set_modality(dataset, options)
    _set_geometry(dataset, affine_lps, z)
    intercept = options.intercept if options.modality == "CT" else 0.0
    stored = np.rint((values_yx.astype(np.float64) - intercept) / options.slope)
    dtype = np.dtype(np.int16 if options.is_signed else np.uint16)
    limits = np.iinfo(dtype)
    pixels = np.clip(stored, limits.min, limits.max).astype(dtype.newbyteorder("<"))
    dataset.Rows, dataset.Columns = values_yx.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = int(options.is_signed)
    if options.modality == "CT":
        dataset.RescaleSlope = format_decimal(options.slope)
        dataset.RescaleIntercept = format_decimal(intercept)
        dataset.RescaleType = "HU"
    dataset.PixelData = pixels.tobytes()
    return dataset


def _set_study(dataset: Any, options: SeriesOptions) -> None:
    patient = options.patient or options.key
    dataset.PatientName = "Phantom^Synthetic"
    dataset.PatientID = derive_uid("patient", patient)[-12:]
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    dataset.StudyInstanceUID = derive_uid("study", patient)
    dataset.StudyDate, dataset.StudyTime = "20200101", "120000"
    dataset.StudyID = "1"
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.SeriesInstanceUID = derive_uid("series", options.key, options.number)
    dataset.FrameOfReferenceUID = derive_uid("frame", patient)
    dataset.PositionReferenceIndicator = ""
    dataset.SeriesNumber = options.number
    dataset.SeriesDescription = options.description
    dataset.AcquisitionNumber = 1
    dataset.Manufacturer = "liverseg_dist"
    dataset.SpecificCharacterSet = "ISO_IR 192"


def _set_modality(dataset: Any, options: SeriesOptions) -> None:
    dataset.Modality = options.modality
    dataset.PatientPosition = "HFS"
    if options.modality == "CT":
        dataset.KVP = "120"
        return
    dataset.ScanningSequence = "GR"
    dataset.SequenceVariant = "NONE"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "3D"
    dataset.EchoTime = "2"
    dataset.EchoTrainLength = 1


def _set_geometry(dataset: Any, affine_lps: np.ndarray, z: int) -> None:
    columns_mm, rows_mm, _ = np.linalg.norm(affine_lps[:3, :3], axis=0)
    directions = [*(affine_lps[:3, 0] / columns_mm), *(affine_lps[:3, 1] / rows_mm)]
    position = affine_lps[:3, 3] + z * affine_lps[:3, 2]
    normal = np.cross(directions[:3], directions[3:])
    dataset.PixelSpacing = [format_decimal(rows_mm), format_decimal(columns_mm)]
    dataset.ImageOrientationPatient = [format_decimal(one) for one in directions]
    dataset.ImagePositionPatient = [format_decimal(one) for one in position]
    dataset.SliceThickness = format_decimal(abs(float(affine_lps[:3, 2] @ normal)))
    dataset.SliceLocation = format_decimal(float(position @ normal))
