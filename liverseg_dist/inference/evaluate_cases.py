"""Score a run on the cases of a store: one call a case, results in a ledger, no knowledge of who else is working.

The mask is compared with the truth on the scan's own voxels, in mm; what the network is given: see `case_inputs`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.io.nifti import write_mask
from liverseg_dist.errors import RankLost, RunFailed
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name
from liverseg_dist.evaluation.metrics.calibration import Counts
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.report.overlays import save_pictures
from liverseg_dist.inference.calibration_counts import Calibrator
from liverseg_dist.inference.case_inputs import CaseInputs, Piece, assemble_case
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.scan_checks import is_refused, to_json
from liverseg_dist.inference.segment_scan import segment_onto
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.work_division import failure_line
from liverseg_dist.volume import Volume


@dataclass(frozen=True)
class Evaluation:
    """All it takes to score a case."""

    inputs: CaseInputs
    predictor: SlidingWindowPredictor
    ledger: Ledger
    masks: Ledger | None = None
    """Whose masks lie in the folder above it, if masks are wanted: they may be older than the scores."""
    pictures: Path | None = None
    together: Callable[[], AbstractContextManager[None]] | None = None
    """Entered while several processes compute one case's windows; its cases are never taken from the ledger."""

    def run_case(self, case_id: str) -> bool:
        """Score one scan and record it; True if the ledger had it already. Raises `RunFailed`, recorded as well."""
        known_by: str | None = None
        try:
            with self.together() if self.together is not None else nullcontext():
                truth = self.inputs.truth(case_id)
                known_by = self.inputs.fingerprint(case_id, truth)
                if self.together is None and self._is_done(case_id, known_by):
                    return True
                mask, background, calibration, findings = self._segment(case_id, truth)
            scores = score_case(case_id, mask, truth.voxels, truth.spacing_mm) | {
                "calibration": calibration
            }
            if self.inputs.sources is not None:
                scores |= {"scan_findings": to_json(findings), "forced": is_refused(findings)}
            if self.masks is not None:
                write_mask(self.mask_file(case_id), mask, truth.grid)
                self.masks.write(case_id, {"case_id": case_id}, known_by)
            if self.pictures is not None:
                save_pictures(self.pictures, case_id, Volume(mask, truth.grid), truth, background)
        except RankLost:
            raise
        except Exception as error:  # whatever a case does to us, the others go on
            message = failure_line(case_id, error)
            self.ledger.write_failure(case_id, message, known_by)
            raise RunFailed(message) from error
        self.ledger.write(case_id, scores, known_by)
        return False

    def help_case(self, case_id: str) -> None:
        """Compute this process's windows of a case that another one scores. Raises `RunFailed`."""
        assert self.together is not None
        settings = self.inputs.settings
        try:
            with self.together():
                for piece in self.inputs.pieces(case_id):
                    for _ in self.predictor.stream(piece.image.voxels, settings.data.intensity):
                        pass
        except RankLost:
            raise
        except Exception as error:
            raise RunFailed(failure_line(case_id, error)) from error

    def mask_file(self, case_id: str) -> Path:
        assert self.masks is not None
        return self.masks.folder.parent / f"{encode_file_name(case_id)}.nii.gz"

    def _is_done(self, case_id: str, known_by: str) -> bool:
        if self.masks is not None:
            written = (
                self.mask_file(case_id).is_file() and self.masks.read(case_id, known_by) is not None
            )
            if not written:
                return False
        known = self.ledger.read(case_id, known_by)
        return known is not None and (self.inputs.force or not known.get("forced"))

    def _segment(
        self, case_id: str, truth: Volume
    ) -> tuple[np.ndarray, Volume | None, dict[str, Counts], list[Finding]]:
        """(labels on the scan's grid, the scan in HU there for the pictures, calibration, findings of the scan)."""
        calibrator = Calibrator(truth, self.predictor.regions)
        findings: list[Finding] = []

        def segment(piece: Piece) -> np.ndarray:
            findings.extend(piece.findings)
            watch = calibrator.of_piece(piece.image.grid.orientation, piece.slices)
            settings = self.inputs.settings
            return segment_onto(
                piece.image, truth.grid, self.predictor, settings, watch=watch, clean=False
            ).mask_zyx

        pieces = self.inputs.pieces(case_id)
        mask, background = assemble_case(pieces, truth.grid, segment, self.pictures is not None)
        postprocess_mask(mask, truth.grid.spacing_mm, self.predictor.config)
        return mask, background, calibrator.counts(), findings
