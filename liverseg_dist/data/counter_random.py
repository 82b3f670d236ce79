"""Random numbers as a pure function of (key, counter): the counter-based generator Philox.

Source: Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405.

No state passes from one sample to the next, so any process can enter the stream at any position.
Only numpy's raw 64-bit output is used: numpy guarantees that it stays the same in all versions,
unlike the distributions of `np.random.Generator`.

Used by `data.loading.sampling` (order of samples) and `data.augment` (augmentation parameters).
"""

import math

import numpy as np

_DOUBLE_STEP = 2.0**-53
"""Distance between neighbouring doubles in [0.5, 1): 53 random bits fill [0, 1) evenly."""


class CounterRandom:
    """Numbers 0, 1, 2, ... of the random stream with the key (`seed`, `index`, `purpose`).

    Args:
        seed: seed of the run, 0 <= seed < 2**64.
        index: number of the sample, 0 <= index < 2**64.
        purpose: separates streams that serve different decisions about one sample.
        attempt: separates the streams of a sample and of its replacements.
    """

    def __init__(self, seed: int, index: int, purpose: int = 0, attempt: int = 0) -> None:
        key = np.array([seed, index], dtype=np.uint64)
        counter = np.array([0, attempt, purpose, 0], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        self._buffer: list[int] = []

    def draw_uint64(self) -> int:
        """Return an integer in [0, 2**64)."""
        if not self._buffer:
            # Reversed, because `pop` takes from the end. Blocks of 16 save calls into numpy.
            self._buffer = self._bits.random_raw(16).tolist()[::-1]
        return self._buffer.pop()

    def draw_uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a float in [low, high)."""
        return low + (high - low) * ((self.draw_uint64() >> 11) * _DOUBLE_STEP)

    def draw_bool(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.draw_uniform() < probability

    def draw_below(self, count: int) -> int:
        """Return an integer in [0, count); the bias of the multiplication is < count / 2**64."""
        return (self.draw_uint64() * count) >> 64

    def draw_normal(self) -> float:
        """Return a standard normal number (Box-Muller transform)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.draw_uniform()))
        return radius * math.cos(2.0 * math.pi * self.draw_uniform())

    def draw_permutation(self, count: int) -> np.ndarray:
        """Return a random order of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")
