"""Stage 3 of a conversion: write the slabs of a scan and its picture, and complete its record."""

import io
from dataclasses import replace

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, IntensityConfig
from liverseg_dist.data.audit.image_audit import sample_voxels
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord, thumbnail_file
from liverseg_dist.data.conversion.case_writer import StagingDir, write_bytes, write_case
from liverseg_dist.data.conversion.slab_stage import PlacedScan, cut_slab
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.conversion.thumbnail import WINDOW_HU, ValueWindow, render_thumbnail
from liverseg_dist.data.preprocessing.slab_coverage import describe_slabs, measure_coverage
from liverseg_dist.volume import Float3, Volume

OVERVIEW_PERCENTILES = (0.5, 99.5)


def write_slabs(job: CaseJob, placed: PlacedScan) -> CaseRecord:
    """Write all slabs of a scan and return its complete record.

    Raises:
        OSError: The store cannot be written.
    """
    case_id = job.case.case_id
    slabs = placed.slabs
    has_label = placed.label is not None
    stored_cases: dict[str, StoredCase] = {}
    stored_labels = []
    for number, slab in enumerate(slabs):
        arrays = cut_slab(job, placed, slab)
        name = case_id if len(slabs) == 1 else f"{case_id}_tile{number}"
        files = write_case(StagingDir(job.store, case_id), name, arrays)
        stored_cases[name] = replace(arrays.stored, files=files)
        stored_labels.append(arrays.label)
        # The middle tile is the most likely to show the structures.
        if number == len(slabs) // 2:
            label_zyx = arrays.label if has_label else None
            number = placed.clean.reference_channel
            image_zyx = arrays.image[number]
            window = _choose_window(job.channels[number], placed.clean.intensities[number])
            _save_thumbnail(job, image_zyx, label_zyx, slab.grid.spacing_mm, window)
    facts = dict(placed.record.facts)
    if placed.label is not None:
        facts["coverage"] = measure_coverage(placed.label, slabs, stored_labels, job.labels)
    findings = describe_slabs(placed.grid, slabs, facts.get("coverage"), job.labels)
    return replace(
        placed.record,
        slabs=stored_cases,
        facts=facts,
        findings=(*placed.record.findings, *findings),
    )


def _choose_window(channel: ChannelConfig, intensity: IntensityConfig | None) -> ValueWindow:
    """Values shown from black to white: a window of HU, else the range of the normalisation."""
    if channel.is_ct or intensity is None:
        return WINDOW_HU
    return intensity.lower_hu, intensity.upper_hu


def save_overview(job: CaseJob, image: Volume, channel: ChannelConfig = CT_CHANNEL) -> None:
    """Save the picture of a scan that is not stored, so that the audit page can show it.

    Args:
        job: The scan.
        image: Its first channel.
        channel: What this channel is.

    Raises:
        OSError: The store cannot be written.
    """
    canonical = image.reoriented()
    window = WINDOW_HU
    sample = sample_voxels(canonical)
    if not channel.is_ct and sample.size:
        low, high = np.percentile(sample, OVERVIEW_PERCENTILES)
        window = (float(low), max(float(high), float(low) + 1e-6))
    _save_thumbnail(job, canonical.voxels, None, canonical.spacing_mm, window)


def _save_thumbnail(
    job: CaseJob,
    image_zyx: np.ndarray,
    label_zyx: np.ndarray | None,
    spacing_mm: Float3,
    window: ValueWindow,
) -> None:
    buffer = io.BytesIO()
    render_thumbnail(image_zyx, label_zyx, spacing_mm, window, job.labels).save(buffer, "png")
    case_id = job.case.case_id
    write_bytes(
        StagingDir(job.store, case_id), thumbnail_file(job.store, case_id), buffer.getvalue()
    )
