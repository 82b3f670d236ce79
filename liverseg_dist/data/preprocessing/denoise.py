"""Noise reduction slice by slice: median, Gaussian, bilateral, total variation, a trained network.

Slices are thick, so noise is treated in plane.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.preprocessing.denoising_autoencoder import apply_denoiser, load_denoiser

TV_TOLERANCE = 2e-4
TV_ITERATIONS = 200
SOFT_TISSUE_HU = (-200, 300)
BILATERAL_RANGE = 3.0
"""Differences up to about this many times the noise's sigma are smoothed, larger ones are edges."""


def reduce_noise(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig
) -> tuple[np.ndarray, dict[str, object]]:
    """Int16 HU with less noise, and what was done. `noise="none"` returns the input itself."""
    if cleaning.noise == "none":
        return voxels_zyx, {"method": "none"}
    strength = cleaning.noise_strength
    provenance: dict[str, object] = {"method": cleaning.noise, "strength": strength}
    if cleaning.noise == "autoencoder":
        return apply_denoiser(voxels_zyx, load_denoiser(cleaning.denoiser), strength), provenance
    filters: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "median": lambda image: median_filter(image, max(1, round(strength))),
        "gaussian": lambda image: gaussian_filter(image, strength),
    }
    if cleaning.noise in ("tv", "bilateral"):
        sigma_hu = estimate_noise(voxels_zyx)
        provenance["sigma_hu"] = round(sigma_hu, 3)
        filters["tv"] = lambda image: total_variation(image, strength * sigma_hu)
        filters["bilateral"] = lambda image: bilateral_filter(
            image, strength, BILATERAL_RANGE * sigma_hu
        )
    out = np.empty(voxels_zyx.shape, dtype=np.int16)
    for into, image in zip(out, voxels_zyx, strict=True):
        into[:] = np.rint(filters[cleaning.noise](image))
    return out, provenance


def median_filter(image_yx: np.ndarray, radius: int) -> np.ndarray:
    """Median of the (2 radius + 1)^2 neighbours; the border is repeated."""
    return ndimage.median_filter(image_yx, size=2 * radius + 1, mode="nearest")


def gaussian_filter(image_yx: np.ndarray, sigma_voxels: float) -> np.ndarray:
    return ndimage.gaussian_filter(image_yx.astype(np.float32), sigma_voxels, mode="nearest")


def bilateral_filter(image_yx: np.ndarray, sigma_voxels: float, sigma_hu: float) -> np.ndarray:
    """Mean of the neighbours within 2 sigma_voxels, near in place and in HU; the border is repeated.

    Tomasi and Manduchi 1998, https://doi.org/10.1109/ICCV.1998.710815.
    """
    image = image_yx.astype(np.float32)
    if sigma_hu <= 0:
        return image
    radius = max(1, math.ceil(2 * sigma_voxels))
    padded = np.pad(image, radius, mode="edge")
    total, weights = np.zeros_like(image), np.zeros_like(image)
    for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
        rows, columns = (
            slice(radius + d, radius + d + n) for d, n in zip((dy, dx), image.shape, strict=True)
        )
        away = padded[rows, columns] - image
        weight = np.exp(away**2 * (-0.5 / sigma_hu**2) - (dy**2 + dx**2) / (2 * sigma_voxels**2))
        total += weight * away
        weights += weight
    return image + total / weights


def total_variation(
    image_yx: np.ndarray,
    weight: float,
    tolerance: float = TV_TOLERANCE,
    iterations: int = TV_ITERATIONS,
) -> np.ndarray:
    """Minimises |u - image|^2 / 2 + weight * TV(u), weight in HU.

    Chambolle's dual projection (2004, https://doi.org/10.1023/B:JMIV.0000011325.36760.1e), step 1/4, until the energy
    changes by less than `tolerance` of its first value.
    """
    image = image_yx.astype(np.float32)
    if weight <= 0:
        return image
    dual = np.zeros((2, *image.shape), dtype=np.float32)
    first = previous = None
    for _ in range(iterations):
        result = image + _divergence(dual)
        gradient = _gradient(result)
        norm = np.sqrt((gradient**2).sum(axis=0))
        energy = float((((result - image) ** 2).sum() / 2 + weight * norm.sum()) / image.size)
        if first is None or previous is None:
            first = energy
        elif abs(previous - energy) < tolerance * first:
            break
        previous = energy
        dual = (dual - 0.25 * gradient) / (1 + 0.25 / weight * norm)
    return result


def _gradient(image: np.ndarray) -> np.ndarray:
    out = np.zeros((2, *image.shape), dtype=np.float32)
    out[0, :-1] = image[1:] - image[:-1]
    out[1, :, :-1] = image[:, 1:] - image[:, :-1]
    return out


def _divergence(dual: np.ndarray) -> np.ndarray:
    """Minus the divergence, the adjoint of `_gradient`, up to its sign as Chambolle writes it."""
    out = -(dual[0] + dual[1])
    out[1:] += dual[0, :-1]
    out[:, 1:] += dual[1, :, :-1]
    return out


def estimate_noise(voxels_zyx: np.ndarray, slices: int = 9) -> float:
    """Standard deviation of the noise in HU, from the diagonal differences of neighbouring voxels in soft tissue.

    Median absolute deviation of the finest Haar detail (Donoho and Johnstone 1994,
    https://doi.org/10.1093/biomet/81.3.425), over voxels between -200 and 300 HU of some slices; 0 where there is none.
    """
    picked = np.unique(np.linspace(0, len(voxels_zyx) - 1, slices).round().astype(int))
    details = []
    height, width = (n // 2 * 2 for n in voxels_zyx.shape[1:])
    for image in voxels_zyx[picked, :height, :width].astype(np.float32):
        quads = np.stack([image[y::2, x::2] for y in (0, 1) for x in (0, 1)])
        soft = (quads.min(axis=0) > SOFT_TISSUE_HU[0]) & (quads.max(axis=0) < SOFT_TISSUE_HU[1])
        details.append(((quads[0] - quads[1] - quads[2] + quads[3]) / 2)[soft])
    values = np.concatenate(details)
    return float(np.median(np.abs(values)) / 0.6744897501960817) if values.size else 0.0
