"""Choose the post-processing that helps a run, by cross-validation on cases it was not trained on.

Each case is predicted once. What labels depend on is stored as a small number per voxel of the
foreground box (`label_codes`), so any setting can be evaluated without the network. The operations
of `postprocess_operations` are examined one after another, in the order of their application, each
on top of those that were kept.

Cross-validation: the cases are divided into `FOLDS`. For each fold, the setting of an operation is
chosen on the other folds and scored on this one. An operation is kept if the mean score over all
cases exceeds the score without it by more than `MIN_GAIN`, and if at least as many cases improve as
get worse (so that one unusual case cannot decide). Its final setting is the best one on all cases.
The score of a case is the mean Dice of its annotated structures on the scan's own voxels. A
structure that is absent from both masks counts as 1, so a false lesion in a healthy organ costs as
much as a missed lesion.

nnU-Net chooses the largest component in a similar way, but evaluates it on the same cases
(https://doi.org/10.1038/s41592-020-01008-z). Used by `liverseg postprocess`.
"""

import io
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import RunFailed
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.evaluation.metrics.overlap import OverlapCounts
from liverseg_dist.files import write_bytes
from liverseg_dist.inference.case_inputs import CaseInputs, Piece, assemble_case
from liverseg_dist.inference.label_codes import LabelCodes
from liverseg_dist.inference.postprocess import find_foreground_box, postprocess_mask
from liverseg_dist.inference.postprocess_operations import build_config, list_operations
from liverseg_dist.inference.scan_checks import findings_to_json, is_refused
from liverseg_dist.inference.segment_scan import resample_probabilities
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.structure_settings import resolve_structure_settings
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.labels import IGNORE, LabelScheme
from liverseg_dist.volume import Volume

FOLDS = 5
# A smaller gain is within what rounding and a single voxel can cause.
MIN_GAIN = 1e-4
MIN_CASES = 3
# Sums of the same numbers can differ in the last bits.
EQUAL_SCORES = 1e-12
"""Scores that differ by no more than this are equal: only rounding differs."""

Scores = dict[str, list[float]]
"""Per case, the score of each option of an operation."""


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

    @property
    def labels(self) -> LabelScheme:
        """Class values and structures of the masks."""
        return self.predictor.outputs.labels

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
            # A scan that was accepted with --force must be asked for again.
            is_usable = known is not None and (self.inputs.force or not known.get("forced"))
            if is_usable and self._get_file(case_id).is_file():
                return True
            pieces = self.inputs.read_pieces(case_id)
            encode_piece = self._make_encoder(truth, findings)
            dtype = LabelCodes(self.predictor.outputs).dtype
            codes, _ = assemble_case(
                pieces, truth.grid, encode_piece, with_image=False, dtype=dtype
            )
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
            operation: a name of `list_operations`.
            chosen: options of the operations that are kept already.
        """
        with np.load(self._get_file(case_id), allow_pickle=False) as stored:
            codes, truth = stored["codes"], stored["truth"]
            annotated = set(stored["annotated"].tolist())
            spacing_mm = tuple(stored["spacing_mm"].tolist())
        scores = []
        for option in list_operations(self.labels)[operation].options:
            config = build_config(self.labels, {**chosen, operation: option})
            thresholds = resolve_structure_settings(config, self.labels).lesion_threshold
            mask = LabelCodes(self.predictor.outputs).decode(codes, thresholds)
            postprocess_mask(mask, spacing_mm, config, self.labels)
            scores.append(compute_mean_dice(mask, truth, self.labels, annotated))
        return scores

    def _make_encoder(
        self, truth: Volume, findings: list[Finding]
    ) -> Callable[[Piece], np.ndarray]:
        """Make a function that encodes a piece on the truth's grid and collects its findings."""

        encoder = LabelCodes(self.predictor.outputs)

        def encode_piece(piece: Piece) -> np.ndarray:
            findings.extend(piece.findings)
            codes = np.zeros(truth.shape, dtype=encoder.dtype)
            # A view on `codes`: what is written in the scan's orientation lies on the truth's grid.
            view = Volume(codes, truth.grid).reoriented(piece.image.grid.orientation).voxels
            for box, values_FDHW in resample_probabilities(piece.image, truth.grid, self.predictor):
                view[box] = encoder.encode(values_FDHW)
            return codes

        return encode_piece

    def _write_codes(self, case_id: str, codes: np.ndarray, truth: Volume) -> None:
        # Unknown voxels are not scored, so they need not be stored.
        is_foreground = (truth.voxels > 0) & (truth.voxels != IGNORE)
        box = find_foreground_box((codes > 0) | is_foreground)
        # One voxel represents a case without any foreground.
        cut = box if box is not None else (slice(0, 1),) * 3
        content = io.BytesIO()
        np.savez_compressed(
            content,
            codes=codes[cut],
            truth=truth.voxels[cut],
            spacing_mm=truth.spacing_mm,
            annotated=np.array(self.inputs.read_annotated(case_id), dtype=str),
        )
        # Written as a whole or not at all: a truncated archive would be read as a damaged case
        # later.
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._get_file(case_id), content.getvalue())

    def _get_file(self, case_id: str) -> Path:
        return self.folder / f"{encode_file_name(case_id)}.npz"


@dataclass(frozen=True)
class Decision:
    """The result for one operation.

    Attributes:
        operation: a name of `list_operations`.
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


def decide_operation(
    operation: str, options: tuple[Any, ...], scores: Scores, folds: int = FOLDS
) -> Decision:
    """Decide by cross-validation over the cases whether an operation helps.

    Args:
        operation: a name of `list_operations`.
        options: its options; the first one changes nothing.
        scores: for each case, one score per option.
        folds: number of folds; at most one per case.
    """
    table = np.array([scores[case_id] for case_id in sorted(scores)])
    before = table[:, 0]
    # Every case is scored exactly once, by options that were chosen without it.
    held_out = np.zeros(len(table))
    # With fewer cases than folds, each case is a fold of its own.
    folds = min(folds, len(table))
    for fold in range(folds):
        # Rows are sorted by case id, so the folds do not depend on the order of the input.
        in_fold = np.arange(len(table)) % folds == fold
        held_out[in_fold] = table[in_fold, _find_best_option(table[~in_fold])]
    # Options are chosen on the other folds, so the score has no selection bias.
    score_before, score_cross_validated = _compute_mean(before), _compute_mean(held_out)
    best = _find_best_option(table)
    better = int((held_out - before > EQUAL_SCORES).sum())
    worse = int((before - held_out > EQUAL_SCORES).sum())
    is_gain = score_cross_validated > score_before + MIN_GAIN
    return Decision(
        operation,
        options[best],
        # The first option changes nothing; keeping it would only add a line to the file.
        best > 0 and is_gain and better >= worse,
        score_before,
        score_cross_validated,
        better,
        worse,
        tuple(_compute_mean(column) for column in table.T),
    )


def compute_mean_dice(
    mask: np.ndarray,
    truth: np.ndarray,
    labels: LabelScheme,
    annotated: Collection[str] | None = None,
) -> float:
    """Mean Dice of the structures, without unknown voxels.

    A structure that is absent from both masks counts as 1.

    Args:
        mask: predicted class values.
        truth: true class values.
        labels: the structures.
        annotated: names of the structures to score; None: all.
    """
    is_known = truth != (IGNORE if labels.ignore is None else labels.ignore)
    total, count = 0.0, 0
    for structure in labels.structures:
        if annotated is not None and structure.name not in annotated:
            continue
        predicted = labels.mask_of(mask, structure) & is_known
        expected = labels.mask_of(truth, structure) & is_known
        overlap = OverlapCounts(
            prediction=int(predicted.sum()),
            truth=int(expected.sum()),
            intersection=int((predicted & expected).sum()),
        )
        total += overlap.dice()
        count += 1
    return total / count if count else 1.0


def _compute_mean(values: np.ndarray) -> float:
    """Exactly rounded sum: the mean does not depend on the order of the cases."""
    return math.fsum(values) / len(values)


def _find_best_option(table: np.ndarray) -> int:
    """Option with the highest sum over cases; of equals the first, which changes least."""
    sums = np.array([math.fsum(column) for column in table.T])
    return int(np.argmax(sums > sums.max() - EQUAL_SCORES))
