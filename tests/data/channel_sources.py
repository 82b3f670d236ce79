"""Small data sets of several channels: an ellipsoid body with a liver and a tumour, by formula.

Positions are in the world, so that each channel can be drawn on a grid of its own.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from liverseg_dist.volume import Grid
from tests.data.sources import write_nifti

CT_GRID = Grid((40, 60, 64), np.diag([2.5, 2.5, 4.0, 1.0]))
"""160 x 150 x 160 mm from the origin."""
CENTRE = np.array([80.0, 75.0, 80.0])
LIVER_CENTRE, LIVER_MM = np.array([95.0, 75.0, 85.0]), 35.0
TUMOUR_CENTRE, TUMOUR_MM = np.array([100.0, 80.0, 90.0]), 12.0
Values = tuple[float, float, float, float]
"""Of air, body, liver and tumour."""
CT: Values = (-1000.0, 40.0, 110.0, 60.0)
MR: Values = (0.0, 300.0, 200.0, 600.0)


def positions_mm(grid: Grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return grid.world_mm(index)


def _soft_sphere(world_mm: np.ndarray, centre: np.ndarray, radius_mm: float) -> np.ndarray:
    """1 inside, 0 outside, with an edge of some mm: smooth enough to be interpolated."""
    distance = np.linalg.norm(world_mm - centre, axis=-1)
    return 1 / (1 + np.exp((distance - radius_mm) / 3.0))


def draw(world_mm: np.ndarray, values: Values) -> np.ndarray:
    """The values of a channel at world positions."""
    air, body, liver, tumour = values
    image = air + (body - air) * _soft_sphere(world_mm, CENTRE, 68.0)
    image += (liver - body) * _soft_sphere(world_mm, LIVER_CENTRE, LIVER_MM)
    image += (tumour - liver) * _soft_sphere(world_mm, TUMOUR_CENTRE, TUMOUR_MM)
    waves = np.sin(world_mm[..., 0] / 9) * np.cos(world_mm[..., 1] / 11)
    return image + 0.05 * (body - air) * waves * _soft_sphere(world_mm, CENTRE, 60.0)


def draw_label(world_mm: np.ndarray) -> np.ndarray:
    liver = np.linalg.norm(world_mm - LIVER_CENTRE, axis=-1) < LIVER_MM
    tumour = np.linalg.norm(world_mm - TUMOUR_CENTRE, axis=-1) < TUMOUR_MM
    return (liver.astype(np.uint8) + tumour).astype(np.uint8)


def shifted_grid(shift_mm: tuple[float, float, float]) -> Grid:
    """A coarser grid than CT_GRID, in another orientation and moved by `shift_mm` (x, y, z)."""
    affine = np.diag([-3.0, 3.0, 5.0, 1.0])
    affine[:3, 3] = np.array([170.0, -9.0, -12.0]) + shift_mm
    return Grid((38, 58, 60), affine)


def noisy(image: np.ndarray, seed: int, sigma: float = 2.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.rint(image + noise).astype(np.int16)


def write_dataset_json(folder: Path, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, "liver": 1, "tumour": 2}
    index = {"labels": labels, "file_ending": ".nii.gz", **content}
    (folder / "dataset.json").write_text(json.dumps(index))


def write_channel(folder: Path, name: str, grid: Grid, values: Values, seed: int = 0) -> None:
    image = noisy(draw(positions_mm(grid), values), seed)
    write_nifti(folder / "imagesTr" / f"{name}.nii.gz", image, grid.affine)


def write_two_channels(
    folder: Path, cases: int = 3, mr_grid: Grid | Callable[[int], Grid] | None = None
) -> Path:
    """nnU-Net's layout: `case_N_0000` CT and `case_N_0001` MR on a grid of its own."""
    write_dataset_json(folder, channel_names={"0": "CT", "1": "T2"})
    grid = shifted_grid((0, 0, 0)) if mr_grid is None else mr_grid
    for case in range(cases):
        case_grid = grid(case) if callable(grid) else grid
        write_channel(folder, f"case_{case}_0000", CT_GRID, CT, 10 * case)
        write_channel(folder, f"case_{case}_0001", case_grid, MR, 10 * case + 1)
        label = draw_label(positions_mm(CT_GRID))
        write_nifti(folder / "labelsTr" / f"case_{case}.nii.gz", label, CT_GRID.affine)
    return folder


def write_4d(folder: Path, names: Mapping[str, str], volumes: int, cases: int = 3) -> Path:
    """The Decathlon's layout: one 4D file per case, channels along the last axis.

    Channel k is the MR image times k + 1; the last one is in fractions below 1.
    """
    training = []
    for case in range(cases):
        image = draw(positions_mm(CT_GRID), MR)
        channels = []
        for number in range(volumes):
            noise = np.random.default_rng(10 * case + number).normal(0, 2, image.shape)
            channels.append(np.maximum(image + noise, 0) * (number + 1))
        channels[-1] = channels[-1] / 10_000
        name = f"BRATS_{case:03d}.nii.gz"
        # `write_nifti` transposes: (channel, z, y, x) becomes x, y, z, channel.
        voxels = np.stack(channels).astype(np.float32)
        voxels[:-1] = np.rint(voxels[:-1])
        write_nifti(folder / "imagesTr" / name, voxels, CT_GRID.affine)
        label = draw_label(positions_mm(CT_GRID))
        write_nifti(folder / "labelsTr" / name, label, CT_GRID.affine)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    labels = {"0": "background", "1": "liver", "2": "tumour"}
    content = {"modality": dict(names), "labels": labels, "training": training, "test": []}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
