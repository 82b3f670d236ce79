"""Choose the post-processing that helps a run, by cross-validation on cases it was not trained on.

Each case is predicted once. The probabilities are stored as one byte per voxel of the foreground
box (`encode_probabilities`), so any setting can be evaluated without the network. The operations
are examined one after another, in the order of their application, each on top of those that were
kept.

Cross-validation: the cases are divided into `FOLDS`. For each fold, the setting of an operation is
chosen on the other folds and scored on this one. An operation is kept if the mean score over all
cases exceeds the score without it by more than `MIN_GAIN`, and if at least as many cases improve as
get worse (so that one unusual case cannot decide). Its final setting is the best one on all cases.
The score of a case is the mean Dice of liver and tumour on the scan's own voxels. A structure that
is absent from both masks counts as 1, so a false tumour in a healthy liver costs as much as a
missed tumour.

nnU-Net chooses the largest component in a similar way, but evaluates it on the same cases
(https://doi.org/10.1038/s41592-020-01008-z). Used by `liverseg postprocess`.
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from liverseg_dist.config import InferenceConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import RunFailed
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.evaluation.metrics.overlap import count_confusion, count_structures
from liverseg_dist.files import write_bytes, write_text
from liverseg_dist.inference.case_inputs import CaseInputs, Piece, assemble_case
from liverseg_dist.inference.postprocess import find_foreground_box, postprocess_mask
from liverseg_dist.inference.scan_checks import findings_to_json, is_refused
from liverseg_dist.inference.segment_scan import resample_probabilities
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor, sum_organ_probability
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.labels import IGNORE, TUMOUR
from liverseg_dist.volume import Volume

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
OPERATIONS: Mapping[str, tuple[Any, ...]] = {
    "tumour_threshold": (0.0, *THRESHOLDS),
    "largest_component": (False, True),
    "fill_holes": (False, True),
    "tumour_reach_mm": (None, 0.0, 5.0, 10.0, 20.0),
    "tumour_cut_mm": (None, 0.0, 5.0, 10.0, 20.0),
    "min_tumour_ml": (0.0, 0.03, 0.1, 0.3, 1.0),
}
"""Candidate settings of `inference.*`, in the order of application; the first of each does nothing.

All but the threshold are steps of `postprocess.STEPS`.
"""
FOLDS = 5
MIN_GAIN = 1e-4
MIN_CASES = 3
EQUAL_SCORES = 1e-12
"""Scores that differ by no more than this are equal: only rounding differs."""
NO_POSTPROCESSING = InferenceConfig(**{name: options[0] for name, options in OPERATIONS.items()})

Scores = dict[str, list[float]]
"""Per case, the score of each option of an operation."""

# One byte per voxel: see `encode_probabilities`.
LABEL_BITS = 3
ORGAN_BIT = 2
LEVEL_BIT = 3


def select_active_operations(config: InferenceConfig) -> dict[str, Any] | None:
    """The operations that change masks, with their settings; None if there are none."""
    active = {}
    for name in OPERATIONS:
        value = getattr(config, name)
        if value != getattr(NO_POSTPROCESSING, name):
            active[name] = value
    return active or None


@dataclass(frozen=True)
class PostprocessSearch:
    """Prepares cases, and scores settings on them.

    Attributes:
        inputs: the cases.
        predictor: the run's predictor.
        ledger: record of the prepared cases.
        folder: folder for the encoded probabilities.
    """

    inputs: CaseInputs
    predictor: SlidingWindowPredictor
    ledger: Ledger
    folder: Path

    def prepare_case(self, case_id: str) -> bool:
        """Predict a case and store its encoded probabilities.

        Returns:
            True if they were stored already.

        Raises:
            RunFailed: the case failed.
        """
        findings: list[Finding] = []
        try:
            truth = self.inputs.read_truth(case_id)
            fingerprint = self.inputs.compute_fingerprint(case_id, truth)
            known = self.ledger.read(case_id, fingerprint)
            is_usable = known is not None and (self.inputs.force or not known.get("forced"))
            if is_usable and self._get_file(case_id).is_file():
                return True
            pieces = self.inputs.read_pieces(case_id)
            encode_piece = self._make_encoder(truth, findings)
            codes, _ = assemble_case(pieces, truth.grid, encode_piece, with_image=False)
            self._write_codes(case_id, codes, truth)
        # A case can fail for many reasons (damaged file, memory); the others must continue.
        except Exception as error:
            raise RunFailed(format_failure(case_id, error)) from error
        record = {
            "case_id": case_id,
            "scan_findings": findings_to_json(findings),
            "forced": is_refused(findings),
        }
        self.ledger.write(case_id, record, fingerprint)
        return False

    def try_options(self, case_id: str, operation: str, chosen: Mapping[str, Any]) -> list[float]:
        """Score of a prepared case for each option of an operation.

        Args:
            case_id: the case.
            operation: a key of `OPERATIONS`.
            chosen: settings of the operations that are kept already.
        """
        with np.load(self._get_file(case_id), allow_pickle=False) as stored:
            codes, truth = stored["codes"], stored["truth"]
            spacing_mm = tuple(stored["spacing_mm"].tolist())
        scores = []
        for option in OPERATIONS[operation]:
            config = NO_POSTPROCESSING.model_copy(update={**chosen, operation: option})
            mask = decode_mask(codes, config.tumour_threshold)
            postprocess_mask(mask, spacing_mm, config)
            scores.append(compute_mean_dice(mask, truth))
        return scores

    def _make_encoder(
        self, truth: Volume, findings: list[Finding]
    ) -> Callable[[Piece], np.ndarray]:
        """Make a function that encodes a piece on the truth's grid and collects its findings."""

        def encode_piece(piece: Piece) -> np.ndarray:
            findings.extend(piece.findings)
            codes = np.zeros(truth.shape, dtype=np.uint8)
            view = Volume(codes, truth.grid).reoriented(piece.image.grid.orientation).voxels
            boxes = resample_probabilities(
                piece.image, truth.grid, self.predictor, self.inputs.settings
            )
            for box, values_FDHW in boxes:
                view[box] = encode_probabilities(self.predictor, values_FDHW)
            return codes

        return encode_piece

    def _write_codes(self, case_id: str, codes: np.ndarray, truth: Volume) -> None:
        is_foreground = (truth.voxels > 0) & (truth.voxels != IGNORE)
        box = find_foreground_box((codes > 0) | is_foreground)
        # One voxel represents a case without any foreground.
        cut = box if box is not None else (slice(0, 1),) * 3
        content = io.BytesIO()
        np.savez_compressed(
            content, codes=codes[cut], truth=truth.voxels[cut], spacing_mm=truth.spacing_mm
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._get_file(case_id), content.getvalue())

    def _get_file(self, case_id: str) -> Path:
        return self.folder / f"{encode_file_name(case_id)}.npz"


@dataclass(frozen=True)
class Decision:
    """The result for one operation.

    Attributes:
        operation: a key of `OPERATIONS`.
        option: the best option on all cases.
        kept: whether the operation is kept.
        score_before: mean score without the operation.
        score_cross_validated: mean score with it, cross-validated.
        better: cases with a higher cross-validated score than before.
        worse: cases with a lower one.
        scores: mean score over all cases for each option.
    """

    operation: str
    option: Any
    kept: bool
    score_before: float
    score_cross_validated: float
    better: int
    worse: int
    scores: tuple[float, ...]


def decide_operation(operation: str, scores: Scores, folds: int = FOLDS) -> Decision:
    """Decide by cross-validation over the cases whether an operation helps.

    Args:
        operation: a key of `OPERATIONS`.
        scores: for each case, one score per option.
        folds: number of folds; at most one per case.
    """
    table = np.array([scores[case_id] for case_id in sorted(scores)])
    before = table[:, 0]
    held_out = np.zeros(len(table))
    folds = min(folds, len(table))
    for fold in range(folds):
        in_fold = np.arange(len(table)) % folds == fold
        held_out[in_fold] = table[in_fold, _find_best_option(table[~in_fold])]
    score_before, score_cross_validated = _compute_mean(before), _compute_mean(held_out)
    best = _find_best_option(table)
    better = int((held_out - before > EQUAL_SCORES).sum())
    worse = int((before - held_out > EQUAL_SCORES).sum())
    is_gain = score_cross_validated > score_before + MIN_GAIN
    return Decision(
        operation,
        OPERATIONS[operation][best],
        best > 0 and is_gain and better >= worse,
        score_before,
        score_cross_validated,
        better,
        worse,
        tuple(_compute_mean(column) for column in table.T),
    )


def write_choice(file: Path, chosen: Mapping[str, Any], comment: str) -> None:
    """Save the choice in the run's folder; `load_run` reads it after `config.yaml`.

    Args:
        file: the YAML file.
        chosen: settings of the operations that are kept; all others are switched off.
        comment: text for the head of the file.
    """
    operations = {name: options[0] for name, options in OPERATIONS.items()}
    settings = {"inference": {**operations, **chosen}}
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    write_text(file, head + yaml.safe_dump(settings, sort_keys=False))


def encode_probabilities(predictor: SlidingWindowPredictor, foreground_FDHW: Tensor) -> np.ndarray:
    """Everything about the probabilities that the settings depend on, in one byte per voxel.

    Bits 0 and 1: the label without a threshold. Bit 2: the liver with its tumours has a probability
    of at least 0.5. Bits 3 to 7: how many `THRESHOLDS` the tumour reaches, inside that liver.
    """
    organ_probability = sum_organ_probability(foreground_FDHW, predictor.regions)
    is_organ = (organ_probability >= 0.5).cpu().numpy()
    tumour = foreground_FDHW[1].cpu().numpy()
    levels = np.zeros(is_organ.shape, dtype=np.uint8)
    for threshold in THRESHOLDS:
        # float32, as the predictor compares: a probability on the threshold reaches it.
        levels += tumour >= np.float32(threshold)
    labels = predictor.assign_labels(foreground_FDHW)
    organ_bits = is_organ.view(np.uint8) << ORGAN_BIT
    return labels | organ_bits | np.where(is_organ, levels << LEVEL_BIT, 0)


def decode_mask(codes: np.ndarray, tumour_threshold: float) -> np.ndarray:
    """The labels (uint8) that the predictor assigns with a threshold.

    Args:
        codes: result of `encode_probabilities`.
        tumour_threshold: 0 or one of `THRESHOLDS`.
    """
    if tumour_threshold == 0:
        return codes & np.uint8(LABEL_BITS)
    mask = (codes >> ORGAN_BIT) & np.uint8(1)
    mask[(codes >> LEVEL_BIT) > THRESHOLDS.index(tumour_threshold)] = TUMOUR
    return mask


def compute_mean_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the Dice of liver (with its tumours) and of tumour, without unknown voxels.

    A structure that is absent from both counts as 1.
    """
    is_known = truth != IGNORE
    counts = count_structures(
        count_confusion(np.where(is_known, mask, 0), np.where(is_known, truth, 0))
    )
    return (counts["liver"].dice() + counts["tumour"].dice()) / 2


def _compute_mean(values: np.ndarray) -> float:
    """Exactly rounded sum: the mean does not depend on the order of the cases."""
    return math.fsum(values) / len(values)


def _find_best_option(table: np.ndarray) -> int:
    """Option with the highest sum over cases; of equals the first, which changes least."""
    sums = np.array([math.fsum(column) for column in table.T])
    return int(np.argmax(sums > sums.max() - EQUAL_SCORES))
