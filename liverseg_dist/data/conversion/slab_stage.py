"""Stage 2 of a conversion: clean a scan, place its slabs, and cut them out one at a time."""

from dataclasses import dataclass, replace

import numpy as np

from liverseg_dist.data.conversion.audit_stage import AuditedScan
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord
from liverseg_dist.data.conversion.case_writer import CaseArrays
from liverseg_dist.data.conversion.channel_histograms import count_foreground
from liverseg_dist.data.conversion.foreground_samples import sample_foreground
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.data.preprocessing.scan_channels import (
    CleanChannels,
    clean_channels,
    resample_channels,
)
from liverseg_dist.data.preprocessing.slab import Slab, mark_padding, place_slabs
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume


@dataclass(frozen=True)
class PlacedScan:
    """A cleaned scan and the positions of its slabs."""

    record: CaseRecord
    """The record with the histogram of the foreground and the findings so far."""
    clean: CleanChannels
    label: Volume | None
    """Label on the grid of the cleaned first channel; None without label."""
    source_label: Volume | None
    """Label on the scan's own grid, stored for evaluation."""
    source_grid: Grid
    slabs: tuple[Slab, ...]

    @property
    def grid(self) -> Grid:
        """Grid of the cleaned first channel, from which the slabs are cut."""
        return self.clean.reference.volume.grid


def place_scan(job: CaseJob, audited: AuditedScan) -> PlacedScan:
    """Clean a scan and choose the position of its slabs."""
    convert = job.convert
    record = audited.record
    clean = clean_channels(audited.images, convert, job.channels)
    grid = clean.reference.volume.grid
    # The audit has reported the overlap of the channels already.
    new_findings = [f for f in clean.findings if f not in record.findings]
    record = replace(record, findings=(*record.findings, *new_findings))
    label = None
    if audited.label is not None:
        label = crop_label_to(audited.label, grid)
    # A scan without label can still have its slab placed by the organs that a run found.
    guide = label
    if audited.label_guide is not None and audited.label_guide.voxels.any():
        guide = crop_label_to(audited.label_guide, grid)
        # Findings are part of the stored bytes: a new wording would change every such store.
        organs = ", ".join(organ.name for organ in job.labels.organs)
        message = (
            f"the run convert.labels_from found the {organs}; the slab lies on it, "
            "its voxels are not stored"
        )
        record = replace(
            record, findings=(*record.findings, Finding("info", "liver_found", message))
        )
    slabs = place_slabs(grid, guide, convert.cleaning.spacing_mm, convert.slab, job.labels)
    # Intensity statistics use labels made by people only: a run's errors must not shift them.
    if label is not None and record.status != "imputed":
        foreground = (label.voxels > 0) & (label.voxels < job.labels.num_classes)
        record = replace(record, histogram=count_foreground(clean, label.with_voxels(foreground)))
    return PlacedScan(record, clean, label, audited.label, audited.image.grid, slabs)


def cut_slab(job: CaseJob, placed: PlacedScan, slab: Slab) -> CaseArrays:
    """Resample image and label of one slab and collect its metadata (without checksums).

    Called once for each slab by the write stage, so that only one slab is in memory at a time.
    """
    clean = placed.clean
    image_czyx = resample_channels(clean, slab.grid, job.convert)
    own_intensities = [None if entry is None else entry.model_dump() for entry in clean.intensities]
    if placed.label is None:
        label_zyx = np.full(slab.grid.shape, IGNORE, np.uint8)
    else:
        label_zyx = mark_padding(resample_to_grid(placed.label, slab.grid, "label").voxels, slab)
    foreground, lesions = sample_foreground(label_zyx, job.labels, job.convert.foreground_samples)
    # Class values only: IGNORE (255) marks padding, which is not a class.
    class_voxels = np.bincount(label_zyx.ravel(), minlength=256)[: job.labels.num_classes]
    imputed_by = None
    if placed.record.status == "imputed" and job.labeller is not None:
        imputed_by = job.labeller.fingerprint
    stored = StoredCase(
        labelled=placed.label is not None,
        grid=slab.grid,
        source_grid=placed.source_grid,
        valid_slices=slab.valid_slices,
        class_voxels=tuple(class_voxels.tolist()),
        lesions=lesions,
        slab_policy=job.convert.slab.policy,
        spacing_mm=slab.grid.spacing_mm,
        parent=job.case.case_id,
        cleaning=clean.provenance,
        source_sha256=placed.record.source_sha256,
        annotated=job.annotated if placed.label is not None and imputed_by is None else None,
        present=None if all(clean.present) else clean.present,
        intensities=tuple(own_intensities) if any(own_intensities) else None,
        imputed_by=imputed_by,
    )
    source_label = placed.source_label
    return CaseArrays(
        image=image_czyx,
        label=np.ascontiguousarray(label_zyx),
        source_label=None if source_label is None else np.ascontiguousarray(source_label.voxels),
        foreground=foreground,
        stored=stored,
    )


def crop_label_to(label: Volume, grid: Grid) -> Volume:
    """The label in RAS orientation on `grid`, which is its own grid or a crop of it.

    The crop comes from `convert.cleaning.body_margin_mm`; no voxel is interpolated.
    """
    label = label.reoriented(CANONICAL_ORIENTATION)
    start = np.rint(label.grid.index_of(grid.world_mm(np.zeros(3)))).astype(int)
    return label.cropped(start.tolist(), grid.shape)
