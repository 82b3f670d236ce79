"""The gate of a scan before and after it is segmented: the same audit as conversion, and the training's own data.

Before: what conversion excludes is refused, what it warns of is a warning; then the scan is compared with
what the network was trained on (voxel size, range of intensities). After: the findings of the audit that
need a label are looked for in the predicted mask. predict, evaluate and postprocess call it for every scan
that they read from a file, so no volume is reported of a scan that the network cannot know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.data.audit.case_audit import check_liver_volume, check_side, check_tumours
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.audit_image import LIVER_HU, audit_image, sample_of
from liverseg_dist.errors import RunFailed
from liverseg_dist.labels import BACKGROUND, LIVER
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Grid, Index3, Volume

CHECKS_VERSION = 1
"""Part of the ledgers' fingerprints: raise it when a scan would now be judged otherwise."""
MAX_SPACING_RATIO = 3.0
"""A voxel edge this many times the training's is far from it."""
MIN_SHARE_IN_RANGE = 0.005
"""Share of a scan's voxels within the clip of training; a liver alone is about 3 %."""
OVERVIEW_MIN_VOXELS = 128
"""Along each axis, at most about twice as many, of the coarse copy for the checks after segmentation."""
MAX_END_AREA_SHARE = 0.1
"""The liver is cut if its area in an end slice is above this share of its largest one."""


class ScanRefused(RunFailed):
    """A scan that conversion would exclude. No mistake in the call: the other scans go on."""

    def __init__(self, name: str, findings: Sequence[Finding]) -> None:
        # Warnings as well: a header in cm is a warning, and the reason why there are too few slices.
        ordered = [
            f for severity in ("error", "warning") for f in findings if f.severity == severity
        ]
        reasons = "; ".join(finding.message for finding in ordered)
        super().__init__(f"{name}: refused: {reasons} (--force segments it all the same)")
        self.findings = tuple(findings)


@dataclass(frozen=True)
class Overview:
    """A coarse copy of a scan (RAS), small enough to keep while the scan itself is segmented."""

    image: Volume
    steps: Index3

    @classmethod
    def from_scan(cls, scan: Volume) -> "Overview":
        canonical = scan.reoriented(CANONICAL_ORIENTATION)
        z, y, x = (max(1, n // OVERVIEW_MIN_VOXELS) for n in canonical.shape)
        return cls(_subsample(canonical, (z, y, x)), (z, y, x))

    def subsample_mask(self, mask: Volume) -> Volume:
        """The mask in the same voxels."""
        return _subsample(mask.reoriented(CANONICAL_ORIENTATION), self.steps)


def fingerprint_scan_checks(settings: Settings) -> dict[str, object]:
    """What decides whether a scan is refused, for the key of a ledger."""
    cleaning = settings.convert.cleaning
    return {
        "version": CHECKS_VERSION,
        "min_slices": cleaning.min_slices,
        "max_broken_fraction": cleaning.max_broken_fraction,
    }


def check_scan(
    scan: Volume, notes: Sequence[Finding], settings: Settings, label: Volume | None = None
) -> list[Finding]:
    """Findings of a scan before it is segmented.

    Args:
        scan: HU on its own voxels.
        notes: findings of the reader.
        settings: the resolved settings of the run that will segment it.
        label: the true labels on the scan's grid, where they are known (evaluation).
    """
    findings, _ = audit_image(scan, settings.convert.cleaning, notes, label)
    if not is_refused(findings):  # else the comparison would repeat the reason in other words
        findings += compare_with_training(scan, settings)
    return findings


def is_refused(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def compare_with_training(scan: Volume, settings: Settings) -> list[Finding]:
    """Warnings about a scan that is a CT, but unlike those that the network was trained on."""
    found = []
    trained = settings.data.spacing_mm
    if trained is not None:
        found += _compare_spacing(scan.reoriented(CANONICAL_ORIENTATION).spacing_mm, trained)
    known = settings.data.intensity
    sample = sample_of(scan)
    if known is not None and sample.size:
        inside = float(np.mean((sample >= known.lower_hu) & (sample <= known.upper_hu)))
        if inside < MIN_SHARE_IN_RANGE:
            message = (
                f"{100 * inside:.2f} % of the voxels lie in the range the network was trained on "
                f"({known.lower_hu:g} to {known.upper_hu:g} HU)"
            )
            found.append(Finding("warning", "intensity_unlike_training", message))
    return found


def _compare_spacing(spacing_mm: Float3, trained_mm: Float3) -> list[Finding]:
    if all(
        mm <= MAX_SPACING_RATIO * known for mm, known in zip(spacing_mm, trained_mm, strict=True)
    ):
        return []
    own, theirs = (" x ".join(f"{mm:.3g}" for mm in sizes) for sizes in (spacing_mm, trained_mm))
    message = (
        f"voxels of {own} mm, the network was trained on {theirs} mm (z, y, x): details are lost"
    )
    return [Finding("warning", "coarser_than_training", message)]


# --- in records and tables --------------------------------------------------------------------------------------------


def findings_to_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [finding.to_json() for finding in findings]


def select_warnings(findings: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The findings of a record that a user has to see: all but those of severity info."""
    return [finding for finding in findings if finding["severity"] != "info"]


def join_warnings(findings: Sequence[Mapping[str, str]]) -> str:
    """One cell of a table: `code: message | code: message`."""
    return " | ".join(
        f"{finding['code']}: {finding['message']}" for finding in select_warnings(findings)
    )


def format_warnings(name: str, findings: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines for the terminal, one for each warning, and for each error that --force overrode."""
    lines = []
    for finding in select_warnings(findings):
        forced = (
            "" if finding["severity"] == "warning" else "segmented because of --force, although: "
        )
        lines.append(f"warning: {name}: {forced}{finding['message']}")
    return lines


# --- after segmentation -----------------------------------------------------------------------------------------------


def check_mask(mask: Volume, overview: Overview, settings: Settings) -> list[Finding]:
    """Warnings about a predicted mask (labels on the scan's own grid): what the audit says of a label.

    A network always answers; a head, an animal or an MR shows in what it answers.
    """
    areas = _count_foreground_per_slice(mask)
    liver_ml = float(areas.sum()) * mask.grid.voxel_volume_ml
    if liver_ml == 0:
        message = "no liver was found: is this a scan of another part of the body?"
        return [Finding("warning", "liver_volume", message)]
    found = check_liver_volume(liver_ml)
    found += _check_end_slices(areas)
    found += check_tumours(mask.voxels)[1]
    coarse = overview.subsample_mask(mask)
    if (coarse.voxels != BACKGROUND).any():
        found += check_side(overview.image, coarse, {})
        found += _check_liver_hu(overview.image, coarse, settings)
    return found


def _count_foreground_per_slice(mask: Volume) -> np.ndarray:
    """Voxels of liver and tumour in each axial slice, from the lowest one."""
    canonical = mask.reoriented(CANONICAL_ORIENTATION)
    return np.array([np.count_nonzero(slice_yx) for slice_yx in canonical.voxels])


def _check_end_slices(areas: np.ndarray) -> list[Finding]:
    names = []
    for name, area in (("lowest", areas[0]), ("highest", areas[-1])):
        if area > MAX_END_AREA_SHARE * areas.max():
            names.append(name)
    if not names:
        return []
    message = (
        f"the liver reaches the scan's {' and '.join(names)} slice: a part of it is not in the scan"
    )
    return [Finding("warning", "liver_cut", message)]


def _check_liver_hu(image: Volume, mask: Volume, settings: Settings) -> list[Finding]:
    values = image.voxels[mask.voxels == LIVER].astype(np.float32)
    values = values[np.isfinite(values)]
    if not values.size:
        return []
    median = float(np.median(values))
    if not LIVER_HU[0] <= median <= LIVER_HU[1]:
        message = f"the predicted liver's median is {median:.0f} HU, which no liver has"
        return [Finding("warning", "liver_hu_implausible", message)]
    known = settings.data.intensity
    if known is None or known.lower_hu <= median <= known.upper_hu:
        return []
    message = (
        f"the predicted liver's median is {median:.0f} HU, outside of the training's livers "
        f"({known.lower_hu:g} to {known.upper_hu:g} HU)"
    )
    return [Finding("warning", "liver_hu_unlike_training", message)]


def _subsample(volume: Volume, steps: Index3) -> Volume:
    """Every n-th voxel along each axis, copied."""
    z, y, x = steps
    voxels = np.ascontiguousarray(volume.voxels[::z, ::y, ::x])
    affine = volume.affine.copy()
    affine[:3, :3] = affine[:3, :3] * np.array([x, y, z])
    return Volume(voxels, Grid(voxels.shape, affine))
