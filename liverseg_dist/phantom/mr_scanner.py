"""The effects of an MR scanner: receive gain, coil sensitivity (bias field), Rician noise.

The noise of a magnitude image is Rician (Gudbjartsson and Patz, Magn Reson Med 34:910, 1995,
https://doi.org/10.1002/mrm.1910340618): both parts of the complex signal have Gaussian noise.
Values have no unit: the gain differs from scan to scan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.shapes import Waves
from liverseg_dist.volume import Grid

REFERENCE_TISSUES = ("liver", "spleen", "muscle", "fat", "kidney_cortex")
"""The signal-to-noise ratio refers to their mean signal."""
SIGNAL_TO_NOISE = (20.0, 40.0)
HARD_NOISE = 1.7
REFERENCE_VALUE = (120.0, 1200.0)
"""Stored value of the mean signal of the reference tissues."""
BIAS_LENGTH_MM = (350.0, 800.0)
BIAS_SD = (0.08, 0.2)
"""Standard deviation of the logarithm of the bias field."""
LARGEST_VALUE = 32767


@dataclass(frozen=True)
class MrScanner:
    """Parameters of one MR scan. Signals are those of `mr_signal`."""

    gain: float
    """Stored value of signal 1."""
    noise: float
    """Standard deviation of the noise in each part of the complex signal."""
    log_bias: Waves
    """Logarithm of the factor by which coils and field change the signal."""

    @classmethod
    def draw_random(
        cls, rng: np.random.Generator, signals: Mapping[str, float], hard: bool
    ) -> "MrScanner":
        """Draw a scanner for a sequence whose tissues have these signals."""
        reference = float(np.mean([signals[name] for name in REFERENCE_TISSUES]))
        ratio = float(rng.uniform(*SIGNAL_TO_NOISE)) / (HARD_NOISE if hard else 1.0)
        # Logarithmic, because gains differ by factors.
        stored = float(np.exp(rng.uniform(*np.log(REFERENCE_VALUE))))
        bias = Waves.draw_random(rng, BIAS_LENGTH_MM, float(rng.uniform(*BIAS_SD)), 4)
        return cls(stored / reference, reference / ratio, bias)

    def measure_planes(
        self, signal: np.ndarray, rng: np.random.Generator, grid: Grid, planes: slice
    ) -> np.ndarray:
        """Return the stored values, int16, of some planes of a grid."""
        received = signal * np.exp(self.log_bias.evaluate_planes(grid, planes))
        magnitude = add_rician_noise(received, self.noise, rng)
        return np.rint(np.clip(magnitude * self.gain, 0, LARGEST_VALUE)).astype(np.int16)


def add_rician_noise(
    signal: np.ndarray, standard_deviation: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the magnitude of a signal with Gaussian noise in both parts, float32.

    Args:
        signal: signal without noise, at least 0.
        standard_deviation: of the noise of each part, in the unit of the signal.
        rng: random generator.
    """
    real, imaginary = rng.standard_normal((2, *signal.shape), dtype=np.float32)
    sd = np.float32(standard_deviation)
    return np.hypot(signal.astype(np.float32) + sd * real, sd * imaginary)
