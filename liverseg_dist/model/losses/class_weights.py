"""Weights of the classes in the cross-entropy."""

from collections.abc import Mapping, Sequence

from liverseg_dist.config import LossConfig
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import LITS_SCHEME, LabelScheme


def frequency_weights(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """Return the inverse square root of each class's frequency, normalised to a mean of 1.

    w_c = C s_c / sum(s), s_c = sqrt(N / n_c). Plain inverse frequencies span three orders of
    magnitude on LiTS (tumour is about 0.2 % of a slab) and cause many false positives in the
    background; with the square root the ratio is near 20.

    Args:
        class_voxels: number of voxels of each class in the store, background first.
    """
    total = sum(class_voxels)
    # At least one voxel, so that a store without a class has finite weights.
    raw = [(total / max(count, 1)) ** 0.5 for count in class_voxels]
    return tuple(value * len(raw) / sum(raw) for value in raw)


def class_weights(
    config: LossConfig, class_voxels: Sequence[int] | None, labels: LabelScheme = LITS_SCHEME
) -> tuple[float, ...] | None:
    """Return the weights that `loss.class_weights` names for a store; None: all equal.

    Args:
        config: settings `loss.*`.
        class_voxels: number of voxels of each class in the store, background first, or None.
        labels: scheme of the labels.

    Raises:
        UserError: `auto` without counts, unknown names, or numbers that are not valid weights.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "auto":
        if class_voxels is None:
            raise UserError(
                "loss.class_weights=auto needs the store's class counts; give a number for each "
                "class instead"
            )
        return frequency_weights(class_voxels)
    if isinstance(config.class_weights, Mapping):
        weights = _weights_by_name(config.class_weights, labels)
    else:
        weights = tuple(float(weight) for weight in config.class_weights)
    if len(weights) != labels.num_classes:
        raise UserError(
            f"loss.class_weights has {len(weights)} numbers; "
            f"give one each for {_list_names(labels.class_names)}"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise UserError(
            f"loss.class_weights = {list(weights)}: "
            "weights must be 0 or more, and at least one must be above 0"
        )
    return weights


def _weights_by_name(given: Mapping[str, float], labels: LabelScheme) -> tuple[float, ...]:
    """Return one weight for each class; 1 for a class that is not named."""
    names = labels.class_names
    for name in given:
        if name not in names:
            raise UserError(
                f"loss.class_weights names {printable(name)}; the classes are {_list_names(names)}"
            )
    return tuple(float(given.get(name, 1.0)) for name in names)


def _list_names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
