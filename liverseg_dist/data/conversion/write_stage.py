"""Stage 3 of a conversion: write the slabs of a scan and its picture, and complete its record."""

import io
from dataclasses import replace

import numpy as np

from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord, thumbnail_file
from liverseg_dist.data.conversion.case_writer import StagingDir, write_bytes, write_case
from liverseg_dist.data.conversion.slab_stage import PlacedScan, cut_slab
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.conversion.thumbnail import render_thumbnail
from liverseg_dist.data.preprocessing.slab_coverage import describe_slabs, measure_coverage
from liverseg_dist.volume import Float3, Volume


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
        # The middle tile is the most likely to show the liver.
        if number == len(slabs) // 2:
            label_zyx = arrays.label if has_label else None
            _save_thumbnail(job, arrays.image[0], label_zyx, slab.grid.spacing_mm)
    facts = dict(placed.record.facts)
    if placed.label is not None:
        facts["coverage"] = measure_coverage(placed.label, slabs, stored_labels)
    findings = describe_slabs(placed.clean.volume.grid, slabs, facts.get("coverage"))
    return replace(
        placed.record,
        slabs=stored_cases,
        facts=facts,
        findings=(*placed.record.findings, *findings),
    )


def save_overview(job: CaseJob, image: Volume) -> None:
    """Save the picture of a scan that is not stored, so that the audit page can show it.

    Raises:
        OSError: The store cannot be written.
    """
    canonical = image.reoriented()
    _save_thumbnail(job, canonical.voxels, None, canonical.spacing_mm)


def _save_thumbnail(
    job: CaseJob, image_zyx: np.ndarray, label_zyx: np.ndarray | None, spacing_mm: Float3
) -> None:
    buffer = io.BytesIO()
    render_thumbnail(image_zyx, label_zyx, spacing_mm).save(buffer, "png")
    case_id = job.case.case_id
    write_bytes(
        StagingDir(job.store, case_id), thumbnail_file(job.store, case_id), buffer.getvalue()
    )
