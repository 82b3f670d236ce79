"""What evaluation reads of a case: the truth on the scan's own voxels, and the images that the network is given.

Two kinds of input. `slab`: the 64 slices the store keeps; all else counts as background, and the slab was placed with
the help of the truth, so liver found outside it is never seen: the kind of score that tells whether training went well.
`scan`: the whole scan from its file, as a user's scan will come: the kind of score to publish.
A case is a scan: one that the store keeps as several slabs (`slab.policy=tile`) is put together again, each slice from
the slab whose middle is nearest.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.io.nifti import read_scan_file
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.ledger import fingerprint_of
from liverseg_dist.files import file_sha256
from liverseg_dist.inference.resample_to_scan import resample_to_scan
from liverseg_dist.inference.scan_checks import ScanRefused, check_scan, is_refused
from liverseg_dist.inference.segment_scan import prepare_for_network
from liverseg_dist.volume import Grid, Volume, plan_reorientation

Slabs = Mapping[str, Sequence[str]]
"""The store's cases that each scan is kept as."""
AIR_HU = -1024


@dataclass(frozen=True)
class Piece:
    """An image for the network, and the slices of the turned target that are to be taken from it (None: all)."""

    image: Volume
    slices: np.ndarray | None
    scan: Volume | None = None
    """The scan itself on the target's voxels, where it was read."""
    findings: tuple[Finding, ...] = ()
    """Of the scan's file; errors only where it was forced."""


@dataclass(frozen=True)
class CaseInputs:
    store: CaseStore
    slabs: Slabs
    settings: Settings
    sources: Mapping[str, Path] | None = None
    """Scan file of each case; None: take the store's slabs."""
    force: bool = False
    """Take scan files that the audit refuses."""

    def truth(self, case_id: str) -> Volume:
        """The true labels on the scan's own grid."""
        name = self.slabs[case_id][0]
        return Volume(self.store.source_label(name), self.store.meta(name).source_grid)

    def fingerprint(self, case_id: str, truth: Volume) -> str:
        """Of what this case's score depends on."""
        parts: dict[str, object] = {"truth": _sha256(truth.voxels)}
        for name in self.slabs[case_id]:
            meta = self.store.meta(name)
            parts[f"grids {name}"] = [meta.grid.to_json(), meta.source_grid.to_json()]
            if self.sources is None:
                parts[f"image {name}"] = _sha256(self.store.image(name))
        if self.sources is not None:
            parts["image"] = file_sha256(self._source(case_id))
        elif len(self.slabs[case_id]) > 1:
            parts["post-processed"] = "joined"  # once it was each slab by itself
        return fingerprint_of(parts)

    def pieces(self, case_id: str) -> Iterator[Piece]:
        """The images of a case in order, each read when its turn comes."""
        target = self.store.meta(self.slabs[case_id][0]).source_grid
        if self.sources is not None:
            scan, findings = self._scan(case_id, target)
            yield Piece(prepare_for_network(scan, self.settings), None, scan, findings)
            return
        names = self.slabs[case_id]
        grids = [self.store.meta(name).grid for name in names]
        chosen = nearest_slices(grids, target) if len(names) > 1 else [None]
        for name, grid, slices in zip(names, grids, chosen, strict=True):
            yield Piece(Volume(self.store.image(name), grid), slices)

    def _source(self, case_id: str) -> Path:
        assert self.sources is not None
        if case_id not in self.sources:
            raise UserError(
                f"{case_id}: --source has no scan of that name; give the folder the store was made from"
            )
        return self.sources[case_id]

    def _scan(self, case_id: str, target: Grid) -> tuple[Volume, tuple[Finding, ...]]:
        """A whole scan and its findings. Raises `ScanRefused`, on every rank that reads it."""
        file = self._source(case_id)
        read = read_scan_file(file)
        if read.volume.shape != target.shape:
            raise UserError(
                f"{file.name}: has shape {read.volume.shape} (z, y, x), the scan in the store {target.shape}; "
                "give the folder the store was made from"
            )
        scan = Volume(
            read.volume.voxels, target
        )  # the store's affine: the audit may have repaired it
        findings = check_scan(scan, read.notes, self.settings, self.truth(case_id))
        if is_refused(findings) and not self.force:
            raise ScanRefused(file.name, findings)
        return scan, tuple(findings)


class Assembly:
    """An array on the target's voxels that is filled piece by piece."""

    def __init__(self, target: Grid, fill: int, dtype: type[np.generic]) -> None:
        self.target = target
        self.voxels = np.full(target.shape, fill, dtype=dtype)

    def take(self, piece: Piece, part: np.ndarray) -> None:
        """What `part`, on the target's voxels, has in the slices of its piece."""
        if piece.slices is None:
            self.voxels = part
            return
        orientation = piece.image.grid.orientation
        view = Volume(self.voxels, self.target).reoriented(orientation).voxels
        view[piece.slices] = Volume(part, self.target).reoriented(orientation).voxels[piece.slices]


def image_onto(image: Volume, target: Grid) -> np.ndarray:
    """A store's image (HU) on a scan's voxels, int16, to be looked at; air where the image does not reach."""
    voxels = np.full(target.shape, AIR_HU, dtype=np.int16)
    view = Volume(voxels, target).reoriented(image.grid.orientation)
    slices = (
        (z, torch.from_numpy(image.voxels[z][None, None].astype(np.float32)))
        for z in range(image.shape[0])
    )
    for box, values_FDHW in resample_to_scan(slices, image.grid, view.grid):
        view.voxels[box] = values_FDHW[0].round().numpy()
    return voxels


def assemble_case(
    pieces: Iterator[Piece], target: Grid, segment: Callable[[Piece], np.ndarray], with_image: bool
) -> tuple[np.ndarray, Volume | None]:
    """(what `segment` makes of each piece, put together on the target; the scan in HU there, if asked for)."""
    mask, image = Assembly(target, 0, np.uint8), Assembly(target, AIR_HU, np.int16)
    scan: Volume | None = None
    for piece in pieces:
        mask.take(piece, segment(piece))
        scan = piece.scan
        if with_image and scan is None:
            image.take(piece, image_onto(piece.image, target))
    if not with_image:
        return mask.voxels, None
    return mask.voxels, scan if scan is not None else Volume(image.voxels, target)


def nearest_slices(slabs: Sequence[Grid], target: Grid) -> list[np.ndarray]:
    """For each slab the slices of the target, turned to the slabs' orientation, that lie nearest to its middle."""
    distances = []
    for slab in slabs:
        turned, _, _ = plan_reorientation(target, slab.orientation)
        slices = np.zeros((turned.shape[0], 3))
        slices[:, 0] = np.arange(turned.shape[0])
        at_mm = slab.index_of(turned.world_mm(slices))[:, 0] * slab.spacing_mm[0]
        distances.append(np.abs(at_mm - (slab.shape[0] - 1) / 2 * slab.spacing_mm[0]))
    nearest = np.argmin(distances, axis=0)
    return [np.flatnonzero(nearest == number) for number in range(len(slabs))]


def source_scans(
    store: CaseStore, case_ids: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
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
