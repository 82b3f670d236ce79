"""A scan of a patient with MR: one image for each sequence, on one grid."""

from collections.abc import Mapping

import numpy as np

from liverseg_dist.phantom.anatomy import Patient
from liverseg_dist.phantom.mr_scanner import MrScanner
from liverseg_dist.phantom.mr_signal import SEQUENCES, MrRenderer
from liverseg_dist.phantom.mr_tissues import MrTissue
from liverseg_dist.phantom.scan import TASK03_VALUES, PhantomScan, paint_scan
from liverseg_dist.volume import Grid

_SCANNER, _NOISE = range(40, 42)


def scan_with_mr(
    patient: Patient,
    tissues: Mapping[str, MrTissue],
    grid: Grid,
    orientation: str,
    sequence_name: str,
    key: tuple[int, ...],
    hard: bool = False,
    label_values: Mapping[str, int] = TASK03_VALUES,
) -> PhantomScan:
    """Scan a patient with one MR sequence.

    Args:
        patient: the patient.
        tissues: MR properties of the patient's tissues.
        grid: voxel grid whose axes are close to RAS.
        orientation: orientation of the result, for example LPS.
        sequence_name: one of `SEQUENCES`.
        key: seed of the texture; with the sequence, that of scanner and noise.
        hard: whether noise is stronger.
        label_values: label value of each structure that is labelled.
    """
    renderer = MrRenderer.for_patient(SEQUENCES[sequence_name], tissues)
    # By the position among all sequences: noise does not depend on which others are scanned.
    index = list(SEQUENCES).index(sequence_name)
    scanner = MrScanner.draw_random(
        np.random.default_rng([*key, _SCANNER, index]), renderer.signals, hard
    )
    noise = np.random.default_rng([*key, _NOISE, index])

    def measure(signal: np.ndarray, planes: slice) -> np.ndarray:
        return scanner.measure_planes(signal, noise, grid, planes)

    return paint_scan(
        patient, grid, orientation, key, label_values, measure, renderer.render_tissue, 0.0
    )
