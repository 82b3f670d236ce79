"""Check scans before segmentation and masks after it.

Before: a scan that conversion excludes is refused, and what conversion warns about is a warning.
Then the scan is compared with the training data (voxel size, range of intensities). After: the
checks of the audit that need a label are applied to the predicted mask. `predict`, `evaluate` and
`postprocess` check every scan that they read from a file, so no volume is reported for an
unsuitable scan without a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from liverseg_dist.config import ChannelConfig, Settings
from liverseg_dist.data.audit.anatomy import find_reference_organ, healthy_mask, known_organs
from liverseg_dist.data.audit.image_audit import LIVER_HU, audit_image, sample_voxels
from liverseg_dist.data.audit.label_checks import check_lesions, check_side, check_volume
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.nifti import ScanFile
from liverseg_dist.errors import RunFailed
from liverseg_dist.inference.structure_settings import list_main_organs
from liverseg_dist.inference.structure_values import select_values
from liverseg_dist.labels import BACKGROUND, Structure
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Grid, Index3, Volume

LOOKS_LIKE_CT = "looks_like_ct"
"""Code of the audit's finding about a CT that is declared as something else."""
CHECKS_VERSION = 1
"""Part of the ledgers' fingerprints: increase it when a scan is accepted or refused differently."""
MAX_SPACING_RATIO = 3.0
"""A voxel edge longer than this many times that of the training data gives a warning."""
MIN_SHARE_IN_RANGE = 0.005
"""Share of a scan's voxels within the clipping range of the training; a liver has about 3 %."""
OVERVIEW_MIN_VOXELS = 128
"""Voxels per axis of the coarse copy for the checks after segmentation; less than twice as many."""
MAX_END_AREA_SHARE = 0.1
"""The liver is cut off if its area in an end slice exceeds this share of its largest area."""


class ScanRefused(RunFailed):
    """A scan that conversion would exclude.

    It is no error of the call, so the other scans are segmented.

    Attributes:
        findings: all findings of the scan.
    """

    def __init__(self, name: str, findings: Sequence[Finding]) -> None:
        # Warnings as well: a header in cm is a warning, and the cause of too few slices.
        messages = []
        for severity in ("error", "warning"):
            messages += [finding.message for finding in findings if finding.severity == severity]
        reasons = "; ".join(messages)
        super().__init__(f"{name}: refused: {reasons} (--force segments it all the same)")
        self.findings = tuple(findings)


@dataclass(frozen=True)
class Overview:
    """A coarse copy of a scan, small enough to keep while the scan is segmented.

    Attributes:
        image: the copy, in RAS orientation.
        steps: every n-th voxel of the scan is in the copy (z, y, x).
        channel: number of the run's channel that it is a copy of.
    """

    image: Volume
    steps: Index3
    channel: int = 0

    @classmethod
    def from_scan(cls, scan: Volume, channel: int = 0) -> "Overview":
        """The coarse copy of one channel of a scan."""
        canonical = scan.reoriented(CANONICAL_ORIENTATION)
        # About as many voxels for any scan, so that the check costs the same for each.
        z, y, x = (max(1, n // OVERVIEW_MIN_VOXELS) for n in canonical.shape)
        return cls(_subsample(canonical, (z, y, x)), (z, y, x), channel)

    def subsample_mask(self, mask: Volume) -> Volume:
        """The voxels of a mask that this copy has of the scan."""
        return _subsample(mask.reoriented(CANONICAL_ORIENTATION), self.steps)


def fingerprint_scan_checks(settings: Settings) -> dict[str, object]:
    """Everything that decides whether a scan is refused, for the key of a ledger."""
    cleaning = settings.convert.cleaning
    return {
        "version": CHECKS_VERSION,
        "min_slices": cleaning.min_slices,
        "max_broken_fraction": cleaning.max_broken_fraction,
    }


def check_channels(
    channels: Sequence[ScanFile | None], settings: Settings, label: Volume | None = None
) -> list[Finding]:
    """Findings of all channels of a scan before it is segmented.

    Args:
        channels: one for each channel of the run; None for an absent one.
        settings: the resolved settings of the run that will segment it.
        label: the true class values on the grid of the first channel that the scan has, where they
            are known (evaluation).
    """
    found = []
    for number, read in enumerate(channels):
        if read is None:
            continue
        findings = check_scan(read.volume, read.notes, settings, label, number)
        # The label is that of the first channel's grid.
        # The first channel consumes it: the others lie on grids of their own until they are
        # resampled.
        label = None
        if len(channels) > 1:
            name = settings.data.image_channels[number].name
            findings = [replace(one, message=f"{name}: {one.message}") for one in findings]
        found += findings
    return found


def check_scan(
    scan: Volume,
    notes: Sequence[Finding],
    settings: Settings,
    label: Volume | None = None,
    number: int = 0,
) -> list[Finding]:
    """Findings of one channel of a scan before it is segmented.

    Args:
        scan: the channel on its own voxels; HU for CT.
        notes: findings of the reader.
        settings: the resolved settings of the run that will segment it.
        label: the true labels on the scan's grid, where they are known (evaluation).
        number: number of the run's channel.
    """
    channel = settings.data.image_channels[number]
    findings = audit_channel(scan, channel, settings, notes, label)
    # A refused scan differs from the training data for the reason that is reported already.
    if not is_refused(findings):
        findings += compare_with_training(scan, settings, number)
    return findings


def audit_channel(
    scan: Volume,
    channel: ChannelConfig,
    settings: Settings,
    notes: Sequence[Finding],
    label: Volume | None,
) -> list[Finding]:
    """The findings of the audit of conversion, by the channel's modality."""
    findings, _ = audit_image(
        scan, settings.convert.cleaning, notes, label, channel, settings.data.label_scheme
    )
    checked = []
    for finding in findings:
        # Conversion warns of a wrong declaration; a network for other values gives nonsense.
        if finding.code == LOOKS_LIKE_CT:
            message = (
                f"the run was trained on {channel.name} ({channel.modality}), but the values are "
                "those of a CT in HU (air near -1000)"
            )
            checked.append(Finding("error", finding.code, message))
        else:
            checked.append(finding)
    return checked


def is_refused(findings: Sequence[Finding]) -> bool:
    """Whether one of the findings is an error."""
    return any(finding.severity == "error" for finding in findings)


def compare_with_training(scan: Volume, settings: Settings, number: int = 0) -> list[Finding]:
    """Warnings about a scan that differs from the training data of the network.

    Args:
        scan: one channel.
        settings: the resolved settings of the run.
        number: number of the run's channel.
    """
    found = []
    trained_mm = settings.data.spacing_mm
    if trained_mm is not None:
        spacing_mm = scan.reoriented(CANONICAL_ORIENTATION).spacing_mm
        found += _compare_spacing(spacing_mm, trained_mm)
    intensity = settings.data.intensities[number]
    sample = sample_voxels(scan)
    if intensity is not None and sample.size:
        is_in_range = (sample >= intensity.lower_hu) & (sample <= intensity.upper_hu)
        # Raw detector values or another unit leave hardly any voxel in the range.
        share = float(np.mean(is_in_range))
        if share < MIN_SHARE_IN_RANGE:
            unit = _name_unit(settings, number)
            message = (
                f"{100 * share:.2f} % of the voxels lie in the range the network was trained on "
                f"({intensity.lower_hu:g} to {intensity.upper_hu:g}{unit})"
            )
            found.append(Finding("warning", "intensity_unlike_training", message))
    return found


def _name_unit(settings: Settings, number: int) -> str:
    return " HU" if settings.data.image_channels[number].modality == "CT" else ""


def _compare_spacing(spacing_mm: Float3, trained_mm: Float3) -> list[Finding]:
    # Only coarser voxels are a problem: finer ones are averaged.
    limit_mm = MAX_SPACING_RATIO * np.asarray(trained_mm)
    if (np.asarray(spacing_mm) <= limit_mm).all():
        return []
    message = (
        f"voxels of {_format_spacing(spacing_mm)} mm, the network was trained on "
        f"{_format_spacing(trained_mm)} mm (z, y, x): details are lost"
    )
    return [Finding("warning", "coarser_than_training", message)]


def _format_spacing(spacing_mm: Float3) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing_mm)


# --- findings in records, tables and on the terminal ----------------------------------------------


def findings_to_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as a record of a ledger keeps them."""
    return [finding.to_json() for finding in findings]


def select_warnings(findings: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The findings of a record that users need to see: all but those of severity info."""
    return [finding for finding in findings if finding["severity"] != "info"]


def join_warnings(findings: Sequence[Mapping[str, str]]) -> str:
    """One cell of a table: `code: message | code: message`."""
    parts = [f"{finding['code']}: {finding['message']}" for finding in select_warnings(findings)]
    return " | ".join(parts)


def format_warnings(name: str, findings: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines for the terminal: one for each warning, and for each error that --force overrode."""
    lines = []
    for finding in select_warnings(findings):
        reason = finding["message"]
        if finding["severity"] != "warning":
            reason = f"segmented because of --force, although: {reason}"
        lines.append(f"warning: {name}: {reason}")
    return lines


# --- checks of the predicted mask -----------------------------------------------------------------


def check_mask(mask: Volume, overview: Overview, settings: Settings) -> list[Finding]:
    """Warnings about a predicted mask: the checks that the audit makes of a label.

    A network gives a mask for any input. For a scan of a head or an animal the mask is implausible,
    although the scan may pass the other checks. Volume, side and HU are checked for organs of which
    they are known (`data.audit.anatomy`).

    Args:
        mask: class values on the scan's own grid.
        overview: coarse copy of the scan.
        settings: the resolved settings of the run.
    """
    labels = settings.data.label_scheme
    organs = list_main_organs(labels) or labels.structures
    found: list[Finding] = []
    # The end slices of the mask show whether an organ continues outside the scan.
    areas = {organ.name: _count_voxels_per_slice(mask, organ) for organ in organs}
    if not any(area.any() for area in areas.values()):
        names = " and no ".join(areas)
        message = f"no {names} was found: is this a scan of another part of the body?"
        return [Finding("warning", f"{organs[0].name}_volume", message)]
    for organ, anatomy in known_organs(labels):
        area = areas.get(organ.name)
        # Organs with known anatomy that are no main organ, such as the kidneys beside the liver.
        if area is None:
            area = _count_voxels_per_slice(mask, organ)
        found += check_volume(organ, anatomy, float(area.sum()) * mask.grid.voxel_volume_ml)
    for name, area in areas.items():
        if area.any():
            found += _check_end_slices(area, name)
    for lesion in labels.lesions:
        if lesion.inside is not None:
            found += check_lesions(mask.voxels, labels, lesion)[1]
    coarse_mask = overview.subsample_mask(mask)
    # A small structure can fall between the voxels of the coarse copy.
    if not (coarse_mask.voxels != BACKGROUND).any():
        return found
    channel = settings.data.image_channels[overview.channel]
    found += check_side(overview.image, coarse_mask, {}, channel, labels)
    reference = find_reference_organ(labels)
    if channel.is_ct and reference is not None:
        tissue = healthy_mask(coarse_mask.voxels, labels, reference)
        found += _check_organ_hu(overview, tissue, reference.name, settings)
    return found


def _count_voxels_per_slice(mask: Volume, organ: Structure) -> np.ndarray:
    """Voxels of an organ with its lesions in each axial slice, from the lowest one."""
    canonical = mask.reoriented(CANONICAL_ORIENTATION)
    counts = []
    for slice_yx in canonical.voxels:
        counts.append(np.count_nonzero(select_values(slice_yx, organ.values)))
    return np.array(counts)


def _check_end_slices(areas: np.ndarray, organ: str) -> list[Finding]:
    names = []
    for name, area in (("lowest", areas[0]), ("highest", areas[-1])):
        if area > MAX_END_AREA_SHARE * areas.max():
            names.append(name)
    if not names:
        return []
    message = (
        f"the {organ} reaches the scan's {' and '.join(names)} slice: a part of it is not in the "
        "scan"
    )
    return [Finding("warning", f"{organ}_cut", message)]


def _check_organ_hu(
    overview: Overview, tissue: np.ndarray, organ: str, settings: Settings
) -> list[Finding]:
    values = overview.image.voxels[tissue].astype(np.float32)
    values = values[np.isfinite(values)]
    if not values.size:
        return []
    median = float(np.median(values))
    if not LIVER_HU[0] <= median <= LIVER_HU[1]:
        message = (
            f"the predicted {organ}'s median is {median:.0f} HU, which is implausible for a {organ}"
        )
        return [Finding("warning", f"{organ}_hu_implausible", message)]
    intensity = settings.data.intensities[overview.channel]
    if intensity is None or intensity.lower_hu <= median <= intensity.upper_hu:
        return []
    message = (
        f"the predicted {organ}'s median is {median:.0f} HU, outside the range of the {organ}s in "
        f"the training data ({intensity.lower_hu:g} to {intensity.upper_hu:g} HU)"
    )
    return [Finding("warning", f"{organ}_hu_unlike_training", message)]


def _subsample(volume: Volume, steps: Index3) -> Volume:
    """Every n-th voxel along each axis, copied."""
    z, y, x = steps
    # A copy: a view would keep the whole volume in memory.
    voxels = np.ascontiguousarray(volume.voxels[::z, ::y, ::x])
    affine = volume.affine.copy()
    affine[:3, :3] = affine[:3, :3] * np.array([x, y, z])
    return Volume(voxels, Grid(voxels.shape, affine))
