"""A scan of a patient: field of view, voxel size, orientation, blur and noise, as CT scanners differ."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from liverseg_dist.data.phantom.anatomy import Patient, draw_patient, render
from liverseg_dist.data.phantom.shapes import Points
from liverseg_dist.volume import Grid, Volume

Size = Literal["small", "full"]
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPS", "LPI", "PIR")
SLICES_AT_ONCE = 8
TUMOUR_MM = {"small": (14.0, 60.0), "full": (4.0, 60.0)}


@dataclass(frozen=True)
class PhantomScan:
    """Image (int16 HU) and label (uint8) on one grid, and what is in them."""

    image: Volume
    label: Volume
    patient: Patient


def make_scan(seed: int, case: int, size: Size, hard: bool) -> PhantomScan:
    """Case number `case` of the set with `seed`: a pure function of the arguments."""
    rng = np.random.default_rng([seed, case, size == "full", hard])
    patient = draw_patient(rng, TUMOUR_MM[size], hard)
    grid = _draw_grid(rng, size)
    hu, label = _rendered(patient, grid)
    _scan(rng, hu, grid, 14.0 if hard else 9.0)
    image = Volume(np.clip(np.round(hu), -3024, 3071).astype(np.int16), grid)
    orientation = str(rng.choice(ORIENTATIONS))
    turned = Volume(label, grid).reoriented(orientation)
    return PhantomScan(image.reoriented(orientation), turned, patient)


def _draw_grid(rng: np.random.Generator, size: Size) -> Grid:
    """RAS; some a few degrees oblique, as with a tilted gantry or table."""
    if size == "small":
        in_plane, thickness, fov = rng.uniform(3.0, 3.6), rng.uniform(2.5, 4.0), rng.uniform(345, 385)
        extent = rng.uniform(170, 290)
    else:
        in_plane, thickness, fov = rng.uniform(0.6, 0.9), float(rng.choice([1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0])), None
        extent = rng.uniform(185, 330)
        fov = max(512 * in_plane, 330.0)
    across = round(fov / in_plane)
    slices = max(24, round(extent / thickness))
    scale = np.diag([in_plane, in_plane, thickness])
    if rng.random() < 0.25:
        scale = _rotation(rng.uniform(-5, 5), rng.uniform(-3, 3)) @ scale
    affine = np.eye(4)
    affine[:3, :3] = scale
    centre = np.array([rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-15, 15)])
    affine[:3, 3] = centre - scale @ (np.array([across, across, slices]) - 1) / 2
    return Grid((slices, across, across), affine)


def _rotation(about_x_deg: float, about_z_deg: float) -> np.ndarray:
    a, b = np.deg2rad([about_x_deg, about_z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return about_x @ about_z


def _rendered(patient: Patient, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """A few slices at a time, so that memory stays bounded."""
    hu, label = np.empty(grid.shape, np.float32), np.empty(grid.shape, np.uint8)
    edge = float(np.prod(grid.spacing_mm) ** (1 / 3))
    rows, columns = np.meshgrid(np.arange(grid.shape[1]), np.arange(grid.shape[2]), indexing="ij")
    for start in range(0, grid.shape[0], SLICES_AT_ONCE):
        stop = min(start + SLICES_AT_ONCE, grid.shape[0])
        index = np.empty((stop - start, *grid.shape[1:], 3))
        index[..., 0] = np.arange(start, stop)[:, None, None]
        index[..., 1], index[..., 2] = rows, columns
        world = grid.world_mm(index).astype(np.float32)
        points = Points(world[..., 0], world[..., 1], world[..., 2], edge)
        hu[start:stop], label[start:stop] = render(patient, points)
    return hu, label


def _scan(rng: np.random.Generator, hu: np.ndarray, grid: Grid, noise_hu: float) -> None:
    """Table, point spread, noise (correlated in plane, stronger in the middle), scanner offset, edge of the field."""
    slices, height, width = hu.shape
    spacing_z, spacing_y, _ = grid.spacing_mm
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    radius2 = x**2 + y**2
    mm_y = y * height * spacing_y / 2
    table = (np.abs(mm_y + 148 - 18 * x**2) < 6) & (np.abs(x) < 0.75)
    sigma_px = 0.6 if spacing_y > 2 else 0.8
    level = noise_hu * rng.uniform(0.8, 1.4) * min(1.6, (3.0 / spacing_z) ** 0.25)
    offset = rng.uniform(-5, 5)
    outside = radius2 > 1.02 if rng.random() < 0.5 else None
    padding = float(rng.choice([-1024, -2000, -3024]))
    profile = (1.15 - 0.5 * radius2).clip(0.5, None).astype(np.float32)
    for z in range(slices):
        plane = hu[z]
        np.maximum(plane, np.where(table, -150.0, -1000.0), out=plane)
        plane[...] = ndimage.gaussian_filter(plane, 0.5)
        noise = ndimage.gaussian_filter(rng.standard_normal((height, width), dtype=np.float32), sigma_px)
        plane += offset + noise * (level / max(float(noise.std()), 1e-6)) * profile
        if outside is not None:
            plane[np.broadcast_to(outside, plane.shape)] = padding
