"""Score a run on the cases of a store; each case is one call, and its result goes into a ledger.

The mask is compared with the truth on the scan's own voxels, in mm. `case_inputs` describes the
input of the network. A call does not depend on the other processes, except where they share the
windows of one case. Used by `liverseg evaluate`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.nifti import write_mask
from liverseg_dist.errors import RankLost, RunFailed
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.evaluation.metrics.calibration import Counts
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.report.picture_files import save_pictures
from liverseg_dist.inference.calibration_counts import CalibrationCollector
from liverseg_dist.inference.case_inputs import AIR_HU, CaseInputs, Piece, assemble_case
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.scan_checks import findings_to_json, is_refused
from liverseg_dist.inference.segment_scan import segment_to_grid, stream_image
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.volume import Volume


@dataclass(frozen=True)
class SegmentedCase:
    """The predicted mask of a case, before it is scored.

    Attributes:
        mask_zyx: labels on the scan's grid.
        image: the scan's first channel on the same grid, where pictures are requested.
        is_ct: whether that channel is in HU.
        calibration: counts by structure.
        findings: findings of the scan's file.
    """

    mask_zyx: np.ndarray
    image: Volume | None
    is_ct: bool
    calibration: dict[str, Counts]
    findings: list[Finding]


@dataclass(frozen=True)
class CaseEvaluator:
    """Scores cases.

    Attributes:
        inputs: the cases.
        predictor: the run's predictor.
        ledger: record of the scores.
        masks: record of the masks, if they are requested; the masks are in the folder above it.
            They can be older than the scores.
        pictures: folder for pictures, if they are requested.
        window_scope: entered while several processes compute the windows of one case. Such a case
            is always computed, even if the ledger has it.
    """

    inputs: CaseInputs
    predictor: SlidingWindowPredictor
    ledger: Ledger
    masks: Ledger | None = None
    pictures: Path | None = None
    window_scope: Callable[[], AbstractContextManager[None]] | None = None

    def evaluate_case(self, case_id: str) -> bool:
        """Score one scan and record the result.

        Returns:
            True if the ledger had it already.

        Raises:
            RunFailed: the case failed; the ledger has the reason.
            RankLost: another rank no longer answers.
        """
        fingerprint: str | None = None
        try:
            # All ranks enter the scope, also if they find that the case cannot be read: the others
            # wait for them.
            with self.window_scope() if self.window_scope is not None else nullcontext():
                truth = self.inputs.read_truth(case_id)
                fingerprint = self.inputs.compute_fingerprint(case_id, truth)
                # A shared case is computed in any case: the other ranks have started already and
                # cannot ask the ledger.
                if self.window_scope is None and self._is_done(case_id, fingerprint):
                    return True
                result = self._segment_case(case_id, truth)
            scores = self._score_result(case_id, result, truth)
            self._write_outputs(case_id, result, truth, fingerprint)
        # A lost rank ends the whole evaluation; it is not a failure of this case.
        except RankLost:
            raise
        # A case can fail for many reasons (damaged file, memory); the others must continue.
        except Exception as error:
            message = format_failure(case_id, error)
            self.ledger.write_failure(case_id, message, fingerprint)
            raise RunFailed(message) from error
        # The entry is written last: a process that is killed before leaves a case that is simply
        # done again.
        self.ledger.write(case_id, scores, fingerprint)
        return False

    def compute_shared_windows(self, case_id: str) -> None:
        """Compute this process's windows of a case that another process scores.

        Raises:
            RunFailed: the case failed.
            RankLost: another rank no longer answers.
        """
        assert self.window_scope is not None
        try:
            with self.window_scope():
                for piece in self.inputs.read_pieces(case_id):
                    # The results go to the other process; here only the loop has to run.
                    for _ in stream_image(piece.image, self.predictor):
                        pass
        except RankLost:
            raise
        except Exception as error:
            raise RunFailed(format_failure(case_id, error)) from error

    def get_mask_file(self, case_id: str) -> Path:
        """File of a case's mask."""
        assert self.masks is not None
        return self.masks.folder.parent / f"{encode_file_name(case_id)}.nii.gz"

    def _is_done(self, case_id: str, fingerprint: str) -> bool:
        if self.masks is not None:
            if not self.get_mask_file(case_id).is_file():
                return False
            if self.masks.read(case_id, fingerprint) is None:
                return False
        # A refused scan that an earlier call scored with --force counts only if this call has the
        # option as well.
        known = self.ledger.read(case_id, fingerprint)
        return known is not None and (self.inputs.force or not known.get("forced"))

    def _segment_case(self, case_id: str, truth: Volume) -> SegmentedCase:
        calibration = CalibrationCollector(
            truth, self.predictor, self.inputs.read_annotated(case_id)
        )
        findings: list[Finding] = []
        channels = self.inputs.settings.data.image_channels
        is_ct = channels[0].is_ct

        def segment_piece(piece: Piece) -> np.ndarray:
            nonlocal is_ct
            is_ct = channels[piece.image.present.index(True)].is_ct
            findings.extend(piece.findings)
            return segment_to_grid(
                piece.image,
                truth.grid,
                self.predictor,
                # The slices of the piece are selected before the count, so that overlapping slabs
                # are not counted twice.
                on_probabilities=calibration.select_piece(
                    piece.image.grid.orientation, piece.slices
                ),
                postprocess=False,
            ).mask_zyx

        mask_zyx, image = assemble_case(
            self.inputs.read_pieces(case_id),
            truth.grid,
            segment_piece,
            with_image=self.pictures is not None,
            fill=AIR_HU if is_ct else 0,
        )
        # Once for the joined mask: the largest liver of a slab can be a small part of the scan's.
        postprocess_mask(
            mask_zyx, truth.grid.spacing_mm, self.predictor.config, self.predictor.outputs.labels
        )
        return SegmentedCase(mask_zyx, image, is_ct, calibration.collect_counts(), findings)

    def _score_result(self, case_id: str, result: SegmentedCase, truth: Volume) -> dict[str, Any]:
        scores = score_case(
            case_id,
            result.mask_zyx,
            truth.voxels,
            truth.spacing_mm,
            # Structures that were not annotated have no truth; their Dice would be that of an
            # empty mask.
            labels=self.predictor.outputs.labels,
            annotated=self.inputs.read_annotated(case_id),
        )
        scores = scores | {"calibration": result.calibration}
        if self.inputs.sources is not None:
            scores["scan_findings"] = findings_to_json(result.findings)
            scores["forced"] = is_refused(result.findings)
        return scores

    def _write_outputs(
        self, case_id: str, result: SegmentedCase, truth: Volume, fingerprint: str
    ) -> None:
        if self.masks is not None:
            # The mask is complete before it is recorded.
            # The folder of an earlier evaluation may have been moved after it was made.
            self.get_mask_file(case_id).parent.mkdir(parents=True, exist_ok=True)
            write_mask(self.get_mask_file(case_id), result.mask_zyx, truth.grid)
            self.masks.write(case_id, {"case_id": case_id}, fingerprint)
        if self.pictures is not None:
            mask = Volume(result.mask_zyx, truth.grid)
            save_pictures(
                self.pictures,
                case_id,
                mask,
                truth,
                result.image,
                self.predictor.outputs.labels,
                is_ct=result.is_ct,
            )
