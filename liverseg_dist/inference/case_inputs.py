"""The inputs of an evaluation: the truth on the scan's own voxels, and the images for the network.

There are two kinds of input. `slab`: the slices that the store keeps. All other slices count as
background. The slab was placed with the help of the truth, so liver found outside it is not
counted: this kind of score is for monitoring of the training. `scan`: the whole scan from its file,
as in clinical use; this is the kind of score to publish.

A case is a scan. If the store keeps a scan as several slabs (`slab.policy=tile`), they are joined:
each slice is taken from the slab whose centre is nearest. Used by `evaluate_cases` and
`postprocess_search`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.config import Settings
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.ledger import fingerprint_of
from liverseg_dist.inference.resample_to_scan import resample_to_scan
from liverseg_dist.inference.scan_checks import ScanRefused, check_channels, is_refused
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.inference.segment_scan import (
    NetworkImage,
    check_present_channels,
    prepare_for_network,
)
from liverseg_dist.volume import Grid, Volume, plan_reorientation

ScanSlabs = Mapping[str, Sequence[str]]
"""The store's cases that hold the slabs of each scan."""
AIR_HU = -1024


@dataclass(frozen=True)
class Piece:
    """An image for the network, and the slices of the scan that its result is used for.

    Attributes:
        image: the prepared image.
        slices: slices of the target, in the image's orientation; None: all.
        scan: the scan's first channel on the target's voxels, where it was read from a file.
        findings: findings of the scan's file; they contain errors only with `--force`.
    """

    image: NetworkImage
    slices: np.ndarray | None
    scan: Volume | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class CaseInputs:
    """Reads the truth and the images of cases.

    Attributes:
        store: the data set.
        slabs: the store's cases of each scan.
        settings: resolved settings of the run.
        sources: files of each case; None: use the slabs of the store.
        force: whether to use scan files that the audit refuses.
    """

    store: CaseStore
    slabs: ScanSlabs
    settings: Settings
    sources: Mapping[str, ScanFiles] | None = None
    force: bool = False

    def read_truth(self, case_id: str) -> Volume:
        """The true labels on the scan's own grid."""
        # All slabs of a scan have the label of the whole scan, so the first one serves.
        name = self.slabs[case_id][0]
        return Volume(self.store.source_label(name), self.store.meta(name).source_grid)

    def read_annotated(self, case_id: str) -> tuple[str, ...]:
        """Names of the structures that were annotated in a case."""
        return self.store.meta(self.slabs[case_id][0]).annotated

    def compute_fingerprint(self, case_id: str, truth: Volume) -> str:
        """Fingerprint of the data that the case's score depends on."""
        # The content of the truth, not the name of its file: a corrected label must give a new
        # score.
        parts: dict[str, object] = {"truth": _hash_array(truth.voxels)}
        for name in self.slabs[case_id]:
            meta = self.store.meta(name)
            parts[f"grids {name}"] = [meta.grid.to_json(), meta.source_grid.to_json()]
            if self.sources is None:
                parts |= self._describe_image(name)
            annotated = self.store.meta(name).annotated
            # Absent for fully annotated cases, so that their earlier scores stay valid.
            if set(annotated) != set(self.store.labels.structure_names):
                parts[f"annotated {name}"] = list(annotated)
        if self.sources is not None:
            # The whole file is read: size and date do not change when voxels are corrected in
            # place.
            parts["image"] = self._find_source(case_id).compute_sha256()
        elif len(self.slabs[case_id]) > 1:
            # Earlier versions post-processed each slab by itself: their scores are not reused.
            parts["post-processed"] = "joined"
        return fingerprint_of(parts)

    def _describe_image(self, name: str) -> dict[str, object]:
        """What the network's input depends on, for a stored case."""
        image, meta = self.store.image(name), self.store.meta(name)
        # One channel of the run's normalisation: the key and the bytes of earlier versions.
        if len(image) == 1 and self.settings.data.intensities[0] is not None:
            return {f"image {name}": _hash_array(image)}
        intensities = [one.model_dump(mode="json") for one in meta.intensities]
        return {
            f"image {name}": _hash_array(image),
            f"channels {name}": [list(meta.present), intensities],
        }

    def read_pieces(self, case_id: str) -> Iterator[Piece]:
        """Yield the images of a case in order; each is read when it is requested.

        Raises:
            ScanRefused: the audit refuses the scan's file.
            UserError: the scan's file is missing, or is not that of the store.
        """
        target = self.store.meta(self.slabs[case_id][0]).source_grid
        if self.sources is not None:
            scan, findings = self._read_scan(case_id, target)
            image = prepare_for_network(scan, self.settings)
            first = next(volume for volume in scan if volume is not None)
            yield Piece(image, None, first, findings)
            return
        names = self.slabs[case_id]
        grids = [self.store.meta(name).grid for name in names]
        slices_of_slabs: Sequence[np.ndarray | None] = [None]
        if len(names) > 1:
            slices_of_slabs = assign_slices_to_slabs(grids, target)
        for name, grid, slices in zip(names, grids, slices_of_slabs, strict=True):
            yield Piece(self._read_stored_image(name, grid), slices)

    def _read_stored_image(self, name: str, grid: Grid) -> NetworkImage:
        meta = self.store.meta(name)
        check_present_channels(meta.present, self.settings)
        intensities = []
        # The run's normalisation first: another store may have another one.
        for of_run, of_case in zip(self.settings.data.intensities, meta.intensities, strict=True):
            intensities.append(of_run if of_run is not None else of_case)
        return NetworkImage(self.store.image(name), grid, tuple(intensities), meta.present)

    def _find_source(self, case_id: str) -> ScanFiles:
        assert self.sources is not None
        if case_id not in self.sources:
            raise UserError(
                f"{case_id}: --source has no scan of that name; "
                "give the folder the store was made from"
            )
        return self.sources[case_id]

    def _read_scan(
        self, case_id: str, target: Grid
    ) -> tuple[list[Volume | None], tuple[Finding, ...]]:
        """The channels of a scan and its findings; every rank gets the same result."""
        files = self._find_source(case_id)
        channels = files.read_channels()
        number = next(at for at, read in enumerate(channels) if read is not None)
        first = channels[number]
        assert first is not None
        # Another shape means another scan of that name; its score would be meaningless but not
        # obviously wrong.
        if first.volume.shape != target.shape:
            raise UserError(
                f"{files.name}: has shape {first.volume.shape} (z, y, x), but the scan in the "
                f"store has {target.shape}; give the folder the store was made from"
            )
        # The store's affine replaces that of the file: the audit may have repaired it.
        channels[number] = replace(first, volume=Volume(first.volume.voxels, target))
        findings = check_channels(channels, self.settings, self.read_truth(case_id))
        if is_refused(findings) and not self.force:
            raise ScanRefused(files.name, findings)
        # An absent channel stays None, so that the position of each channel is kept.
        volumes = [None if read is None else read.volume for read in channels]
        return volumes, tuple(findings)


class PieceAssembler:
    """An array on the target's voxels that is filled piece by piece.

    Args:
        target: grid of the scan.
        fill: value of voxels that no piece covers.
        dtype: type of the array.
    """

    def __init__(self, target: Grid, fill: int, dtype: type[np.generic]) -> None:
        self.target = target
        # Voxels that no slab covers keep this value: background for masks, air for pictures.
        self.voxels = np.full(target.shape, fill, dtype=dtype)

    def add_piece(self, piece: Piece, values: np.ndarray) -> None:
        """Copy the piece's slices from `values`, an array on the target's voxels."""
        if piece.slices is None:
            self.voxels = values
            return
        orientation = piece.image.grid.orientation
        # Views: the values are copied in the piece's orientation, and nothing is allocated.
        view = Volume(self.voxels, self.target).reoriented(orientation).voxels
        values_view = Volume(values, self.target).reoriented(orientation).voxels
        view[piece.slices] = values_view[piece.slices]


def resample_image_to_grid(image: Volume, target: Grid, fill: int = AIR_HU) -> np.ndarray:
    """Resample a store's image to a scan's voxels for pictures.

    Args:
        image: one channel.
        target: grid of the scan.
        fill: value outside of the image.

    Returns:
        int16 array with the target's shape.
    """
    voxels = np.full(target.shape, fill, dtype=np.int16)
    view = Volume(voxels, target).reoriented(image.grid.orientation)
    # Rounded: truncation would make every value darker by half a unit on average.
    for box, values_FDHW in resample_to_scan(_iterate_slices(image), image.grid, view.grid):
        view.voxels[box] = values_FDHW[0].round().numpy()
    return voxels


def _iterate_slices(image: Volume) -> Iterator[tuple[int, Tensor]]:
    for z in range(image.shape[0]):
        yield z, torch.from_numpy(image.voxels[z][None, None].astype(np.float32))


def assemble_case(
    pieces: Iterator[Piece],
    target: Grid,
    segment: Callable[[Piece], np.ndarray],
    with_image: bool,
    dtype: type[np.unsignedinteger] = np.uint8,
    fill: int = AIR_HU,
) -> tuple[np.ndarray, Volume | None]:
    """Segment the pieces of a case and join the results.

    Args:
        pieces: pieces of the case.
        target: grid of the scan.
        segment: gives the labels (or codes) of a piece on the target's voxels.
        with_image: whether to return the scan as well.
        dtype: type of the labels.
        fill: value of the returned scan outside of the pieces.

    Returns:
        The joined labels, and the scan's first channel on the same voxels if `with_image`.
    """
    mask = PieceAssembler(target, 0, dtype)
    image = PieceAssembler(target, fill, np.int16)
    scan: Volume | None = None
    for piece in pieces:
        # One piece at a time: the pieces of a tiled scan together need more memory than the scan.
        mask.add_piece(piece, segment(piece))
        scan = piece.scan
        if with_image and scan is None:
            image.add_piece(piece, resample_image_to_grid(piece.image.first_channel, target, fill))
    if not with_image:
        return mask.voxels, None
    return mask.voxels, scan if scan is not None else Volume(image.voxels, target)


def assign_slices_to_slabs(slabs: Sequence[Grid], target: Grid) -> list[np.ndarray]:
    """Assign each slice of a scan to the slab whose centre is nearest.

    Args:
        slabs: grids of the slabs, in one orientation.
        target: grid of the scan.

    Returns:
        For each slab, its slices of the target in the slabs' orientation.
    """
    # The nearest centre, because a network is least certain at the border of its input.
    distances_mm = []
    for slab in slabs:
        reoriented, _, _ = plan_reorientation(target, slab.orientation)
        indices = np.zeros((reoriented.shape[0], 3))
        indices[:, 0] = np.arange(reoriented.shape[0])
        # In the slab's own axes, so that oblique scans are compared along their slices.
        z_mm = slab.index_of(reoriented.world_mm(indices))[:, 0] * slab.spacing_mm[0]
        centre_mm = (slab.shape[0] - 1) / 2 * slab.spacing_mm[0]
        distances_mm.append(np.abs(z_mm - centre_mm))
    nearest = np.argmin(distances_mm, axis=0)
    return [np.flatnonzero(nearest == number) for number in range(len(slabs))]


def group_slabs_by_scan(
    store: CaseStore, case_ids: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Group the store's cases by the scan they come from.

    Returns:
        The cases of each scan, both sorted; and the cases without a label, which are not used.
    """
    slabs: dict[str, list[str]] = {}
    unlabelled = []
    for case_id in sorted(case_ids):
        meta = store.meta(case_id)
        if meta.labelled:
            slabs.setdefault(meta.parent, []).append(case_id)
        else:
            unlabelled.append(case_id)
    return slabs, unlabelled


def _hash_array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
