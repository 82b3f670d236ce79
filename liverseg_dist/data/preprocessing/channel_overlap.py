"""Do the channels of a scan show the same part of the world? Checked before they are combined."""

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.volume import Grid

LATTICE = 24
"""Points along each axis of the reference at which the overlap is measured."""
SMALL_OVERLAP = 0.5


def measure_overlap(reference: Grid, other: Grid) -> float:
    """Share (0 to 1) of the reference's field of view that lies within another grid."""
    positions = []
    for length in reference.shape:
        # Centres of equal parts, so that the faces of the field of view are not favoured.
        positions.append((np.arange(LATTICE) + 0.5) * length / LATTICE - 0.5)
    lattice = np.stack(np.meshgrid(*positions, indexing="ij"), axis=-1).reshape(-1, 3)
    # Positions in world space: the headers are what is checked.
    index = other.index_of(reference.world_mm(lattice))
    is_inside = (index >= -0.5) & (index <= np.asarray(other.shape) - 0.5)
    return float(is_inside.all(axis=1).mean())


def check_overlap(
    reference: Grid, other: Grid, reference_name: str, name: str
) -> tuple[float, list[Finding]]:
    """Measure the overlap of a channel with the first one of its scan.

    Returns:
        The share of the first channel that is covered; and a finding: an error without any
        overlap, a warning for less than half.
    """
    share = measure_overlap(reference, other)
    # Without any overlap every voxel of the channel would be padding.
    if share == 0:
        message = (
            f"channel {name} does not overlap channel {reference_name} in world space; is it of "
            "another patient, or is its header wrong?"
        )
        return share, [Finding("error", "channel_no_overlap", message)]
    if share < SMALL_OVERLAP:
        message = f"channel {name} covers {100 * share:.0f} % of channel {reference_name} only"
        return share, [Finding("warning", "channel_overlap", message)]
    return share, []
