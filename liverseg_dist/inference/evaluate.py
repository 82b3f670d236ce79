"""Score a run on the cases of a store: one call a case, results in a ledger, no knowledge of who else is working.

Two kinds of input. `slab`: the 64 slices the store keeps; all else counts as background, and the slab was placed with
the help of the truth, so liver found outside it is never seen: the kind of score that tells whether training went well.
`scan`: the whole scan from its file, as a user's scan will come: the kind of score to publish.
Either way the mask is compared with the truth on the scan's own voxels, in mm.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.data.nifti import read_nifti, write_mask
from liverseg_dist.data.store import CaseStore
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.evaluation.case import score_case
from liverseg_dist.evaluation.ledger import Ledger, file_name, fingerprint_of
from liverseg_dist.evaluation.pictures import save_pictures
from liverseg_dist.inference.predictor import Predictor
from liverseg_dist.inference.runs import sha256_of
from liverseg_dist.inference.segment import prepared, segment_onto
from liverseg_dist.volume import Grid, Volume


@dataclass(frozen=True)
class Evaluation:
    """All it takes to score a case."""

    store: CaseStore
    predictor: Predictor
    settings: Settings
    ledger: Ledger
    sources: Mapping[str, Path] | None = None
    """Scan file of each case; None: take the store's slabs."""
    masks: Path | None = None
    """Folder for the predicted masks, if they are wanted."""
    pictures: Path | None = None

    def run_case(self, case_id: str) -> bool:
        """Score one case and record it; True if the ledger had it already. Failures are recorded and raised."""
        inputs: str | None = None
        try:
            truth = self.store.source_label(case_id)
            inputs = self._inputs(case_id, truth)
            if self._is_done(case_id, inputs):
                return True
            image, target, background = self._image(case_id)
            mask = segment_onto(image, target, self.predictor, self.settings).mask_zyx
            scores = score_case(case_id, mask, truth, target.spacing_mm)
            if self.masks is not None:
                write_mask(self.mask_file(case_id), mask, target)
            if self.pictures is not None:
                save_pictures(self.pictures, case_id, Volume(mask, target), Volume(truth, target), background)
        except Exception as error:  # whatever a case does to us, the others go on
            message = failure_line(case_id, error)
            self.ledger.write_failure(case_id, message, inputs)
            raise RunFailed(message) from error
        self.ledger.write(case_id, scores, inputs)
        return False

    def mask_file(self, case_id: str) -> Path:
        assert self.masks is not None
        return self.masks / f"{file_name(case_id)}.nii.gz"

    def _is_done(self, case_id: str, inputs: str) -> bool:
        if self.masks is not None and not self.mask_file(case_id).is_file():
            return False
        return self.ledger.read(case_id, inputs) is not None

    def _inputs(self, case_id: str, truth: np.ndarray) -> str:
        """Fingerprint of what this case's score depends on."""
        meta = self.store.meta(case_id)
        parts: dict[str, object] = {
            "truth": _sha256(truth),
            "grid": meta.grid.to_json(),
            "source_grid": meta.source_grid.to_json(),
        }
        if self.sources is None:
            parts["image"] = _sha256(self.store.image(case_id))
        else:
            parts["image"] = sha256_of(self._source(case_id))
        return fingerprint_of(parts)

    def _source(self, case_id: str) -> Path:
        assert self.sources is not None
        if case_id not in self.sources:
            raise UserError(f"{case_id}: --source has no scan of that name; give the folder the store was made from")
        return self.sources[case_id]

    def _image(self, case_id: str) -> tuple[Volume, Grid, Volume | None]:
        """(prepared image, grid of the truth, image in HU on that grid for the pictures)."""
        meta = self.store.meta(case_id)
        if self.sources is None:
            return Volume(self.store.image(case_id), meta.grid), meta.source_grid, None
        file = self._source(case_id)
        scan = read_nifti(file)
        if scan.shape != meta.source_grid.shape:
            raise UserError(
                f"{file}: has shape {scan.shape} (z, y, x), the scan in the store {meta.source_grid.shape}; "
                "give the folder the store was made from"
            )
        scan = Volume(scan.voxels, meta.source_grid)  # the store's affine: the audit may have mended it
        return prepared(scan, self.settings), meta.source_grid, scan


def share(voxels: Mapping[str, int], shard: int, num_shards: int) -> list[str]:
    """The cases of one shard, largest first: each case goes to the shard that has least so far.

    (Graham's longest-processing-time rule: never more than a third longer than the best division.) Every shard works
    the whole division out for itself, so nobody waits for a claim of one that died.
    """
    loads = [0] * num_shards
    mine = []
    for case_id in sorted(voxels, key=lambda name: (-voxels[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += voxels[case_id]
        if lightest == shard:
            mine.append(case_id)
    return mine


def labelled(store: CaseStore, case_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """(cases with a truth, cases without)."""
    known = [case_id for case_id in case_ids if store.meta(case_id).labelled]
    return known, [case_id for case_id in case_ids if case_id not in known]


def failure_line(name: str, error: Exception) -> str:
    """One line that names the case or file and what went wrong."""
    if isinstance(error, (UserError, RunFailed)):
        text = str(error)
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        text = "out of memory; set inference.batch_size=1, or use --device cpu"
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if name in text else f"{name}: {text}"


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
