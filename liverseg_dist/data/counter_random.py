"""Random numbers as a pure function of (key, counter): Philox, the counter-based generator of Salmon et al. (SC 2011,
https://doi.org/10.1145/2063384.2063405).

Nothing is carried from one draw to the next sample, so a stream can be entered at any place by any process. Only
numpy's raw 64-bit output is used: numpy keeps that stable for ever, unlike the distributions of `np.random.Generator`.
"""

import math

import numpy as np

_DOUBLE_STEP = 2.0**-53


class CounterRandom:
    """Draws number 0, 1, 2, ... of the stream named by `seed`, `index` and `purpose` (all >= 0, < 2**64)."""

    def __init__(self, seed: int, index: int, purpose: int = 0, attempt: int = 0) -> None:
        key = np.array([seed, index], dtype=np.uint64)
        self._bits = np.random.Philox(
            key=key, counter=np.array([0, attempt, purpose, 0], dtype=np.uint64)
        )
        self._ready: list[int] = []

    def raw(self) -> int:
        """An integer in [0, 2**64)."""
        if not self._ready:
            self._ready = self._bits.random_raw(16).tolist()[::-1]
        return self._ready.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self.raw() >> 11) * _DOUBLE_STEP)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def below(self, count: int) -> int:
        """An integer in [0, count). The bias of the multiplication is below count / 2**64."""
        return (self.raw() * count) >> 64

    def normal(self) -> float:
        """Standard normal (Box-Muller)."""
        return math.sqrt(-2.0 * math.log(1.0 - self.uniform())) * math.cos(
            2.0 * math.pi * self.uniform()
        )

    def permutation(self, count: int) -> np.ndarray:
        """A random order of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")
