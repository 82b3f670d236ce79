"""Validation during training: Dice of complete slabs by sliding-window inference.

Each case is segmented by one rank. The ranks exchange voxel counts, so the result does not depend
on the number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.augment import build_preset
from liverseg_dist.data.loading import select_intensities
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.collectives import current_rank, gather_from_ranks, world_size
from liverseg_dist.evaluation.metrics.overlap import OverlapCounts, pool_dice
from liverseg_dist.evaluation.report.overlays import draw_overlay
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.labels import BACKGROUND, IGNORE, LabelScheme, Structure
from liverseg_dist.model import OutputChannels, build_model

LESION_PRIORITY = 1000
"""Voxels of other foreground that count as much as a voxel of a lesion in the choice of a slice."""


@dataclass(frozen=True)
class ValidationResult:
    """Scores of a validation; NaN for a structure that no case has in truth or prediction."""

    dice: dict[str, float]
    """Structure -> mean Dice over the cases in which the structure is annotated, and which have it
    in truth or prediction."""
    dice_global: dict[str, float]
    """Structure -> Dice of the voxel counts summed over the cases in which it is annotated."""
    score: float
    """Mean of `dice` over the structures."""
    cases: int
    pictures: dict[str, np.ndarray]
    """Case -> RGB picture (y, x, 3) of the slice with most lesion."""


Counts = dict[str, OverlapCounts]
"""Voxel counts by structure, of the annotated structures of a case."""


def validate_cases(
    settings: Settings,
    store: CaseStore,
    case_ids: Sequence[str],
    weights: dict[str, torch.Tensor],
    device: torch.device,
    stop_is_requested: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Compute the Dice of `weights` on the slabs of `case_ids`. A collective call.

    Args:
        stop_is_requested: read before each case; the ranks need not agree.

    Returns:
        The scores; None on all ranks if a rank stopped before its last case.
    """
    limit = settings.validation.max_cases or len(case_ids)
    chosen = sorted(case_ids)[:limit]
    model = build_model(settings.model).to(device)
    model.load_state_dict(weights)
    model.eval()
    data, axes = settings.data, build_preset(settings.data).mirror.axes
    labels = data.label_scheme
    outputs = OutputChannels(labels, settings.model.regions)
    predictor = SlidingWindowPredictor(
        model, data.patch_size, outputs, settings.inference, device, mirror_axes=axes
    )
    counts: dict[str, Counts] = {}
    pictures: dict[str, np.ndarray] = {}
    is_complete = True
    for number in range(current_rank(), len(chosen), world_size()):
        if stop_is_requested():
            is_complete = False
            break
        case_id = chosen[number]
        meta = store.meta(case_id)
        image_CDHW, truth = store.image(case_id), store.label(case_id)
        intensities = select_intensities(data, meta.intensities)
        predicted = predictor.predict_labels(image_CDHW, intensities, meta.present)
        counts[case_id] = {}
        for name in meta.annotated:
            structure = labels.structure(name)
            counts[case_id][name] = _count_overlap(predicted, truth, labels, structure)
        if number < settings.validation.pictures:
            first = meta.present.index(True)
            is_ct = data.image_channels[first].modality == "CT"
            pictures[case_id] = _draw_picture(image_CDHW[first], truth, predicted, labels, is_ct)
    if not all(gather_from_ranks(is_complete)):
        return None
    return _pool_counts(
        gather_from_ranks(counts), gather_from_ranks(pictures), labels.structure_names
    )


def _count_overlap(
    predicted: np.ndarray, truth: np.ndarray, labels: LabelScheme, structure: Structure
) -> OverlapCounts:
    """Voxel counts of one structure; voxels that the truth marks as padding are left out."""
    valid = truth != IGNORE
    predicted_mask = labels.mask_of(predicted, structure) & valid
    true_mask = labels.mask_of(truth, structure)
    return OverlapCounts(
        prediction=int(predicted_mask.sum()),
        truth=int(true_mask.sum()),
        intersection=int((predicted_mask & true_mask).sum()),
    )


def _draw_picture(
    image: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    labels: LabelScheme,
    is_ct: bool,
) -> np.ndarray:
    """Draw the slice with most lesion, or else with most foreground."""
    known = np.where(truth == IGNORE, BACKGROUND, truth)
    weight = (known != BACKGROUND).sum(axis=(1, 2))
    is_lesion = np.zeros(known.shape, dtype=bool)
    for lesion in labels.lesions:
        is_lesion |= labels.mask_of(known, lesion)
    z = int((is_lesion.sum(axis=(1, 2)) * LESION_PRIORITY + weight).argmax())
    return draw_overlay(image[z], known[z], predicted[z], labels, is_ct=is_ct)


def _pool_counts(
    counts: list[dict[str, Counts]],
    pictures: list[dict[str, np.ndarray]],
    structures: Sequence[str],
) -> ValidationResult:
    cases = {case_id: value for part in counts for case_id, value in part.items()}
    per_case: dict[str, float] = {}
    pooled: dict[str, float] = {}
    for name in structures:
        rows = [cases[case_id][name] for case_id in sorted(cases) if name in cases[case_id]]
        # Same Dice as in evaluation, but a case without the structure in both masks is left out: it
        # would count as 1 and hide how the lesions of the few validation cases are segmented.
        scores = [counts.dice() for counts in rows if not counts.is_empty]
        per_case[name] = float(np.mean(scores)) if scores else float("nan")
        dice = pool_dice(rows)
        pooled[name] = float("nan") if dice is None else dice
    defined = [value for value in per_case.values() if value == value]
    score = float(np.mean(defined)) if defined else float("nan")
    return ValidationResult(
        per_case,
        pooled,
        score,
        len(cases),
        {k: v for part in pictures for k, v in sorted(part.items())},
    )
