"""A scan of a patient: voxel grid and orientation as in data of many hospitals, and the scanner."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.phantom.anatomy import Patient, draw_patient
from liverseg_dist.phantom.painter import Painter
from liverseg_dist.phantom.scanner import Scanner, compute_slice_fields, tissue_texture
from liverseg_dist.phantom.tumours import tumour_count
from liverseg_dist.volume import Grid, Volume

Size = Literal["small", "full"]
ORIENTATIONS = {
    "LPS": 0.35,
    "RAS": 0.25,
    "LAS": 0.2,
    "RPS": 0.05,
    "LPI": 0.05,
    "RAI": 0.05,
    "PIR": 0.05,
}
TUMOUR_MM = {"small": (16.0, 60.0), "full": (4.0, 60.0)}
FULL_SLICE_MM = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0)
SMALL_SLICE_MM = (2.5, 3.0, 3.0, 4.0, 5.0)
FULL_PIXELS, SMALL_PIXELS, SMALL_SLICES = 512, (96, 128), (24, 90)
SLAB_VOXELS = 150_000
"""Voxels that are painted at once: a slab's arrays fit the CPU cache, and memory stays bounded."""
FINEST_PLANE_MM = 1.8
"""Distance of the planes of which thick slices are the mean."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
_PATIENT, _GRID, _SCANNER, _NOISE, _TEXTURE = range(5)


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
    # A golden-ratio sequence, so that also a small set has patients with no, few and many tumours.
    fraction = (np.random.default_rng(key[:1]).random() + case * GOLDEN_RATIO) % 1
    patient = draw_patient(
        np.random.default_rng([*key, _PATIENT]), tumour_count(fraction), TUMOUR_MM[size], hard
    )
    rng = np.random.default_rng([*key, _GRID])
    grid = draw_grid(rng, patient, size)
    orientation = str(rng.choice(list(ORIENTATIONS), p=list(ORIENTATIONS.values())))
    return scan_patient(patient, grid, orientation, key, hard)


def scan_patient(
    patient: Patient, grid: Grid, orientation: str, key: tuple[int, ...], hard: bool = False
) -> PhantomScan:
    """Scan a patient.

    Args:
        patient: the patient.
        grid: voxel grid whose axes are close to RAS.
        orientation: orientation of the result, for example LPS.
        key: seed of scanner and noise.
        hard: whether noise is stronger.
    """
    scanner = Scanner.draw_random(
        np.random.default_rng([*key, _SCANNER]), grid, patient.body_mm, hard
    )
    noise = scanner.noise_field(np.random.default_rng([*key, _NOISE]), grid)
    texture = tissue_texture(np.random.default_rng([*key, _TEXTURE]), grid)
    fields = compute_slice_fields(scanner, grid, patient.body_mm)
    # A thick slice is the mean of several planes; in plane, the soft edge of each body is enough.
    parts = max(1, int(np.ceil(grid.spacing_mm[0] / max(FINEST_PLANE_MM, grid.spacing_mm[1]))))
    spacing_z, spacing_y, spacing_x = grid.spacing_mm
    slices, height, width = grid.shape
    fine = grid.with_spacing(
        (spacing_z / parts, spacing_y, spacing_x), (slices * parts, height, width)
    )
    painter = Painter(patient, fine)
    image, label = np.empty(grid.shape, np.int16), np.empty(grid.shape, np.uint8)
    step = max(1, SLAB_VOXELS // (height * width * parts))
    for start in range(0, slices, step):
        stop = min(start + step, slices)
        grain = texture.next_slices(stop - start)
        painted = painter.paint_planes(
            slice(start * parts, stop * parts), np.repeat(grain, parts, axis=0)
        )
        hu, liver, tumour = (_average_planes(planes, parts) for planes in painted[:3])
        scanner.simulate_exposure(hu, noise.next_slices(stop - start), fields)
        image[start:stop] = np.rint(hu)
        label[start:stop] = np.where(tumour >= 0.5, TUMOUR, np.where(liver >= 0.5, LIVER, 0))
    reoriented_image = Volume(image, grid).reoriented(orientation)
    reoriented_label = Volume(label, grid).reoriented(orientation)
    return PhantomScan(reoriented_image, reoriented_label, patient)


def _average_planes(planes: np.ndarray, parts: int) -> np.ndarray:
    return planes if parts == 1 else planes.reshape(-1, parts, *planes.shape[1:]).mean(axis=1)


def draw_grid(rng: np.random.Generator, patient: Patient, size: Size) -> Grid:
    """Draw a voxel grid with axes close to RAS that contains the complete liver.

    A fifth of the grids is oblique by some degrees.
    """
    u = rng.uniform
    oblique = rng.random() < 0.2
    least = 14.0 if oblique else 5.0
    field_mm = 2 * patient.body_mm[0] * float(u(1.03, 1.2))
    low, high = patient.liver_z_mm
    if size == "small":
        # Coarse voxels: a small scan is fast to create and to train on.
        thickness = float(rng.choice(SMALL_SLICE_MM) * u(0.95, 1.05))
        pixels = int(np.clip(round(field_mm / float(u(2.7, 3.3))), *SMALL_PIXELS))
        pixel_mm = field_mm / pixels
        below, above = least + float(u(0, 45)), least + float(u(0, 30))
        slices = int(np.clip(round((high - low + below + above) / thickness), *SMALL_SLICES))
    else:
        thickness = float(rng.choice(FULL_SLICE_MM))
        pixels, pixel_mm = FULL_PIXELS, float(np.clip(field_mm / FULL_PIXELS, 0.6, 0.9))
        below, above = least + float(u(0, 100)), least + float(u(0, 55))
        slices = max(24, round((high - low + below + above) / thickness))
    axes = np.diag([pixel_mm, pixel_mm, thickness])
    if oblique:
        axes = _rotation_matrix(float(u(-5, 5)), float(u(-3, 3))) @ axes
    middle_z = ((low - below) + (high + above)) / 2
    # The number of slices was limited: keep the liver in the middle.
    if slices * thickness < high - low + below + above:
        middle_z = (low + high) / 2
    centre = np.array([float(u(-5, 5)), float(u(-8, 4)), middle_z])
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = centre - axes @ (np.array([pixels, pixels, slices]) - 1) / 2
    return Grid((slices, pixels, pixels), affine)


def _rotation_matrix(about_x_deg: float, about_z_deg: float) -> np.ndarray:
    a, b = np.deg2rad([about_x_deg, about_z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return about_x @ about_z
