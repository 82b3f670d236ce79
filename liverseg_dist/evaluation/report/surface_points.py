"""Surfaces of a case as a few thousand points with normals, which every browser can rotate."""

import base64
from typing import Any

import numpy as np
from scipy import ndimage

from liverseg_dist.evaluation.metrics.lesions import find_components, match_lesions
from liverseg_dist.pages.palette import SURFACE_RGB

VOXEL_MM = 3.5
"""Size of the cubes that the masks are reduced to."""
MAX_POINTS = 7000
KINDS = tuple(SURFACE_RGB)
"""Point kinds: true organs, true lesions that the prediction overlaps, true lesions that it misses,
predicted lesions without overlap."""
LESION = 2
"""Code of lesions in the masks (`DisplayLabels.reduce_to_lesions`); 1 is an organ."""


def sample_surface_points(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, spacing_mm: tuple[float, float, float]
) -> dict[str, Any]:
    """Sample the surfaces of the true organs and of all lesions.

    Args:
        prediction_zyx: Codes 0, 1, 2 in display orientation (head to feet, front to back, right to
            left).
        truth_zyx: Codes of the same shape.
        spacing_mm: Voxel size z, y, x.

    Returns:
        `count`, `kinds`, `spacing` (approximate distance of neighbouring points, in their unit) and
        `data`: base64 of 7 bytes a point: x, y, z (0..255), normal x, y, z (+128), kind.
    """
    prediction = _reduce_labels(prediction_zyx, spacing_mm)
    truth = _reduce_labels(truth_zyx, spacing_mm)
    # Without a true organ the predicted one gives the frame.
    parts = [_find_surface(truth > 0 if (truth > 0).any() else prediction > 0, 0)]
    masks = _split_lesions(prediction == LESION, truth == LESION)
    parts += [_find_surface(mask, kind) for kind, mask in enumerate(masks, start=1)]
    points = np.concatenate(parts)
    surface_size = len(points)
    if len(points) > MAX_POINTS:
        # Lesions take up to half of the points, organs the rest.
        lesions = _draw_some(np.flatnonzero(points[:, 6] != 0), MAX_POINTS // 2)
        organs = _draw_some(np.flatnonzero(points[:, 6] == 0), MAX_POINTS - lesions.size)
        points = points[np.sort(np.concatenate([organs, lesions]))]
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


def _split_lesions(
    prediction: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the true lesions with and without a match, and of the predicted ones without."""
    predicted_components = find_components(prediction, connectivity=26)
    true_components = find_components(truth, connectivity=26)
    matched_truth: list[int] = []
    matched_prediction: list[int] = []
    for pair in match_lesions(predicted_components, true_components):
        matched_truth += pair.truth
        matched_prediction += pair.prediction
    found = np.isin(true_components.labels_zyx, matched_truth)
    matched = np.isin(predicted_components.labels_zyx, matched_prediction)
    return truth & found, truth & ~found, prediction & ~matched


def _reduce_labels(labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The highest label in each cube of about `VOXEL_MM`, with one voxel of background around.

    The highest, so that no small lesion disappears.
    """
    # Whole voxels are combined first; the rest of the scale is done by nearest neighbour.
    steps = [max(1, round(VOXEL_MM / mm)) for mm in spacing_mm]
    padded = np.pad(labels, [(0, -n % step) for n, step in zip(labels.shape, steps, strict=True)])
    z, y, x = (n // step for n, step in zip(padded.shape, steps, strict=True))
    cubes = padded.reshape(z, steps[0], y, steps[1], x, steps[2]).max(axis=(1, 3, 5))
    zoom = [step * mm / VOXEL_MM for step, mm in zip(steps, spacing_mm, strict=True)]
    indices = []
    for size, factor in zip(cubes.shape, zoom, strict=True):
        centres = np.arange(max(1, round(size * factor))) + 0.5
        indices.append((centres / factor).astype(int).clip(0, size - 1))
    return np.pad(cubes[np.ix_(*indices)], 1)


def _find_surface(mask: np.ndarray, kind: int) -> np.ndarray:
    """Surface points (n, 7): x, y, z, outward unit normal x, y, z, kind."""
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    if not len(surface):
        return np.zeros((0, 7))
    # The gradient of a binary mask has 26 directions only; that of a smooth one shades well.
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), 1.2)
    at = tuple(surface.T)
    normal = -np.stack([slope[at] for slope in np.gradient(smooth)], axis=1)
    steepness = np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    normal /= steepness
    # Points move to where the smooth mask is 0.5: voxel centres would show as steps.
    shift = np.clip((smooth[at][:, None] - 0.5) / steepness, -1, 1)
    positions = surface + normal * shift
    kinds = np.full((len(surface), 1), kind)
    return np.concatenate([positions[:, ::-1], normal[:, ::-1], kinds], axis=1)


def _draw_some(indices: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the indices, drawn at random with a fixed seed.

    Every n-th index instead would leave stripes on the surface.
    """
    if indices.size <= limit:
        return indices
    return np.sort(np.random.default_rng(0).choice(indices, limit, replace=False))
