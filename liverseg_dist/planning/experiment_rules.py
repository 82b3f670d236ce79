"""Rules that turn a fingerprint into voxel size, slabs, patch and sampling. No memory, no torch.

The rules are those that nnU-Net published, where its design and this one agree:
https://www.nature.com/articles/s41592-020-01008-z (Methods, "Inferred parameters"; here "nnU-Net").
They differ where slabs of exactly 64 slices do: the slab decides the depth of a patch, and the
voxel size along z is chosen together with the slab policy. `experiment_plan` adds what depends on
memory. Every rule returns its value with the reason, which the plan's file shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from liverseg_dist.model.topology import MIN_EDGE, plan_pooling, size_multiple
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.volume import Float3, Index3

SLICES = 64
"""`convert.slab.slices`, which is fixed."""
ANISOTROPY = 3.0
"""nnU-Net: an axis is anisotropic if its voxels are more than 3 times longer than the others."""
ANISOTROPIC_PERCENTILE = 10
MARGIN_MM = 10.0
"""Default of `convert.slab.margin_mm`."""
COVERED_PERCENTILE = 90
"""Share of the cases whose structures must fit into one slab without thicker slices."""
SLICES_PER_LESION = 3.0
"""A lesion of the 10th percentile keeps at least this many slices."""
CONTEXT = 1.25
"""Edge of a patch relative to the structures: a larger one mostly adds background."""
REFERENCE_EDGE = 256
"""nnU-Net starts from a patch of 256^3 voxels, cubic in mm."""
MIN_PATCH_EDGE = 2 * MIN_EDGE
NNUNET_SAMPLES = 500_000
"""nnU-Net: 1000 epochs of 250 steps of batch 2."""
SAMPLES_PER_CASE = 5_000
"""What 500,000 samples are for the 105 training cases of a fold of Task03_Liver."""
MIN_STEPS = 1_000
RARE_LESION_FRACTION = 1e-3
COMMON_SHARE, RARE_SHARE = 0.33, 0.5
SlabPolicyName = Literal["fit", "tile"]


@dataclass(frozen=True)
class Decision:
    """One setting of a plan and why it has this value."""

    key: str
    """Dotted key of `Settings`."""
    value: Any
    reason: str
    """One line."""

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {"key": self.key, "value": self.value, "reason": self.reason}


@dataclass(frozen=True)
class VoxelChoice:
    """Voxel size and slab policy, which are chosen together."""

    spacing_mm: Float3
    spacing_reason: str
    policy: SlabPolicyName
    policy_reason: str


def choose_voxels(
    fingerprint: DatasetFingerprint, wanted: tuple[Float3, str] | None = None
) -> VoxelChoice:
    """Choose voxel size and slab policy.

    The voxel size is nnU-Net's: the median per axis, and the 10th percentile for an anisotropic
    axis. If the structures then need more than 64 slices, slices become thicker as far as small
    lesions and in-plane voxels allow; otherwise slabs overlap (`tile`) at the original thickness.

    Args:
        fingerprint: The data.
        wanted: Voxel size with a reason; the slab policy is then chosen for it. None: by the rule.
    """
    spacing, reason = wanted or median_spacing(fingerprint)
    needed = slices_needed(fingerprint, spacing[0])
    if needed <= SLICES:
        # With the wanted thickness one slab holds everything, so nothing is lost along z.
        return VoxelChoice(
            round_spacing(spacing),
            reason,
            "fit",
            f"the structures and {MARGIN_MM:g} mm need {needed:.0f} slices in "
            f"{COVERED_PERCENTILE} % of the scans; a slab has {SLICES}",
        )
    thicker = spacing[0] * needed / SLICES
    limit, limit_reason = thickest_slice(fingerprint, spacing)
    if thicker <= limit and wanted is None:
        # Upwards, so that rounding does not leave the last slice out.
        z = float(np.ceil(thicker * 100) / 100)
        return VoxelChoice(
            (z, *round_spacing(spacing)[1:]),
            f"{reason}; z from {spacing[0]:.3g} to {z:.3g} mm, so that one slab holds all "
            f"structures (limit {limit:.3g} mm: {limit_reason})",
            "fit",
            f"{SLICES} slices of {z:.3g} mm hold the structures and {MARGIN_MM:g} mm in "
            f"{COVERED_PERCENTILE} % of the scans",
        )
    # Tiles at in-plane thickness: thinner slices would only multiply the number of tiles.
    plane = max(spacing[1:])
    if wanted is None and spacing[0] < plane:
        reason += (
            f"; z from {spacing[0]:.3g} to {plane:.3g} mm, as in plane: {SLICES} slices are few"
        )
        spacing = (plane, *spacing[1:])
        needed = slices_needed(fingerprint, plane)
    return VoxelChoice(
        round_spacing(spacing),
        reason,
        "tile",
        f"the structures need {needed:.0f} slices, a slab has {SLICES}; one slab would need "
        f"slices of {thicker:.3g} mm (limit {limit:.3g} mm: {limit_reason})",
    )


def median_spacing(fingerprint: DatasetFingerprint) -> tuple[Float3, str]:
    """Return nnU-Net's voxel size (z, y, x) in mm, and the reason."""
    spacings = fingerprint.spacings_mm
    target = np.median(spacings, axis=0)
    shape = np.median(fingerprint.content_shapes, axis=0)
    reason = f"nnU-Net: median voxel size of {count_text(len(spacings), 'scan')}"
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    # Both conditions as in nnU-Net: long voxels alone, in a scan of many slices, are no reason.
    is_coarse = target[worst] > ANISOTROPY * target[others].max()
    is_short = shape[worst] * ANISOTROPY < shape[others].min()
    if is_coarse and is_short:
        finer = float(np.percentile(spacings[:, worst], ANISOTROPIC_PERCENTILE))
        # Not finer than the other axes, as in nnU-Net.
        target[worst] = max(finer, target[others].max())
        reason += (
            f"; along {'zyx'[worst]} the {ANISOTROPIC_PERCENTILE}th percentile, because its voxels "
            f"are over {ANISOTROPY:g} times longer"
        )
    z, y, x = (float(step) for step in target)
    return (z, y, x), reason


def round_spacing(spacing_mm: Float3) -> Float3:
    """Return a voxel size in steps of 0.001 mm, for the file."""
    z, y, x = (round(step, 3) for step in spacing_mm)
    return z, y, x


def slices_needed(fingerprint: DatasetFingerprint, z_mm: float) -> float:
    """Return the slices that hold the structures and the margin in most scans."""
    if not len(fingerprint.foregrounds_mm):
        # Without structures the slab must hold the scan.
        return float(np.percentile(fingerprint.heights_mm, COVERED_PERCENTILE)) / z_mm
    lengths = []
    for case, height in zip(fingerprint.cases, fingerprint.heights_mm, strict=True):
        if any(case.foreground_mm):
            # The margin ends at the last slice of the scan.
            lengths.append(min(float(height), case.foreground_mm[0] + 2 * MARGIN_MM))
    return float(np.percentile(lengths, COVERED_PERCENTILE)) / z_mm


# 90 % of the scans: one unusually tall scan must not make all slices thicker.


def thickest_slice(fingerprint: DatasetFingerprint, spacing_mm: Float3) -> tuple[float, str]:
    """Return the thickest slice in mm that loses nothing essential, and what limits it."""
    plane = max(spacing_mm[1:])
    limit, reason = ANISOTROPY * plane, f"{ANISOTROPY:g} times the in-plane voxel"
    diameters = fingerprint.lesion_diameters_mm
    if len(diameters):
        smallest = float(np.percentile(diameters, 10))
        if smallest / SLICES_PER_LESION < limit:
            limit = smallest / SLICES_PER_LESION
            reason = f"a lesion of {smallest:.1f} mm, the 10th percentile, in 3 slices"
    # The scans' own slices may already be thicker.
    return max(limit, spacing_mm[0]), reason


# --- patch --------------------------------------------------------------------------------------


def stored_shape(fingerprint: DatasetFingerprint, spacing_mm: Float3) -> Float3:
    """Return the median content (z, y, x) of a slab in voxels."""
    z, y, x = (float(edge) for edge in np.median(fingerprint.shapes_at(spacing_mm), axis=0))
    return min(z, float(SLICES)), y, x


def wanted_patch(
    fingerprint: DatasetFingerprint, spacing_mm: Float3, max_levels: int
) -> tuple[Index3, str]:
    """Return the patch that would be used with any amount of memory, and the reason."""
    median = stored_shape(fingerprint, spacing_mm)
    spacing = np.array(spacing_mm)
    # nnU-Net starts with a cube in mm, so that the field of view is the same in all directions.
    cubic = REFERENCE_EDGE * np.cbrt(spacing.prod()) / spacing
    edges = np.minimum(cubic, median)
    reason = "the median scan" if (edges == median).all() else "nnU-Net's cubic start"
    if len(fingerprint.foregrounds_mm):
        boxes = np.percentile(fingerprint.foregrounds_mm, COVERED_PERCENTILE, axis=0)
        field = CONTEXT * boxes / spacing
        # Along z the slab has placed the structures already.
        field[0] = edges[0]
        if (field < edges).any():
            edges = np.minimum(edges, field)
            reason = f"the structures and {100 * (CONTEXT - 1):.0f} % of context"
    z, y, x = (max(MIN_EDGE, round(float(edge))) for edge in edges)
    return pad_patch((z, y, x), spacing_mm, max_levels), reason


def pad_patch(patch: Index3, spacing_mm: Float3, max_levels: int) -> Index3:
    """Return the smallest patch that holds this one and that the network can halve."""
    strides, _ = plan_pooling(patch, spacing_mm, max_levels)
    edges = []
    for edge, divisor in zip(patch, size_multiple(strides), strict=True):
        edges.append(-(-edge // divisor) * divisor)
    z, y, x = edges
    return z, y, x


def smaller_patches(
    largest: Index3, median: Sequence[float], spacing_mm: Float3, max_levels: int
) -> list[Index3]:
    """Return patches from the largest to the smallest useful one.

    As in nnU-Net, the axis that is longest relative to the median scan is shortened, by as much as
    the pooling of that axis demands, and the pooling is planned again.
    """
    patches = [largest]
    while True:
        patch = list(patches[-1])
        # Relative to the scan: the axis on which the patch sees most of the scan loses least.
        ratios = np.array(patch) / np.array(median)
        for axis in np.argsort(-ratios, kind="stable"):
            shorter = _shorten(patch, int(axis), spacing_mm, max_levels)
            if shorter is not None:
                patches.append(shorter)
                break
        else:
            return patches


def _shorten(patch: Sequence[int], axis: int, spacing_mm: Float3, max_levels: int) -> Index3 | None:
    """Return the next smaller patch along an axis; None if it would be too small."""
    edges = list(patch)
    strides, _ = plan_pooling(edges, spacing_mm, max_levels)
    edges[axis] -= size_multiple(strides)[axis]
    # A shorter edge may be halved less often, and then smaller steps are possible (nnU-Net).
    if edges[axis] >= MIN_PATCH_EDGE:
        strides, _ = plan_pooling(edges, spacing_mm, max_levels)
        edges[axis] = patch[axis] - size_multiple(strides)[axis]
    if edges[axis] < MIN_PATCH_EDGE:
        return None
    z, y, x = edges
    padded = pad_patch((z, y, x), spacing_mm, max_levels)
    return padded if np.prod(padded) < np.prod(list(patch)) else None


# --- batch, sampling, splits --------------------------------------------------------------------


def largest_batch(fingerprint: DatasetFingerprint, voxels: VoxelChoice, patch: Index3) -> int:
    """Return nnU-Net's limit: a batch sees at most 5 % of the data's voxels, at least 2 samples."""
    median = np.median(fingerprint.shapes_at(voxels.spacing_mm), axis=0)
    # A slab has 64 slices at most, so a taller scan counts only as far as it is stored.
    if voxels.policy == "fit":
        median[0] = min(median[0], SLICES)
    total = float(median.prod()) * len(fingerprint.cases)
    return max(2, round(0.05 * total / float(np.prod(patch))))


def choose_oversampling(fingerprint: DatasetFingerprint) -> tuple[float, str]:
    """Return the share of samples that are centred on a structure, and the reason."""
    if not len(fingerprint.lesion_diameters_mm):
        return COMMON_SHARE, "nnU-Net's share; no structure is a lesion"
    fraction = fingerprint.lesion_fraction()
    if fraction >= RARE_LESION_FRACTION:
        return COMMON_SHARE, f"nnU-Net's share; lesions are {100 * fraction:.2g} % of the voxels"
    reason = f"lesions are only {100 * fraction:.2g} % of the voxels; nnU-Net's share is 0.33"
    return RARE_SHARE, reason


def choose_steps(cases: int, batch: int) -> tuple[int, str]:
    """Return the optimizer steps, and the reason."""
    # Small data sets would be seen hundreds of times more often than nnU-Net sees Task03's cases.
    samples = min(NNUNET_SAMPLES, SAMPLES_PER_CASE * cases)
    steps = max(MIN_STEPS, round(samples / batch))
    if samples == NNUNET_SAMPLES:
        return steps, f"nnU-Net's {NNUNET_SAMPLES:,} samples (1000 epochs of 250 steps of 2)"
    return steps, (
        f"{SAMPLES_PER_CASE:,} samples per case, as nnU-Net's {NNUNET_SAMPLES:,} are for "
        "Task03_Liver"
    )


def count_text(number: int, noun: str) -> str:
    """Return `1 case` or `3 cases`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def choose_splits(cases: int) -> list[Decision]:
    """Return the settings of the splits where the defaults do not suit the number of cases."""
    if cases >= 25:
        return []
    found = []
    if cases < 10:
        reason = f"{count_text(cases, 'case')}: a test set would hold one or two and judge nothing"
        found.append(Decision("convert.splits.test_fraction", 0.0, reason))
    # At least two cases to validate on, if there are enough cases.
    folds = max(2, min(5, cases // 2))
    if folds < 5:
        reason = f"{count_text(cases, 'case')}: each fold validates on two or more if possible"
        found.append(Decision("convert.splits.folds", folds, reason))
    if cases == 1:
        reason = "one case: train on it, there is nothing to validate on"
        found.append(Decision("data.fold", "all", reason))
    return found
