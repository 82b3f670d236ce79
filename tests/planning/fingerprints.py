"""Fingerprints made by hand, and small data sets on disk, for the tests of plans."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.io.nifti import write_image, write_mask
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.planning.fingerprint import (
    QUANTILES,
    CaseFingerprint,
    DatasetFingerprint,
    ForegroundIntensity,
)
from liverseg_dist.volume import Float3, Grid, Index3

CT = CT_CHANNELS
MR = (ChannelConfig(name="MRI", modality="MR", intensity="zscore"),)
ORGANS = scheme_from_labels({"background": 0, "liver": 1, "spleen": 2})


def case(
    number: int,
    shape: Index3,
    spacing_mm: Float3,
    foreground_mm: Float3 = (150.0, 180.0, 220.0),
    lesions_mm: Sequence[float] = (),
    lesion_voxels: int = 0,
) -> CaseFingerprint:
    """Return one case."""
    values = tuple(float(v) for v in np.linspace(-60, 180, len(QUANTILES)))
    return CaseFingerprint(
        case_id=f"case_{number}",
        files=((f"case_{number}.nii.gz", 1, 1),),
        shape=shape,
        content_shape=shape,
        spacing_mm=spacing_mm,
        foreground_mm=foreground_mm,
        structure_voxels={"liver": 500_000, "tumour": lesion_voxels},
        lesion_diameters_mm={"tumour": tuple(lesions_mm)},
        intensities=(ForegroundIntensity(60.0, 40.0, values),),
    )


def dataset(
    cases: Sequence[CaseFingerprint],
    channels: tuple[ChannelConfig, ...] = CT,
    scheme: LabelScheme = LITS_SCHEME,
) -> DatasetFingerprint:
    """Return a data set of these cases."""
    return DatasetFingerprint("hand-made", scheme, channels, tuple(cases))


def write_dataset(
    folder: Path,
    cases: int = 3,
    shape: Index3 = (24, 40, 48),
    spacing_mm: Float3 = (5.0, 2.0, 2.0),
    index: Mapping[str, object] | None = None,
    channels: int = 1,
) -> Path:
    """Write a data set of boxes: a liver of 10 x 20 x 20 voxels with a tumour of 4 x 4 x 4."""
    affine = np.diag([spacing_mm[2], spacing_mm[1], spacing_mm[0], 1.0])
    grid = Grid(shape, affine)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        random = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        label[6:16, 8:28, 10:30] = 1
        label[9:13, 12:16, 14:18] = 2
        for channel in range(channels):
            image = random.normal(-50, 10, shape)
            image[label == 1] += 150
            image[label == 2] += 100
            name = f"case_{number}_{channel:04d}.nii.gz"
            write_image(folder / "imagesTr" / name, image.astype(np.int16), grid)
        write_mask(folder / "labelsTr" / f"case_{number}.nii.gz", label, grid)
    content = index or {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
