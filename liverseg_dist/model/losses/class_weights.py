"""Weights of background, liver and tumour in the cross-entropy."""

from collections.abc import Sequence

from liverseg_dist.config import LossConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import NUM_CLASSES


def frequency_weights(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """Return the inverse square root of each class's frequency, normalised to a mean of 1.

    w_c = C s_c / sum(s), s_c = sqrt(N / n_c). Plain inverse frequencies span three orders of
    magnitude on LiTS (tumour is about 0.2 % of a slab) and cause many false positives in the
    background; with the square root the ratio is near 20.

    Args:
        class_voxels: number of voxels of background, liver and tumour in the store.
    """
    total = sum(class_voxels)
    # At least one voxel, so that a store without tumours has finite weights.
    raw = [(total / max(count, 1)) ** 0.5 for count in class_voxels]
    return tuple(value * len(raw) / sum(raw) for value in raw)


def class_weights(
    config: LossConfig, class_voxels: Sequence[int] | None
) -> tuple[float, ...] | None:
    """Return the weights that `loss.class_weights` names for a store; None: all equal.

    Args:
        config: settings `loss.*`.
        class_voxels: number of voxels of background, liver and tumour in the store, or None.

    Raises:
        UserError: `auto` without counts, or numbers that are not valid weights.
    """
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
            f"loss.class_weights has {len(weights)} numbers; "
            "give one each for background, liver and tumour"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise UserError(
            f"loss.class_weights = {list(weights)}: "
            "weights must be 0 or more, and at least one must be above 0"
        )
    return weights
