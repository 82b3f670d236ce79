"""A scan of a patient: the painted body, the scanner, and the label."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.phantom.anatomy import Patient, draw_patient
from liverseg_dist.phantom.canvas import Renderer, Tissue
from liverseg_dist.phantom.grids import Size, draw_grid, draw_orientation
from liverseg_dist.phantom.painter import AIR_HU, Painted, Painter
from liverseg_dist.phantom.scanner import Scanner, compute_slice_fields, tissue_texture
from liverseg_dist.phantom.tumours import tumour_count
from liverseg_dist.volume import Grid, Volume

TUMOUR_MM = {"small": (16.0, 60.0), "full": (4.0, 60.0)}
SLAB_VOXELS = 150_000
"""Voxels that are painted at once: a slab's arrays fit the CPU cache, and memory stays bounded."""
FINEST_PLANE_MM = 1.8
"""Distance of the planes of which thick slices are the mean."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
_PATIENT, _GRID, _SCANNER, _NOISE, _TEXTURE = range(5)
TASK03_VALUES: Mapping[str, int] = {"liver": LIVER, "tumour": TUMOUR}
"""Label values of Task03_Liver."""


@dataclass(frozen=True)
class PhantomScan:
    """Image (int16 HU) and label (uint8) on one grid, and the patient."""

    image: Volume
    label: Volume
    patient: Patient


def make_scan(seed: int, case: int, size: Size, hard: bool) -> PhantomScan:
    """Create one case; the result is a pure function of the arguments.

    Args:
        seed: seed of the set.
        case: number of the case.
        size: small (for tests) or full (as in hospitals).
        hard: whether tumours have low contrast and noise is stronger.
    """
    # Size and difficulty are part of the key, so that such sets are different patients.
    key = (seed, case, int(size == "full"), int(hard))
    patient = draw_case_patient(key)
    grid, orientation = draw_case_grid(key, patient, size)
    return scan_patient(patient, grid, orientation, key, hard)


def draw_case_patient(key: tuple[int, int, int, int]) -> Patient:
    """Draw the patient of a case; the key is (seed, case, whether full size, whether hard)."""
    seed, case, is_full, hard = key
    # A golden-ratio sequence, so that also a small set has patients with no, few and many tumours.
    fraction = (np.random.default_rng((seed,)).random() + case * GOLDEN_RATIO) % 1
    rng = np.random.default_rng([*key, _PATIENT])
    diameter_mm = TUMOUR_MM["full" if is_full else "small"]
    return draw_patient(rng, tumour_count(fraction), diameter_mm, bool(hard))


def draw_case_grid(key: tuple[int, ...], patient: Patient, size: Size) -> tuple[Grid, str]:
    """Draw the voxel grid of a CT and the orientation of its stored axes."""
    rng = np.random.default_rng([*key, _GRID])
    grid = draw_grid(rng, patient, size)
    return grid, draw_orientation(rng)


def scan_patient(
    patient: Patient,
    grid: Grid,
    orientation: str,
    key: tuple[int, ...],
    hard: bool = False,
    label_values: Mapping[str, int] = TASK03_VALUES,
) -> PhantomScan:
    """Scan a patient with a CT.

    Args:
        patient: the patient.
        grid: voxel grid whose axes are close to RAS.
        orientation: orientation of the result, for example LPS.
        key: seed of scanner and noise.
        hard: whether noise is stronger.
        label_values: label value of each structure that is labelled.
    """
    scanner = Scanner.draw_random(
        np.random.default_rng([*key, _SCANNER]), grid, patient.body_mm, hard
    )
    noise = scanner.noise_field(np.random.default_rng([*key, _NOISE]), grid)
    fields = compute_slice_fields(scanner, grid, patient.body_mm)

    def measure(hu: np.ndarray, planes: slice) -> np.ndarray:
        scanner.simulate_exposure(hu, noise.next_slices(planes.stop - planes.start), fields)
        return np.rint(hu)

    return paint_scan(patient, grid, orientation, key, label_values, measure)


def paint_scan(
    patient: Patient,
    grid: Grid,
    orientation: str,
    key: tuple[int, ...],
    label_values: Mapping[str, int],
    measure: Callable[[np.ndarray, slice], np.ndarray],
    render: Renderer = Tissue.compute_hu,
    background: float = AIR_HU,
) -> PhantomScan:
    """Paint a patient slab by slab, and measure the painted values with a scanner.

    Args:
        patient: the patient.
        grid: voxel grid whose axes are close to RAS.
        orientation: orientation of the result, for example LPS.
        key: seed of the tissues' texture.
        label_values: label value of each structure that is labelled.
        measure: returns what the scanner stores for the painted values of some planes.
        render: returns the values of a tissue.
        background: value of the air around the body.
    """
    texture = tissue_texture(np.random.default_rng([*key, _TEXTURE]), grid)
    # A thick slice is the mean of several planes; in plane, the soft edge of each body is enough.
    parts = max(1, int(np.ceil(grid.spacing_mm[0] / max(FINEST_PLANE_MM, grid.spacing_mm[1]))))
    spacing_z, spacing_y, spacing_x = grid.spacing_mm
    slices, height, width = grid.shape
    fine = grid.with_spacing(
        (spacing_z / parts, spacing_y, spacing_x), (slices * parts, height, width)
    )
    others = {name: v for name, v in label_values.items() if name not in ("liver", "tumour")}
    painter = Painter(patient, fine, render, background, others)
    image, label = np.empty(grid.shape, np.int16), np.empty(grid.shape, np.uint8)
    step = max(1, SLAB_VOXELS // (height * width * parts))
    for start in range(0, slices, step):
        stop = min(start + step, slices)
        grain = texture.next_slices(stop - start)
        painted = painter.paint_planes(
            slice(start * parts, stop * parts), np.repeat(grain, parts, axis=0)
        )
        label[start:stop] = _label_planes(painted, parts, label_values)
        values = _average_planes(painted.values, parts)
        image[start:stop] = measure(values, slice(start, stop))
    reoriented_image = Volume(image, grid).reoriented(orientation)
    reoriented_label = Volume(label, grid).reoriented(orientation)
    return PhantomScan(reoriented_image, reoriented_label, patient)


def _label_planes(painted: Painted, parts: int, label_values: Mapping[str, int]) -> np.ndarray:
    """Return the label values of slices of which each is the mean of `parts` planes."""
    liver, tumour = (_average_planes(share, parts) for share in (painted.liver, painted.tumours))
    label = np.zeros(liver.shape, np.uint8)
    if painted.organs is not None:
        for value in np.unique(painted.organs[painted.organs > 0]):
            share = _average_planes((painted.organs == value).astype(np.float32), parts)
            label[share >= 0.5] = value
    # A tumour that is not labelled on its own is a part of the liver.
    liver_value = label_values.get("liver", 0)
    label[liver >= 0.5] = liver_value
    label[tumour >= 0.5] = label_values.get("tumour", liver_value)
    return label


def _average_planes(planes: np.ndarray, parts: int) -> np.ndarray:
    return planes if parts == 1 else planes.reshape(-1, parts, *planes.shape[1:]).mean(axis=1)
