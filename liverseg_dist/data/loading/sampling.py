"""Which patch sample n of a run is: a pure function of (seed, n).

Nothing here depends on ranks, workers or what was read before, so any world size, any number of workers and any restart
sees the same stream. Cases follow one random permutation per pass over the data. As in nnU-Net
(https://github.com/MIC-DKFZ/nnUNet, `nnUNetDataLoader`), the last `round(B * share)` samples of every global batch of B
are centred on foreground; a batch of one is centred with probability `share` instead. Unlike nnU-Net, a tumour is drawn
before the voxel, so a small tumour is seen as often as a large one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.volume import Index3

_PATCH, _ORDER, _AUGMENT = 0, 1, 2  # purposes of the random streams


@dataclass(frozen=True)
class Centre:
    """Where a patch is centred. `label` 0: anywhere."""

    label: int
    component: int
    voxel_zyx: Index3


class ForegroundIndex:
    """The stored foreground voxels of one case, ready for O(1) draws.

    `foreground` has rows (class, component, z, y, x), sorted by class, then component, as the store writes them.
    """

    def __init__(self, foreground: np.ndarray) -> None:
        self._voxels = np.ascontiguousarray(foreground[:, 2:5], dtype=np.int16)
        self._spans: dict[int, list[tuple[int, int, int]]] = {}
        if len(foreground):
            keys = foreground[:, :2]
            starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
            for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
                label, component = (int(v) for v in keys[start])
                self._spans.setdefault(label, []).append((component, int(start), int(stop)))
        self._classes = [label for label in (LIVER, TUMOUR) if label in self._spans]

    def draw(self, random: CounterRandom) -> Centre | None:
        """A class that the case has, one of its components, one of its voxels: each uniformly. None: no foreground."""
        if not self._classes:
            return None
        label = self._classes[random.draw_below(len(self._classes))]
        spans = self._spans[label]
        component, start, stop = spans[random.draw_below(len(spans))]
        z, y, x = (int(v) for v in self._voxels[start + random.draw_below(stop - start)])
        return Centre(label, component, (z, y, x))


@dataclass(frozen=True)
class SampleDraw:
    """What is decided about a sample before its case is looked at."""

    index: int
    case_id: str
    wants_foreground: bool
    random: CounterRandom
    """The rest of the sample's stream: centre and position."""


class SampleOrder:
    """Sample n -> its case, whether it is centred on foreground, its augmentation seed."""

    def __init__(
        self,
        case_ids: Sequence[str],
        seed: int,
        global_batch_size: int,
        oversample_foreground: float,
    ) -> None:
        if not case_ids:
            raise ValueError("no cases to draw from")
        self.case_ids = tuple(case_ids)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.oversample_foreground = oversample_foreground
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draw(self, index: int, attempt: int = 0) -> SampleDraw:
        """Sample `index`. `attempt` > 0 gives its replacements (other cases), should the first choice be unreadable."""
        random = CounterRandom(self.seed, index, _PATCH, attempt)
        wanted = self._wants_foreground(index % self.global_batch_size, random)
        if attempt == 0:
            epoch, place = divmod(index, len(self.case_ids))
            case = int(self._permutation(epoch)[place])
        else:
            case = random.draw_below(len(self.case_ids))
        return SampleDraw(index, self.case_ids[case], wanted, random)

    def augment_seed(self, index: int) -> int:
        """Seed of sample `index`'s augmentation, in [0, 2**63)."""
        return CounterRandom(self.seed, index, _AUGMENT).draw_uint64() >> 1

    def _wants_foreground(self, place: int, random: CounterRandom) -> bool:
        if self.global_batch_size == 1:
            return random.draw_bool(self.oversample_foreground)
        return place >= round(self.global_batch_size * (1 - self.oversample_foreground))

    def _permutation(self, epoch: int) -> np.ndarray:
        known, order = self._epoch_order
        if known != epoch:
            order = CounterRandom(self.seed, epoch, _ORDER).draw_permutation(len(self.case_ids))
            self._epoch_order = (
                epoch,
                order,
            )  # one assignment: threads may race here and still agree
        return order


def patch_start(
    random: CounterRandom,
    centre: Centre | None,
    image_shape: Index3,
    valid_slices: tuple[int, int],
    patch_size: Index3,
) -> Index3:
    """First voxel (z, y, x) of the patch: around the centre's voxel, or uniformly random.

    The patch lies inside the image (along z: inside `valid_slices`, which are not padding) wherever it fits, and is
    centred on it where it does not (then the start is negative and what sticks out is padding).
    """
    bounds = (valid_slices, (0, image_shape[1]), (0, image_shape[2]))
    start = []
    for axis, ((low, high), size) in enumerate(zip(bounds, patch_size, strict=True)):
        room = high - low - size
        if size >= image_shape[axis]:
            begin = (image_shape[axis] - size) // 2
        elif room <= 0:
            begin = min(max(low + room // 2, 0), image_shape[axis] - size)
        elif centre is None:
            begin = low + random.draw_below(room + 1)
        else:
            begin = min(max(centre.voxel_zyx[axis] - size // 2, low), high - size)
        start.append(begin)
    z, y, x = start
    return z, y, x
