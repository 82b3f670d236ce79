"""Score a run on the cases of a store: one call a case, results in a ledger, no knowledge of who else is working.

Two kinds of input. `slab`: the 64 slices the store keeps; all else counts as background, and the slab was placed with
the help of the truth, so liver found outside it is never seen: the kind of score that tells whether training went well.
`scan`: the whole scan from its file, as a user's scan will come: the kind of score to publish.
Either way the mask is compared with the truth on the scan's own voxels, in mm, and a case is a scan: one that the store
keeps as several slabs (`slab.policy=tile`) is put together again, each slice from the slab whose middle is nearest.
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
from liverseg_dist.inference.cases import failure_line
from liverseg_dist.inference.predictor import Predictor
from liverseg_dist.inference.runs import sha256_of
from liverseg_dist.inference.segment import prepared, segment_onto
from liverseg_dist.volume import Grid, Volume, reorientation

Slabs = Mapping[str, Sequence[str]]
"""The store's cases that each scan is kept as."""


@dataclass(frozen=True)
class Evaluation:
    """All it takes to score a case."""

    store: CaseStore
    slabs: Slabs
    predictor: Predictor
    settings: Settings
    ledger: Ledger
    sources: Mapping[str, Path] | None = None
    """Scan file of each case; None: take the store's slabs."""
    masks: Path | None = None
    """Folder for the predicted masks, if they are wanted."""
    pictures: Path | None = None

    def run_case(self, case_id: str) -> bool:
        """Score one scan and record it; True if the ledger had it already. Raises `RunFailed`, recorded as well."""
        inputs: str | None = None
        try:
            truth = self.store.source_label(self.slabs[case_id][0])
            inputs = self._inputs(case_id, truth)
            if self._is_done(case_id, inputs):
                return True
            target = self.store.meta(self.slabs[case_id][0]).source_grid
            mask, background = self._segment(case_id, target)
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
        parts: dict[str, object] = {"truth": _sha256(truth)}
        for name in self.slabs[case_id]:
            meta = self.store.meta(name)
            parts[f"grids {name}"] = [meta.grid.to_json(), meta.source_grid.to_json()]
            if self.sources is None:
                parts[f"image {name}"] = _sha256(self.store.image(name))
        if self.sources is not None:
            parts["image"] = sha256_of(self._source(case_id))
        return fingerprint_of(parts)

    def _source(self, case_id: str) -> Path:
        assert self.sources is not None
        if case_id not in self.sources:
            raise UserError(f"{case_id}: --source has no scan of that name; give the folder the store was made from")
        return self.sources[case_id]

    def _segment(self, case_id: str, target: Grid) -> tuple[np.ndarray, Volume | None]:
        """(labels on the scan's grid, the scan in HU on that grid for the pictures)."""
        if self.sources is None:
            return self._segment_slabs(self.slabs[case_id], target), None
        file = self._source(case_id)
        scan = read_nifti(file)
        if scan.shape != target.shape:
            raise UserError(
                f"{file}: has shape {scan.shape} (z, y, x), the scan in the store {target.shape}; "
                "give the folder the store was made from"
            )
        scan = Volume(scan.voxels, target)  # the store's affine: the audit may have mended it
        return segment_onto(prepared(scan, self.settings), target, self.predictor, self.settings).mask_zyx, scan

    def _segment_slabs(self, names: Sequence[str], target: Grid) -> np.ndarray:
        grids = [self.store.meta(name).grid for name in names]
        mask = np.zeros(target.shape, dtype=np.uint8)
        for name, slices in zip(names, nearest_slices(grids, target), strict=True):
            image = Volume(self.store.image(name), self.store.meta(name).grid)
            part = segment_onto(image, target, self.predictor, self.settings).mask_zyx
            if len(names) == 1:
                return part
            orientation = image.grid.orientation
            view = Volume(mask, target).reoriented(orientation).voxels
            view[slices] = Volume(part, target).reoriented(orientation).voxels[slices]
        return mask


def nearest_slices(slabs: Sequence[Grid], target: Grid) -> list[np.ndarray]:
    """For each slab the slices of the target, turned to the slabs' orientation, that lie nearest to its middle."""
    distances = []
    for slab in slabs:
        turned, _, _ = reorientation(target, slab.orientation)
        slices = np.zeros((turned.shape[0], 3))
        slices[:, 0] = np.arange(turned.shape[0])
        at_mm = slab.index_of(turned.world_mm(slices))[:, 0] * slab.spacing_mm[0]
        distances.append(np.abs(at_mm - (slab.shape[0] - 1) / 2 * slab.spacing_mm[0]))
    nearest = np.argmin(distances, axis=0)
    return [np.flatnonzero(nearest == number) for number in range(len(slabs))]


def scans_of(store: CaseStore, case_ids: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(scan -> the store's cases it is kept as, both sorted; cases without a label, which are left out)."""
    slabs: dict[str, list[str]] = {}
    unlabelled = []
    for case_id in sorted(case_ids):
        meta = store.meta(case_id)
        if meta.labelled:
            slabs.setdefault(meta.parent, []).append(case_id)
        else:
            unlabelled.append(case_id)
    return slabs, unlabelled


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
