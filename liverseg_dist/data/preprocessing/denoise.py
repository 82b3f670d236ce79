"""Noise reduction slice by slice: median, Gaussian, bilateral, total variation, a trained network.

Slices are thick, so neighbouring slices differ by anatomy, and noise is reduced in plane only.

The estimate of the noise looks at soft tissue: -200 to 300 HU in CT, all voxels of the body where
units are arbitrary. The trained network knows HU only, so it leaves other channels as they are.

To add a method, write a function here, add it to NOISE_METHODS, and add its name to the Literal of
`CleaningConfig.noise`.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.preprocessing.denoising_autoencoder import apply_denoiser, load_denoiser
from liverseg_dist.errors import UserError

TV_TOLERANCE = 2e-4
TV_ITERATIONS = 200
SOFT_TISSUE_HU = (-200.0, 300.0)
BILATERAL_RANGE = 3.0
"""Differences of up to about this many standard deviations of the noise are smoothed; larger ones
are edges."""
MAD_OF_NORMAL = 0.6744897501960817
"""Median absolute deviation of the standard normal distribution."""

ValueRange = tuple[float, float]
NoiseMethod = Callable[
    [np.ndarray, CleaningConfig, ValueRange], tuple[np.ndarray, dict[str, object]]
]
"""(int16 voxels z, y, x; settings; values of soft tissue) -> (int16, additional provenance)."""


def reduce_noise(
    voxels_zyx: np.ndarray,
    cleaning: CleaningConfig,
    tissue: ValueRange | None = None,
) -> tuple[np.ndarray, dict[str, object]]:
    """Reduce noise with the method `cleaning.noise`.

    Args:
        voxels_zyx: Int16 voxels.
        cleaning: Settings.
        tissue: Values of soft tissue, for arbitrary units; None for HU.

    Returns:
        Int16 HU, and what was done as JSON. `noise="none"` returns the input itself.

    Raises:
        UserError: The method is unknown, or its denoiser file is missing or damaged.
    """
    if cleaning.noise == "none":
        return voxels_zyx, {"method": "none"}
    if cleaning.noise not in NOISE_METHODS:
        raise UserError(
            f"convert.cleaning.noise: unknown method {cleaning.noise!r}; "
            f"use one of none, {', '.join(NOISE_METHODS)}"
        )
    # Values in other units would lie outside of what the network has seen.
    if cleaning.noise == "autoencoder" and tissue is not None:
        return voxels_zyx, {"method": "none", "reason": "the denoiser was trained on HU"}
    values = SOFT_TISSUE_HU if tissue is None else tissue
    voxels, details = NOISE_METHODS[cleaning.noise](voxels_zyx, cleaning, values)
    return voxels, {"method": cleaning.noise, "strength": cleaning.noise_strength, **details}


def _apply_median(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig, tissue: ValueRange
) -> tuple[np.ndarray, dict[str, object]]:
    radius = max(1, round(cleaning.noise_strength))
    return _filter_slices(voxels_zyx, lambda image: median_filter(image, radius)), {}


def _apply_gaussian(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig, tissue: ValueRange
) -> tuple[np.ndarray, dict[str, object]]:
    sigma = cleaning.noise_strength
    return _filter_slices(voxels_zyx, lambda image: gaussian_filter(image, sigma)), {}


def _apply_bilateral(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig, tissue: ValueRange
) -> tuple[np.ndarray, dict[str, object]]:
    # The filter adapts to the scan: the same width in HU would blur clean scans and leave noisy
    # ones.
    noise_hu = estimate_noise(voxels_zyx, tissue=tissue)
    sigma_hu = BILATERAL_RANGE * noise_hu
    voxels = _filter_slices(
        voxels_zyx, lambda image: bilateral_filter(image, cleaning.noise_strength, sigma_hu)
    )
    return voxels, {"sigma_hu": round(noise_hu, 3)}


def _apply_total_variation(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig, tissue: ValueRange
) -> tuple[np.ndarray, dict[str, object]]:
    noise_hu = estimate_noise(voxels_zyx, tissue=tissue)
    # The weight in units of the noise, for the same reason.
    weight = cleaning.noise_strength * noise_hu
    voxels = _filter_slices(voxels_zyx, lambda image: minimise_total_variation(image, weight))
    return voxels, {"sigma_hu": round(noise_hu, 3)}


def _apply_autoencoder(
    voxels_zyx: np.ndarray, cleaning: CleaningConfig, tissue: ValueRange
) -> tuple[np.ndarray, dict[str, object]]:
    denoiser = load_denoiser(cleaning.denoiser)
    return apply_denoiser(voxels_zyx, denoiser, cleaning.noise_strength), {}


NOISE_METHODS: dict[str, NoiseMethod] = {
    "median": _apply_median,
    "gaussian": _apply_gaussian,
    "bilateral": _apply_bilateral,
    "tv": _apply_total_variation,
    "autoencoder": _apply_autoencoder,
}
"""Method by its name in `convert.cleaning.noise`."""


def _filter_slices(
    voxels_zyx: np.ndarray, filter_slice: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Apply a filter to each slice and round to int16."""
    filtered = np.empty(voxels_zyx.shape, dtype=np.int16)
    for target, image in zip(filtered, voxels_zyx, strict=True):
        # Rounded to the nearest: truncation would darken the image by half a unit.
        target[:] = np.rint(filter_slice(image))
    return filtered


def median_filter(image_yx: np.ndarray, radius: int) -> np.ndarray:
    """Median of the (2 radius + 1)^2 neighbours; the border is repeated."""
    return ndimage.median_filter(image_yx, size=2 * radius + 1, mode="nearest")


def gaussian_filter(image_yx: np.ndarray, sigma_voxels: float) -> np.ndarray:
    """Gaussian filter in float32; the border is repeated."""
    return ndimage.gaussian_filter(image_yx.astype(np.float32), sigma_voxels, mode="nearest")


def bilateral_filter(image_yx: np.ndarray, sigma_voxels: float, sigma_hu: float) -> np.ndarray:
    """Mean of the neighbours within 2 sigma, weighted by distance in plane and in HU.

    The border is repeated. Source: Tomasi and Manduchi 1998,
    https://doi.org/10.1109/ICCV.1998.710815.

    Args:
        image_yx: HU.
        sigma_voxels: Standard deviation of the weights in plane.
        sigma_hu: Standard deviation of the weights in HU; 0 or less returns the input.

    Returns:
        HU, float32.
    """
    image = image_yx.astype(np.float32)
    if sigma_hu <= 0:
        return image
    height, width = image.shape
    radius = max(1, math.ceil(2 * sigma_voxels))
    padded = np.pad(image, radius, mode="edge")
    total, weights = np.zeros_like(image), np.zeros_like(image)
    # One shifted copy of the image per neighbour: few NumPy calls instead of a loop over voxels.
    for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
        rows = slice(radius + dy, radius + dy + height)
        columns = slice(radius + dx, radius + dx + width)
        difference = padded[rows, columns] - image
        weight = np.exp(
            difference**2 * (-0.5 / sigma_hu**2) - (dy**2 + dx**2) / (2 * sigma_voxels**2)
        )
        total += weight * difference
        weights += weight
    return image + total / weights


def minimise_total_variation(
    image_yx: np.ndarray,
    weight: float,
    tolerance: float = TV_TOLERANCE,
    iterations: int = TV_ITERATIONS,
) -> np.ndarray:
    """Minimise |u - image|^2 / 2 + weight * TV(u) by Chambolle's dual projection with step 1/4.

    Source: Chambolle 2004, https://doi.org/10.1023/B:JMIV.0000011325.36760.1e.

    Args:
        image_yx: HU.
        weight: In HU; 0 or less returns the input.
        tolerance: Stop when the energy changes by less than this share of its first value.
        iterations: Maximum number of iterations.

    Returns:
        HU, float32.
    """
    image = image_yx.astype(np.float32)
    if weight <= 0:
        return image
    dual = np.zeros((2, *image.shape), dtype=np.float32)
    first_energy = previous = None
    for _ in range(iterations):
        result = image + _divergence(dual)
        gradient = _gradient(result)
        # The energy costs little: it needs the same gradient as the update.
        norm = np.sqrt((gradient**2).sum(axis=0))
        energy = float((((result - image) ** 2).sum() / 2 + weight * norm.sum()) / image.size)
        if first_energy is None or previous is None:
            first_energy = energy
        elif abs(previous - energy) < tolerance * first_energy:
            break
        previous = energy
        dual = (dual - 0.25 * gradient) / (1 + 0.25 / weight * norm)
    return result


def _gradient(image: np.ndarray) -> np.ndarray:
    """Forward differences along y and x (2, y, x); 0 at the last row and column."""
    out = np.zeros((2, *image.shape), dtype=np.float32)
    out[0, :-1] = image[1:] - image[:-1]
    out[1, :, :-1] = image[:, 1:] - image[:, :-1]
    return out


def _divergence(dual: np.ndarray) -> np.ndarray:
    """Adjoint of `_gradient`: minus the divergence, with the sign of Chambolle's paper."""
    out = -(dual[0] + dual[1])
    out[1:] += dual[0, :-1]
    out[:, 1:] += dual[1, :, :-1]
    return out


def estimate_noise(
    voxels_zyx: np.ndarray, slices: int = 9, tissue: ValueRange = SOFT_TISSUE_HU
) -> float:
    """Standard deviation of the noise, in the units of the voxels.

    Median absolute deviation of the finest diagonal Haar detail over soft tissue of some slices.
    Source: Donoho and Johnstone 1994, https://doi.org/10.1093/biomet/81.3.425.

    Args:
        voxels_zyx: HU, or other units with their `tissue`.
        slices: Number of slices that are evaluated, evenly spread.
        tissue: Values of soft tissue.

    Returns:
        The estimate; 0 for a scan without soft tissue.
    """
    # Nine slices over the scan: noise grows in the pelvis and at the shoulders, and the median
    # balances it.
    selected = np.unique(np.linspace(0, len(voxels_zyx) - 1, slices).round().astype(int))
    details = []
    # The Haar detail needs pairs of rows and columns: an odd last one is left out.
    height, width = (n // 2 * 2 for n in voxels_zyx.shape[1:])
    for image in voxels_zyx[selected, :height, :width].astype(np.float32):
        quads = np.stack(
            [image[0::2, 0::2], image[0::2, 1::2], image[1::2, 0::2], image[1::2, 1::2]]
        )
        # All four pixels: an edge to air or bone would count as noise.
        is_soft = (quads.min(axis=0) > tissue[0]) & (quads.max(axis=0) < tissue[1])
        detail = (quads[0] - quads[1] - quads[2] + quads[3]) / 2
        details.append(detail[is_soft])
    values = np.concatenate(details)
    return float(np.median(np.abs(values)) / MAD_OF_NORMAL) if values.size else 0.0
