"""The patch of sample n of a run: a pure function of (seed, n).

It does not depend on ranks, workers or earlier samples, so the stream is the same for any world
size, any number of workers and after any restart. Cases are in the order of one random permutation
per pass over the data. As in nnU-Net (https://github.com/MIC-DKFZ/nnUNet, `nnUNetDataLoader`), the
last `round(B * share)` samples of every global batch of B are centred on foreground; a batch of one
sample is centred with probability `share`. Unlike in nnU-Net, a tumour is drawn before the voxel,
so that small tumours are as frequent as large ones; the same holds for the lesions of any scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Index3

# Purposes of the random streams.
_PATCH, _ORDER, _AUGMENT = 0, 1, 2


@dataclass(frozen=True)
class Centre:
    """The voxel on which a patch is centred."""

    label: int
    component: int
    voxel_zyx: Index3


class ForegroundIndex:
    """The stored foreground voxels of one case, for draws in O(1).

    Args:
        foreground: rows (class, component, z, y, x), sorted by class, then component.
    """

    def __init__(self, foreground: np.ndarray) -> None:
        self._voxels = np.ascontiguousarray(foreground[:, 2:5], dtype=np.int16)
        self._spans: dict[int, list[tuple[int, int, int]]] = {}
        if len(foreground):
            keys = foreground[:, :2]
            # A new span begins where class or component changes.
            starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
            for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
                label, component = (int(v) for v in keys[start])
                self._spans.setdefault(label, []).append((component, int(start), int(stop)))
        # Ascending. A class that the case does not have, or that was not annotated, has no rows.
        self._classes = sorted(self._spans)

    @classmethod
    def from_spans(
        cls, voxels_zyx: np.ndarray, spans: Sequence[Sequence[int]]
    ) -> "ForegroundIndex":
        """Build the index from its parts, without a search for the spans.

        Args:
            voxels_zyx: int16 (n, 3), sorted by class and component.
            spans: class, component, first row and one past the last row of each span, sorted.

        Raises:
            ValueError: a span is not inside the rows.
        """
        index = cls(np.empty((0, 5), np.int16))
        index._voxels = voxels_zyx
        for label, component, start, stop in spans:
            if not 0 <= start < stop <= len(voxels_zyx):
                raise ValueError(f"a span of foreground voxels from {start} to {stop}")
            index._spans.setdefault(label, []).append((component, start, stop))
        index._classes = sorted(index._spans)
        return index

    @property
    def voxels_zyx(self) -> np.ndarray:
        """int16 (n, 3)."""
        return self._voxels

    def list_spans(self) -> list[tuple[int, int, int, int]]:
        """Class, component, first row and one past the last row of each span."""
        rows = []
        for label in self._classes:
            for component, start, stop in self._spans[label]:
                rows.append((label, component, start, stop))
        return rows

    def draw_centre(self, random: CounterRandom) -> Centre | None:
        """Draw a class of the case, one of its components and one of its voxels, each uniformly.

        Returns:
            The voxel; None: the case has no foreground.
        """
        if not self._classes:
            return None
        # Class first: otherwise a large organ, which has many more voxels, would displace lesions.
        label = self._classes[random.draw_below(len(self._classes))]
        spans = self._spans[label]
        component, start, stop = spans[random.draw_below(len(spans))]
        z, y, x = (int(v) for v in self._voxels[start + random.draw_below(stop - start)])
        return Centre(label, component, (z, y, x))


@dataclass(frozen=True)
class SampleDraw:
    """What is drawn for a sample before its case is opened."""

    index: int
    case_id: str
    wants_foreground: bool
    random: CounterRandom
    """The rest of the sample's random stream, for centre and position."""


class SampleOrder:
    """Case, centring and augmentation seed of sample n."""

    def __init__(
        self,
        case_ids: Sequence[str],
        seed: int,
        global_batch_size: int,
        oversample_foreground: float,
    ) -> None:
        if not case_ids:
            raise ValueError("case_ids is empty")
        self.case_ids = tuple(case_ids)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.oversample_foreground = oversample_foreground
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draw_sample(self, index: int, attempt: int = 0) -> SampleDraw:
        """Draw sample `index`.

        Args:
            index: number of the sample.
            attempt: above 0: replacements from other cases, if the first choice is unreadable.
        """
        random = CounterRandom(self.seed, index, _PATCH, attempt)
        wants_foreground = self._wants_foreground(index % self.global_batch_size, random)
        if attempt == 0:
            epoch, position = divmod(index, len(self.case_ids))
            case = int(self._case_permutation(epoch)[position])
        else:
            case = random.draw_below(len(self.case_ids))
        return SampleDraw(index, self.case_ids[case], wants_foreground, random)

    def augment_seed(self, index: int) -> int:
        """Return the augmentation seed of a sample, in [0, 2**63)."""
        return CounterRandom(self.seed, index, _AUGMENT).draw_uint64() >> 1

    def _wants_foreground(self, batch_position: int, random: CounterRandom) -> bool:
        if self.global_batch_size == 1:
            return random.draw_bool(self.oversample_foreground)
        return batch_position >= round(self.global_batch_size * (1 - self.oversample_foreground))

    def _case_permutation(self, epoch: int) -> np.ndarray:
        known, order = self._epoch_order
        if known != epoch:
            order = CounterRandom(self.seed, epoch, _ORDER).draw_permutation(len(self.case_ids))
            # One assignment of a pair: threads that run this at the same time get the same result.
            self._epoch_order = (epoch, order)
        return order


def patch_start(
    random: CounterRandom,
    centre: Centre | None,
    image_shape: Index3,
    valid_slices: tuple[int, int],
    patch_size: Index3,
) -> Index3:
    """Return the first voxel (z, y, x) of the patch: around the centre, or uniformly random.

    Where the patch fits, it is inside the image (along z inside `valid_slices`, which are not
    padding). Where it does not fit, it is centred on the image; the start is then negative.

    Args:
        random: the sample's random stream.
        centre: voxel on which the patch is centred; None: a random position.
        image_shape: (z, y, x) in voxels.
        valid_slices: first slice and one past the last that are not padding.
        patch_size: (z, y, x) in voxels.
    """
    bounds = (valid_slices, (0, image_shape[1]), (0, image_shape[2]))
    start = []
    for axis, ((low, high), size) in enumerate(zip(bounds, patch_size, strict=True)):
        free = high - low - size
        if size >= image_shape[axis]:
            begin = (image_shape[axis] - size) // 2
        # The valid slices are fewer than the patch's: centre on them, but stay inside the image.
        elif free <= 0:
            begin = min(max(low + free // 2, 0), image_shape[axis] - size)
        elif centre is None:
            begin = low + random.draw_below(free + 1)
        else:
            begin = min(max(centre.voxel_zyx[axis] - size // 2, low), high - size)
        start.append(begin)
    z, y, x = start
    return z, y, x
