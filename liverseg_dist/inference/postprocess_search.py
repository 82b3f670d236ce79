"""Which post-processing helps this run? Chosen on cases it was not trained on, kept only if it helps cross-validated.

Each case is predicted once. What its probabilities say is kept as one byte a voxel of the box that matters (the most
likely class, whether the liver is likelier than not, how many of `THRESHOLDS` the tumour reaches), so that any setting
can be tried without the network. The operations are then looked at one after the other, each on top of what was kept
before, in the order in which they are applied.

Cross-validation: the cases are divided into `FOLDS`; for each fold an operation's setting is chosen on the others and
scored on the fold. The operation is kept if the mean score over all cases, so obtained, is above that without it by
more than `LEAST_GAIN` and no more cases got worse than better (so one odd case cannot decide); its final setting is
then the best on all cases. The score of a case is the mean Dice of liver
and tumour on the scan's own voxels, where a structure absent from both masks counts as 1: so a false tumour in a
healthy liver costs as much as a missed one.

nnU-Net chooses the largest component in the same spirit, but judges it on the cases that it was chosen on
(https://doi.org/10.1038/s41592-020-01008-z).
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
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.errors import RunFailed
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.evaluation.metrics.overlap import count_confusion, count_structures
from liverseg_dist.files import write_bytes, write_text
from liverseg_dist.inference.case_inputs import CaseInputs, Piece, assemble_case
from liverseg_dist.inference.postprocess import foreground_box, postprocess_mask
from liverseg_dist.inference.scan_checks import is_refused, to_json
from liverseg_dist.inference.segment_scan import restore_probabilities
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor, organ_probability
from liverseg_dist.inference.work_division import failure_line
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
"""Settings of `inference.*` that are tried, in the order of their application; the first of each does nothing."""
FOLDS = 5
LEAST_GAIN = 1e-4
LEAST_CASES = 3
NOTHING = InferenceConfig(**{name: options[0] for name, options in OPERATIONS.items()})


def postprocessing_settings(config: InferenceConfig) -> dict[str, Any] | None:
    """The operations of post-processing that are on, with their settings; None where masks stay as predicted."""
    used = {name: getattr(config, name) for name in OPERATIONS}
    return {name: value for name, value in used.items() if value != getattr(NOTHING, name)} or None


Scores = dict[str, list[float]]
"""Per case the score of each option of an operation."""


@dataclass(frozen=True)
class PostprocessSearch:
    """All it takes to prepare the cases and to try settings on them."""

    inputs: CaseInputs
    predictor: SlidingWindowPredictor
    ledger: Ledger
    folder: Path

    def prepare_case(self, case_id: str) -> bool:
        """Predict a case and keep what its probabilities say; True if that was there already. Raises `RunFailed`."""
        try:
            truth = self.inputs.truth(case_id)
            known_by = self.inputs.fingerprint(case_id, truth)
            known = self.ledger.read(case_id, known_by)
            usable = known is not None and (self.inputs.force or not known.get("forced"))
            if usable and self._file(case_id).is_file():
                return True
            findings: list[Finding] = []
            codes_of = self._codes_onto(truth, findings)
            codes, _ = assemble_case(
                self.inputs.pieces(case_id), truth.grid, codes_of, with_image=False
            )
            box = foreground_box((codes > 0) | ((truth.voxels > 0) & (truth.voxels != IGNORE)))
            cut = box if box is not None else (slice(0, 1),) * 3
            content = io.BytesIO()
            np.savez_compressed(
                content, codes=codes[cut], truth=truth.voxels[cut], spacing_mm=truth.spacing_mm
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self._file(case_id), content.getvalue())
        except Exception as error:  # whatever a case does to us, the others go on
            raise RunFailed(failure_line(case_id, error)) from error
        record = {
            "case_id": case_id,
            "scan_findings": to_json(findings),
            "forced": is_refused(findings),
        }
        self.ledger.write(case_id, record, known_by)
        return False

    def try_options(self, case_id: str, operation: str, chosen: Mapping[str, Any]) -> list[float]:
        """Score of a prepared case for each option of an operation, on top of what is chosen already."""
        with np.load(self._file(case_id), allow_pickle=False) as kept:
            codes, truth, spacing_mm = (
                kept["codes"],
                kept["truth"],
                tuple(kept["spacing_mm"].tolist()),
            )
        scores = []
        for option in OPERATIONS[operation]:
            config = NOTHING.model_copy(update={**chosen, operation: option})
            mask = mask_of_codes(codes, config.tumour_threshold)
            postprocess_mask(mask, spacing_mm, config)
            scores.append(mean_dice(mask, truth))
        return scores

    def _codes_onto(self, truth: Volume, findings: list[Finding]) -> Callable[[Piece], np.ndarray]:
        def codes_of(piece: Piece) -> np.ndarray:
            findings.extend(piece.findings)
            codes = np.zeros(truth.shape, dtype=np.uint8)
            view = Volume(codes, truth.grid).reoriented(piece.image.grid.orientation).voxels
            for box, values in restore_probabilities(
                piece.image, truth.grid, self.predictor, self.inputs.settings
            ):
                view[box] = codes_of_probabilities(self.predictor, values)
            return codes

        return codes_of

    def _file(self, case_id: str) -> Path:
        return self.folder / f"{encode_file_name(case_id)}.npz"


@dataclass(frozen=True)
class Decision:
    """What became of one operation."""

    operation: str
    option: Any
    """The best on all cases."""
    kept: bool
    score_before: float
    score_cross_validated: float
    better: int
    """Cases whose score it raised, cross-validated, and ..."""
    worse: int
    """... lowered."""
    scores: tuple[float, ...]
    """Mean over all cases for each option."""


def decide_operation(operation: str, scores: Scores, folds: int = FOLDS) -> Decision:
    """Whether an operation helps, by cross-validation over the cases (`scores`: as many as options for each case)."""
    case_ids = sorted(scores)
    table = np.array([scores[case_id] for case_id in case_ids])
    held_out = np.zeros(len(case_ids))
    folds = min(folds, len(case_ids))
    for fold in range(folds):
        inside = np.arange(len(case_ids)) % folds == fold
        held_out[inside] = table[inside, _best(table[~inside])]
    before, crossed = (math.fsum(column) / len(case_ids) for column in (table[:, 0], held_out))
    best = _best(table)
    better, worse = (int((sign * (held_out - table[:, 0]) > 1e-12).sum()) for sign in (1, -1))
    kept = best > 0 and crossed > before + LEAST_GAIN and better >= worse
    means = tuple(math.fsum(column) / len(case_ids) for column in table.T)
    return Decision(
        operation, OPERATIONS[operation][best], kept, before, crossed, better, worse, means
    )


def write_choice(file: Path, chosen: Mapping[str, Any], told: str) -> None:
    """Save the choice with the run: a YAML of differences that `load_run` lays over `config.yaml`."""
    settings = {
        "inference": {**{name: options[0] for name, options in OPERATIONS.items()}, **chosen}
    }
    comment = "".join(f"# {line}\n" for line in told.splitlines())
    write_text(file, comment + yaml.safe_dump(settings, sort_keys=False))


def codes_of_probabilities(
    predictor: SlidingWindowPredictor, foreground_FDHW: Tensor
) -> np.ndarray:
    """One byte a voxel: bits 0, 1 the label without a threshold; bit 2 liver (with tumours) at least 0.5; bits 3 to 7
    the number of `THRESHOLDS` that the tumour reaches."""
    organ = (organ_probability(foreground_FDHW, predictor.regions) >= 0.5).cpu().numpy()
    tumour = foreground_FDHW[1].cpu().numpy()
    levels = np.zeros(organ.shape, dtype=np.uint8)
    for threshold in THRESHOLDS:
        levels += tumour >= np.float32(threshold)
    return (
        predictor.labels(foreground_FDHW)
        | (organ.view(np.uint8) << 2)
        | np.where(organ, levels << 3, 0)
    )


def mask_of_codes(codes: np.ndarray, tumour_threshold: float) -> np.ndarray:
    """The labels (uint8) that the predictor gives with this threshold (0, or one of `THRESHOLDS`)."""
    if tumour_threshold == 0:
        return codes & np.uint8(3)
    mask = (codes >> 2) & np.uint8(1)
    mask[(codes >> 3) > THRESHOLDS.index(tumour_threshold)] = TUMOUR
    return mask


def mean_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the Dice of liver (with tumours) and tumour."""
    known = truth != IGNORE
    counts = count_structures(count_confusion(np.where(known, mask, 0), np.where(known, truth, 0)))
    return (counts["liver"].dice() + counts["tumour"].dice()) / 2


def _best(table: np.ndarray) -> int:
    """Option with the highest mean over cases; of equals the first, which does least."""
    means = np.array([math.fsum(column) for column in table.T])
    return int(np.argmax(means > means.max() - 1e-12))
