"""The effects of a scanner: noise of filtered back-projection, drift, table, field of view."""

from dataclasses import dataclass

import numpy as np
from scipy import fft

from liverseg_dist.volume import Grid

AIR_HU, LOWEST_HU, HIGHEST_HU = -1000.0, -1024, 3071


class SpectralField:
    """Slices of a random field of unit variance with a given in-plane spectrum.

    Args:
        rng: random generator.
        grid: voxel grid.
        amplitude: amplitude of the half spectrum.
        between_slices: correlation of neighbouring slices.
    """

    def __init__(
        self, rng: np.random.Generator, grid: Grid, amplitude: np.ndarray, between_slices: float
    ) -> None:
        self._rng, self._shape = rng, grid.shape[1:]
        self._size = fft_size(grid)
        weight = np.full(amplitude.shape[1], 4.0)
        weight[0] = 1.0
        if self._size[1] % 2 == 0:
            weight[-1] = 1.0
        power = float((weight * amplitude.astype(np.float64) ** 2).sum())
        self._filter = (amplitude * (np.prod(self._size) / np.sqrt(power))).astype(np.float32)
        self._keep = np.float32(between_slices)
        self._new = np.float32(np.sqrt(1 - between_slices**2))
        self._state = self._draw_white_noise()

    def _draw_white_noise(self) -> np.ndarray:
        return self._rng.standard_normal((*self._filter.shape, 2), dtype=np.float32).view(
            np.complex64
        )[..., 0]

    def next_slices(self, count: int) -> np.ndarray:
        """Return the next slices: (count, rows, columns), float32."""
        out = np.empty((count, *self._shape), np.float32)
        for plane in out:
            field = fft.irfft2(self._state * self._filter, s=self._size, workers=1)
            plane[...] = field[: self._shape[0], : self._shape[1]]
            # First-order autoregression: unit variance and an exponential correlation along z.
            self._state *= self._keep
            self._state += self._new * self._draw_white_noise()
        return out


def fft_size(grid: Grid) -> tuple[int, int]:
    """Return the smallest size of a slice for which the FFT is fast."""
    rows, columns = (fft.next_fast_len(n, real=True) for n in grid.shape[1:])
    return int(rows), int(columns)


def spectrum_frequencies(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies along rows and columns of the half spectrum, in 1/mm."""
    rows, columns = fft_size(grid)
    _, spacing_y, spacing_x = grid.spacing_mm
    return np.fft.fftfreq(rows, spacing_y)[:, None], np.fft.rfftfreq(columns, spacing_x)[None]


def tissue_texture(rng: np.random.Generator, grid: Grid, length_mm: float = 6.0) -> SpectralField:
    """Return the unevenness of tissue, with the correlation length `length_mm`."""
    along_y, along_x = spectrum_frequencies(grid)
    amplitude = np.exp(-0.5 * (np.pi * length_mm) ** 2 * (along_y**2 + along_x**2) / 2)
    return SpectralField(rng, grid, amplitude, float(np.exp(-grid.spacing_mm[0] / length_mm)))


@dataclass(frozen=True)
class Scanner:
    """Parameters of a scanner and its protocol."""

    noise_hu: float
    """Standard deviation in the middle of the body."""
    cut_off_per_mm: float
    """Cut-off frequency of the reconstruction kernel."""
    lateral: float
    """Additional noise from the long path through both flanks: fine horizontal streaks."""
    offset_hu: float
    gain: float
    cupping_hu: float
    padding_hu: int | None
    """HU outside the circular field of view; None: air."""
    table_mm: float
    """Height of the table top, patient y."""

    @classmethod
    def draw_random(
        cls, rng: np.random.Generator, grid: Grid, body_mm: tuple[float, float], hard: bool
    ) -> "Scanner":
        u = rng.uniform
        # Voxels are square in plane.
        spacing_z, spacing_y, _ = grid.spacing_mm
        # Fewer photons in thin slices and small pixels; coarse grids look like rebinned fine ones.
        photons = (2.5 / spacing_z) ** 0.4 * (0.75 / spacing_y) ** 0.15
        noise = float(np.clip(u(11, 17) * photons, 7, 27)) * (1.4 if hard else 1.0)
        return cls(
            noise_hu=noise,
            cut_off_per_mm=float(u(0.28, 0.5)),
            lateral=float(u(0, 2.5)),
            offset_hu=float(u(-8, 8)),
            gain=float(u(0.97, 1.03)),
            cupping_hu=float(u(-4, 4)),
            padding_hu=int(rng.choice([-1024, -2000, -3024])) if rng.random() < 0.45 else None,
            table_mm=-body_mm[1] - float(u(2, 12)),
        )

    def noise_field(self, rng: np.random.Generator, grid: Grid) -> SpectralField:
        """Return the noise of a scan, before its standard deviation is applied.

        Power increases with frequency up to the kernel's cut-off (Riederer et al. 1978,
        https://doi.org/10.1088/0031-9155/23/3/008); projections through the flanks add power across
        the rows.
        """
        along_y, along_x = spectrum_frequencies(grid)
        f2 = along_y**2 + along_x**2
        ramp = np.sqrt(np.sqrt(f2) + 0.012) * np.exp(-f2 / (2 * self.cut_off_per_mm**2))
        direction = 1 + self.lateral * (along_y**2 / np.maximum(f2, 1e-9)) ** 2
        return SpectralField(
            rng, grid, ramp * np.sqrt(direction), float(np.exp(-grid.spacing_mm[0] / 1.1))
        )

    def simulate_exposure(self, hu: np.ndarray, noise: np.ndarray, fields: "SliceFields") -> None:
        """Change the tissue HU of some slices to the HU that the scanner measures, in fields."""
        np.maximum(hu, fields.table, out=hu)
        hu *= np.float32(self.gain)
        hu += fields.drift
        hu += noise * fields.noise_hu
        # 12-bit scanners store this range.
        np.clip(hu, LOWEST_HU, HIGHEST_HU, out=hu)
        if self.padding_hu is not None:
            hu[:, fields.outside] = self.padding_hu


@dataclass(frozen=True)
class SliceFields:
    """Effects that depend only on the position in the slice: arrays (rows, columns)."""

    table: np.ndarray
    drift: np.ndarray
    noise_hu: np.ndarray
    outside: np.ndarray


def compute_slice_fields(scanner: Scanner, grid: Grid, body_mm: tuple[float, float]) -> SliceFields:
    """Compute table, drift, noise level and edge of the field of view in the middle slice."""
    middle = np.empty((*grid.shape[1:], 3))
    middle[..., 0] = (grid.shape[0] - 1) / 2
    middle[..., 1], middle[..., 2] = np.meshgrid(
        *(np.arange(n) for n in grid.shape[1:]), indexing="ij"
    )
    world = grid.world_mm(middle).astype(np.float32)
    x, y = world[..., 0], world[..., 1]
    centre = middle[..., 1:] / (np.array(grid.shape[1:]) - 1) * 2 - 1
    # Noise and cupping are strongest in the middle, where most radiation is absorbed.
    depth = np.clip(1.25 - (x / body_mm[0]) ** 2 - (y / body_mm[1]) ** 2, 0, 1.25) / 1.25
    top = scanner.table_mm + np.float32(0.0009) * x * x
    bottom = scanner.table_mm - 42 + np.float32(0.0021) * x * x
    shell = np.minimum(np.abs(y - top), np.abs(y - bottom)) - 1.2
    shell = np.maximum(np.maximum(shell, y - top - 2), bottom - 2 - y)
    inside = np.clip(0.5 - np.maximum(y - top, bottom - y) / 2, 0, 1)
    edge = max(grid.spacing_mm[1], 1.0)
    table = AIR_HU + 55 * inside + 900 * np.clip(0.5 - shell / edge, 0, 1) * min(1.0, 2.4 / edge)
    drift = scanner.offset_hu + scanner.cupping_hu * (1 - 2 * depth)
    noise_hu = scanner.noise_hu * (0.45 + 0.55 * depth)
    # Slightly outside of the inscribed circle, as in real reconstructions.
    outside = (centre**2).sum(axis=-1) > 1.01
    return SliceFields(
        table.astype(np.float32), drift.astype(np.float32), noise_hu.astype(np.float32), outside
    )
