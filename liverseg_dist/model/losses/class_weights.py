"""Weights of background, liver and tumour in the cross-entropy."""

from collections.abc import Sequence

from liverseg_dist.config import LossConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import NUM_CLASSES


def frequency_weights(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """`auto`: inverse square root of each class's frequency, normalised to a mean of 1.

    w_c = C s_c / sum(s), s_c = sqrt(N / n_c). Plain inverse frequencies span three orders of magnitude on LiTS (tumour
    about 0.2 % of a slab) and flood the background with false positives; the square root keeps the ratio near 20.
    """
    total = sum(class_voxels)
    raw = [(total / max(count, 1)) ** 0.5 for count in class_voxels]
    return tuple(value * len(raw) / sum(raw) for value in raw)


def class_weights(
    config: LossConfig, class_voxels: Sequence[int] | None
) -> tuple[float, ...] | None:
    """What `loss.class_weights` means for a store with these counts; None: unweighted. Raises `UserError`."""
    if config.class_weights == "none":
        return None
    if config.class_weights == "auto":
        if class_voxels is None:
            raise UserError(
                "loss.class_weights=auto needs the store's class counts; give three numbers instead"
            )
        return frequency_weights(class_voxels)
    weights = tuple(float(weight) for weight in config.class_weights)
    if len(weights) != NUM_CLASSES:
        raise UserError(
            f"loss.class_weights has {len(weights)} numbers; background, liver and tumour need one each"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise UserError(
            f"loss.class_weights = {list(weights)}: weights are 0 or more, and one at least is not 0"
        )
    return weights
