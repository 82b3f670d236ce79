"""Signal of MR sequences, and the painting of tissues with it.

The spoiled gradient echo gives T1-weighted images, the turbo spin echo T2-weighted or
proton-density images. Signals are relative to that of water with full relaxation and no decay. The equations are
those of Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004), chapters 14.1 (spoiled
gradient echo, by Ernst and Anderson 1966) and 14.3 (spin echo).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from liverseg_dist.phantom.canvas import Tissue
from liverseg_dist.phantom.mr_tissues import T2_PRIME_MS, MrTissue

SequenceName = Literal["gre", "tse", "pd"]
FLOW_VOID = 0.15
"""Share of the signal that flowing blood keeps in a spin echo."""
GRAIN_PER_HU = 0.01
"""Relative unevenness of the MR signal for one HU of unevenness in CT."""
MAX_GRAIN = 0.15
MAX_TEXTURE = 1.0
SPOT_HU = 90.0
"""HU difference of CT spots that are spots of pure other tissue in MR."""


@dataclass(frozen=True)
class Sequence:
    """An MR sequence. Times are in milliseconds."""

    name: SequenceName
    title: str
    repetition_ms: float
    echo_ms: float
    flip_deg: float | None = None
    """Angle of the excitation pulse of a gradient echo; None: a spin echo."""

    def compute_signal(self, tissue: MrTissue) -> float:
        """Return the signal of a tissue, 0 to 1."""
        density = tissue.proton_density
        if self.flip_deg is None:
            signal = compute_spin_echo(
                density, tissue.t1_ms, tissue.t2_ms, self.repetition_ms, self.echo_ms
            )
            return signal * (FLOW_VOID if tissue.flows else 1.0)
        t2_star_ms = 1 / (1 / tissue.t2_ms + 1 / T2_PRIME_MS)
        return compute_spoiled_gradient_echo(
            density, tissue.t1_ms, t2_star_ms, self.repetition_ms, self.echo_ms, self.flip_deg
        )


SEQUENCES: dict[str, Sequence] = {
    # The echo time of the gradient echo is the one at which fat and water are in phase at 3 T.
    "gre": Sequence("gre", "MR T1 GRE", repetition_ms=160.0, echo_ms=2.3, flip_deg=75.0),
    "tse": Sequence("tse", "MR T2 TSE", repetition_ms=3500.0, echo_ms=90.0),
    "pd": Sequence("pd", "MR PD TSE", repetition_ms=3500.0, echo_ms=12.0),
}


def compute_spoiled_gradient_echo(
    proton_density: float,
    t1_ms: float,
    t2_star_ms: float,
    repetition_ms: float,
    echo_ms: float,
    flip_deg: float,
) -> float:
    """Return the steady-state signal of a spoiled gradient echo.

    It is PD sin(a) (1 - E1) / (1 - E1 cos(a)) exp(-TE / T2*) with E1 = exp(-TR / T1).
    """
    flip = np.deg2rad(flip_deg)
    recovered = np.exp(-repetition_ms / t1_ms)
    steady = np.sin(flip) * (1 - recovered) / (1 - recovered * np.cos(flip))
    return float(proton_density * steady * np.exp(-echo_ms / t2_star_ms))


def compute_spin_echo(
    proton_density: float, t1_ms: float, t2_ms: float, repetition_ms: float, echo_ms: float
) -> float:
    """Return the signal of a spin echo, and of a turbo spin echo at its effective echo time.

    It is PD (1 - 2 exp(-(TR - TE / 2) / T1) + exp(-TR / T1)) exp(-TE / T2).
    """
    refocused = np.exp(-(repetition_ms - echo_ms / 2) / t1_ms)
    recovered = 1 - 2 * refocused + np.exp(-repetition_ms / t1_ms)
    return float(proton_density * recovered * np.exp(-echo_ms / t2_ms))


@dataclass(frozen=True)
class MrRenderer:
    """Turns tissues into the signal of one sequence in one patient."""

    signals: Mapping[str, float]
    """Signal of each tissue."""
    spots: Mapping[str, str]
    """Tissue of the spots in each tissue; empty: no spots."""

    @classmethod
    def for_patient(cls, sequence: Sequence, tissues: Mapping[str, MrTissue]) -> "MrRenderer":
        """Compute the signals of the tissues of one patient."""
        signals = {name: sequence.compute_signal(tissue) for name, tissue in tissues.items()}
        return cls(signals, {name: tissue.spot for name, tissue in tissues.items()})

    def render_tissue(self, tissue: Tissue, texture: np.ndarray) -> np.ndarray | np.float32:
        """Return the signal of a tissue for values of the texture field."""
        signal = self.signals[tissue.kind]
        spot = self.spots[tissue.kind] if tissue.spot else ""
        if not tissue.grain and not spot:
            return np.float32(signal)
        grain = min(MAX_GRAIN, tissue.grain * GRAIN_PER_HU)
        # Bounded, so that no bright ring surrounds a dark spot.
        uneven = np.clip(texture, -MAX_TEXTURE, MAX_TEXTURE) if spot else texture
        value = signal * (1 + np.float32(grain) * uneven)
        if spot:
            # Spots are where they are in CT.
            share = min(1.0, abs(tissue.spot) / SPOT_HU)
            strength = np.float32(share) * tissue.compute_spot_strength(texture)
            value += strength * (np.float32(self.signals[spot]) - value)
        return np.maximum(value, 0, dtype=np.float32)
