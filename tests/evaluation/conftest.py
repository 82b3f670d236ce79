import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.volume import Float3


@pytest.fixture(scope="session")
def liver_28() -> tuple[np.ndarray, np.ndarray, Float3]:
    """Third-party prediction, truth (z, y, x) and spacing in mm of the real CT `liver_28`."""
    folder = Path(
        os.environ.get(
            "LIVERSEG_REAL_MINI", Path(__file__).parents[3] / "shared" / "data" / "real_mini"
        )
    )
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set LIVERSEG_REAL_MINI to the folder of real CTs")
    truth = nib.load(folder / "labelsTr" / "liver_28.nii.gz")
    prediction = nib.load(folder / "liver_28_third_party_liver_prediction.nii.gz")
    z, y, x = (float(mm) for mm in truth.header.get_zooms()[::-1])
    arrays = [
        np.ascontiguousarray(np.asanyarray(image.dataobj).T).astype(np.uint8)
        for image in (prediction, truth)
    ]
    return arrays[0], arrays[1], (z, y, x)
