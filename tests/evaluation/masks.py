"""Made-up masks: smooth blobs, as a scan would have them, that may touch the faces of the box."""

import os
import signal

import numpy as np
from scipy import ndimage

from liverseg_dist.volume import Float3

SHAPE = (20, 26, 23)
SPACINGS: tuple[Float3, ...] = ((1.0, 1.0, 1.0), (2.5, 0.7, 0.9), (0.6, 1.3, 3.1))


def blobs(seed: int, share: float = 0.25) -> np.ndarray:
    """A boolean mask that fills `share` of the box."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2.0)
    return noise > np.quantile(noise, 1 - share)


def labels(seed: int) -> np.ndarray:
    """Labels 0, 1, 2 (uint8): a blobby liver with blobby tumours inside."""
    liver = blobs(seed, 0.4)
    return liver.astype(np.uint8) + (liver & blobs(seed + 1000, 0.15))


def dying_reader(path: object) -> None:
    """A mask reader whose process is killed, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
