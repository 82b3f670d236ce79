"""The surfaces of a case as a few thousand points with normals: small enough to be turned in any browser."""

import base64
from typing import Any

import numpy as np
from scipy import ndimage

from liverseg_dist.evaluation.metrics.lesions import find_components, match_lesions
from liverseg_dist.labels import TUMOUR
from liverseg_dist.pages.palette import LESION_RGB

VOXEL_MM = 3.5
"""Size of the cubes that the masks are reduced to."""
MAX_POINTS = 7000
KINDS = tuple(LESION_RGB)
"""Point kinds: true liver, true lesions that the prediction touches (any overlap), true lesions that it does not,
predicted lesions that touch none."""


def sample_surface_points(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, spacing_mm: tuple[float, float, float]
) -> dict[str, Any]:
    """Surfaces of the true liver and of all lesions.

    Args:
        prediction_zyx: Labels 0, 1, 2 in display orientation (head to feet, front to back, right to left).
        truth_zyx: Labels of the same shape.
        spacing_mm: Voxel size z, y, x.

    Returns:
        `count`, `kinds`, `spacing` (about the distance of neighbouring points, in the points' unit) and `data`:
        base64 of 7 bytes a point: x, y, z (0..255), normal x, y, z (+128), kind.
    """
    prediction, truth = (_reduced(mask, spacing_mm) for mask in (prediction_zyx, truth_zyx))
    parts = [_points(truth > 0 if (truth > 0).any() else prediction > 0, 0)]
    masks = _tumours_by_fate(prediction == TUMOUR, truth == TUMOUR)
    parts += [_points(mask, kind) for kind, mask in enumerate(masks, start=1)]
    points = np.concatenate(parts)
    surface_size = len(points)
    if len(points) > MAX_POINTS:  # thin out the liver, keep every tumour point that fits
        liver = np.flatnonzero(points[:, 6] == 0)
        others = np.flatnonzero(points[:, 6] != 0)
        others = _some(others, MAX_POINTS // 2)
        points = points[np.sort(np.concatenate([_some(liver, MAX_POINTS - others.size), others]))]
    scale = 255.0 / max(1, *(n - 1 for n in truth.shape))
    centre = (np.array(truth.shape)[::-1] - 1) / 2
    packed = np.empty((len(points), 7), dtype=np.uint8)
    packed[:, :3] = np.clip(np.round((points[:, :3] - centre) * scale + 127.5), 0, 255)
    packed[:, 3:6] = np.round(points[:, 3:6] * 127 + 128)
    packed[:, 6] = points[:, 6]
    # Half of the points on the same surface are further apart by the square root of 2.
    spacing = scale * (surface_size / max(1, len(points))) ** 0.5
    return {
        "count": len(points),
        "kinds": list(KINDS),
        "spacing": round(float(spacing), 4),
        "data": base64.b64encode(packed.tobytes()).decode("ascii"),
    }


def _tumours_by_fate(
    prediction: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    components = [find_components(mask, connectivity=26) for mask in (prediction, truth)]
    pairs = match_lesions(*components)
    found = np.isin(components[1].labels_zyx, [n for pair in pairs for n in pair.truth])
    matched = np.isin(components[0].labels_zyx, [n for pair in pairs for n in pair.prediction])
    return truth & found, truth & ~found, prediction & ~matched


def _reduced(labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The highest label in each cube of about `VOXEL_MM`, so that no small tumour is lost; one voxel of air around."""
    steps = [max(1, round(VOXEL_MM / mm)) for mm in spacing_mm]
    padded = np.pad(labels, [(0, -n % step) for n, step in zip(labels.shape, steps, strict=True)])
    z, y, x = (n // step for n, step in zip(padded.shape, steps, strict=True))
    cubes = padded.reshape(z, steps[0], y, steps[1], x, steps[2]).max(axis=(1, 3, 5))
    zoom = [step * mm / VOXEL_MM for step, mm in zip(steps, spacing_mm, strict=True)]
    index = [
        ((np.arange(max(1, round(n * factor))) + 0.5) / factor).astype(int).clip(0, n - 1)
        for n, factor in zip(cubes.shape, zoom, strict=True)
    ]
    return np.pad(cubes[np.ix_(*index)], 1)


def _points(mask: np.ndarray, kind: int) -> np.ndarray:
    """Surface voxels (n, 7): x, y, z, unit normal outwards x, y, z, kind."""
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    if not len(surface):
        return np.zeros((0, 7))
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), 1.2)
    at = tuple(surface.T)
    normal = -np.stack([slope[at] for slope in np.gradient(smooth)], axis=1)
    steepness = np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    normal /= steepness
    outwards = np.clip(
        (smooth[at][:, None] - 0.5) / steepness, -1, 1
    )  # to where the smooth mask is a half: no stairs
    place = surface + normal * outwards
    return np.concatenate(
        [place[:, ::-1], normal[:, ::-1], np.full((len(surface), 1), kind)], axis=1
    )


def _some(indices: np.ndarray, at_most: int) -> np.ndarray:
    """Some of them, drawn evenly (always the same): every n-th would leave stripes."""
    if indices.size <= at_most:
        return indices
    return np.sort(np.random.default_rng(0).choice(indices, at_most, replace=False))
