"""Voxel grids and orientations as in data of many hospitals."""

from typing import Literal

import numpy as np

from liverseg_dist.phantom.anatomy import Patient
from liverseg_dist.volume import Grid

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
FULL_SLICE_MM = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0)
SMALL_SLICE_MM = (2.5, 3.0, 3.0, 4.0, 5.0)
FULL_PIXELS, SMALL_PIXELS, SMALL_SLICES = 512, (96, 128), (24, 90)
MR_FULL_SLICE_MM, MR_SMALL_SLICE_MM = (3.0, 4.0, 5.0, 6.0, 8.0), (4.0, 5.0, 6.0)
MR_PIXEL_MM = (1.05, 1.4)
"""Pixels of full size. Small ones are as in CT."""


def draw_orientation(rng: np.random.Generator) -> str:
    """Draw the orientation of the stored axes, for example LPS."""
    return str(rng.choice(list(ORIENTATIONS), p=list(ORIENTATIONS.values())))


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
        axes = _rotate_axes(float(u(-5, 5)), float(u(-3, 3))) @ axes
    middle_z = ((low - below) + (high + above)) / 2
    # The number of slices was limited: keep the liver in the middle.
    if slices * thickness < high - low + below + above:
        middle_z = (low + high) / 2
    centre = np.array([float(u(-5, 5)), float(u(-8, 4)), middle_z])
    return _place_grid((slices, pixels, pixels), axes, centre)


def draw_mr_grid(rng: np.random.Generator, patient: Patient, size: Size) -> Grid:
    """Draw the voxel grid of an abdominal MR: slices of 3 to 8 mm that contain the complete liver.

    Pixels are 1.05 to 1.4 mm in full size and about 3 mm in small size.
    """
    u = rng.uniform
    oblique = rng.random() < 0.2
    least = 14.0 if oblique else 5.0
    field_mm = 2 * patient.body_mm[0] * float(u(1.05, 1.25))
    low, high = patient.liver_z_mm
    low, high = low - least - float(u(0, 40)), high + least + float(u(0, 25))
    if size == "small":
        pixel_mm, thickness = float(u(2.7, 3.4)), float(rng.choice(MR_SMALL_SLICE_MM))
    else:
        pixel_mm, thickness = float(u(*MR_PIXEL_MM)), float(rng.choice(MR_FULL_SLICE_MM))
    pixels, slices = round(field_mm / pixel_mm), round((high - low) / thickness)
    centre = np.array([float(u(-8, 8)), float(u(-8, 4)), (low + high) / 2])
    axes = np.diag([pixel_mm, pixel_mm, thickness])
    if oblique:
        axes = _rotate_axes(float(u(-5, 5)), float(u(-3, 3))) @ axes
    return _place_grid((slices, pixels, pixels), axes, centre)


def _place_grid(shape: tuple[int, int, int], axes: np.ndarray, centre_mm: np.ndarray) -> Grid:
    """Return a grid (z, y, x) around a centre; the columns of `axes` are steps along x, y, z."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = centre_mm - axes @ (np.array(shape[::-1]) - 1) / 2
    return Grid(shape, affine)


def _rotate_axes(about_x_deg: float, about_z_deg: float) -> np.ndarray:
    a, b = np.deg2rad([about_x_deg, about_z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return about_x @ about_z
