"""The channels of a scan, cleaned and brought onto one grid.

    clean_channels       clean each channel, check that they belong together, register if asked for
    resample_channels    one array (C, z, y, x) on a grid; conversion calls it for each slab
    prepare_channels     both for a new scan, on the voxel size of a run

The first channel that a scan has is the reference: its grid, its label and its slabs. Each other
channel is resampled once, from its own voxels onto the final grid, in world space. An absent channel
is all 0, before and after normalisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from liverseg_dist.config import ChannelConfig, ConvertConfig, IntensityConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.channel_overlap import check_overlap
from liverseg_dist.data.preprocessing.channel_registration import register_rigid
from liverseg_dist.data.preprocessing.pipeline import CleanScan, clean_scan, resample_channel
from liverseg_dist.data.preprocessing.scan_intensity import scan_intensity
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Float3, Grid, Volume


@dataclass(frozen=True)
class CleanChannels:
    """The channels of a scan at their own voxel sizes.

    Attributes:
        channels: What each channel is.
        scans: The cleaned channels; None for an absent one.
        intensities: Normalisation of each channel; None where it is that of the data set, or where
            the channel is absent.
        findings: About registration and overlap.
    """

    channels: tuple[ChannelConfig, ...]
    scans: tuple[CleanScan | None, ...]
    intensities: tuple[IntensityConfig | None, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def present(self) -> tuple[bool, ...]:
        return tuple(scan is not None for scan in self.scans)

    @property
    def reference_channel(self) -> int:
        """Number of the first channel that the scan has."""
        return self.present.index(True)

    @property
    def reference(self) -> CleanScan:
        """The first channel that the scan has."""
        scan = self.scans[self.reference_channel]
        assert scan is not None
        return scan

    @property
    def provenance(self) -> dict[str, Any]:
        """What was done to the scan as JSON: of the reference, and `channels` for the others."""
        provenance: dict[str, Any] = dict(self.reference.provenance)
        others = {}
        for number, (channel, scan) in enumerate(zip(self.channels, self.scans, strict=True)):
            if scan is not None and number != self.reference_channel:
                others[channel.name] = scan.provenance
        if others:
            provenance["channels"] = others
        return provenance


@dataclass(frozen=True)
class PreparedScan:
    """The input of a network for one scan.

    Attributes:
        voxels: int16 (C, z, y, x); HU for CT, stored units for other channels, 0 where absent.
        grid: RAS.
        present: Whether the scan has each channel.
        intensities: Normalisation of each channel; None where it is that of the data set, or where
            the channel is absent.
        findings: About registration and overlap.
    """

    voxels: np.ndarray
    grid: Grid
    present: tuple[bool, ...]
    intensities: tuple[IntensityConfig | None, ...]
    findings: tuple[Finding, ...] = ()


def prepare_channels(
    volumes: Sequence[Volume | None],
    convert: ConvertConfig,
    channels: Sequence[ChannelConfig],
    spacing_mm: Float3,
) -> PreparedScan:
    """Clean the channels of a scan and resample them onto one grid.

    Args:
        volumes: One for each channel, in any orientation and spacing; None for an absent one.
        convert: Settings of the conversion.
        channels: The channels, in the order of the network.
        spacing_mm: Voxel size (z, y, x) of the result, as of `pipeline.prepare_scan`.

    Raises:
        UserError: The scan has no channel, or its channels do not overlap in world space.
    """
    clean = clean_channels(volumes, convert, channels)
    grid = clean.reference.volume.grid.with_spacing(spacing_mm)
    voxels = resample_channels(clean, grid, convert)
    return PreparedScan(voxels, grid, clean.present, clean.intensities, clean.findings)


def clean_channels(
    volumes: Sequence[Volume | None], convert: ConvertConfig, channels: Sequence[ChannelConfig]
) -> CleanChannels:
    """Clean the channels of a scan, one after the other.

    Args:
        volumes: One for each channel; None for an absent one.
        convert: Settings of the conversion.
        channels: The channels.

    Raises:
        UserError: The scan has no channel, or its channels do not overlap in world space.
    """
    # A mistake of the caller and not of the data, hence no `UserError`.
    if len(volumes) != len(channels):
        raise ValueError(f"{len(volumes)} volumes for {len(channels)} channels")
    # The other channels are cut by the grid of the reference; a crop of their own could only lose.
    uncropped = convert.cleaning.model_copy(update={"body_margin_mm": -1.0})
    reference: CleanScan | None = None
    reference_name = ""
    scans: list[CleanScan | None] = []
    intensities: list[IntensityConfig | None] = []
    findings: list[Finding] = []
    for channel, volume in zip(channels, volumes, strict=True):
        if volume is None:
            scans.append(None)
            intensities.append(None)
            continue
        if reference is None:
            scan = reference = clean_scan(volume, convert.cleaning, channel)
            reference_name = channel.name
        else:
            scan = clean_scan(volume, uncropped, channel)
            scan, found = _place_channel(scan, reference, convert, (reference_name, channel.name))
            findings += found
        scans.append(scan)
        # On the cleaned scan at its own voxel size, so that inference computes the same numbers.
        intensities.append(scan_intensity(scan.volume, channel, scan.scale))
    if reference is None:
        raise UserError(f"none of the channels {', '.join(c.name for c in channels)} is present")
    return CleanChannels(tuple(channels), tuple(scans), tuple(intensities), tuple(findings))


def _place_channel(
    scan: CleanScan, reference: CleanScan, convert: ConvertConfig, names: tuple[str, str]
) -> tuple[CleanScan, list[Finding]]:
    """Check that a channel overlaps the reference, and register it if the settings ask for it.

    Args:
        scan: The channel.
        reference: The first channel of the scan.
        convert: Settings of the conversion.
        names: Of the reference and of the channel.
    """
    fixed, moving = reference.volume, scan.volume
    share, findings = check_overlap(fixed.grid, moving.grid, *names)
    # Channels that share no place in the world cannot be combined, registered or not.
    if share == 0:
        raise UserError(findings[0].message)
    if convert.register_channels == "none":
        return scan, findings
    alignment = register_rigid(fixed, moving)
    record = {**alignment.to_json(), "applied": alignment.is_better}
    # A registration that is worse than the header must not move the channel.
    if not alignment.is_better:
        message = (
            f"channel {names[1]}: registration to {names[0]} found no better position than that of "
            "the header, which is kept"
        )
        findings = [*findings, Finding("warning", "registration_failed", message)]
    else:
        shift_mm = alignment.shift_mm(moving.grid)
        message = (
            f"channel {names[1]} was moved by {shift_mm:.1f} mm and "
            f"{alignment.rotation_degrees:.1f} degrees onto {names[0]} (mutual information "
            f"{record['mutual_information_before']:.3f} to "
            f"{record['mutual_information_after']:.3f})"
        )
        findings = [*findings, Finding("info", "channel_registered", message)]
        # Only the affine changes: the voxels are interpolated once, later, onto the final grid.
        moving = Volume(moving.voxels, Grid(moving.shape, alignment.matrix @ moving.affine))
    provenance = {**scan.provenance, "registration": record}
    return replace(scan, volume=moving, provenance=provenance), findings


def resample_channels(clean: CleanChannels, grid: Grid, convert: ConvertConfig) -> np.ndarray:
    """All channels of a scan on a grid, int16 (C, z, y, x); 0 for an absent channel."""
    voxels = np.zeros((len(clean.scans), *grid.shape), dtype=np.int16)
    for target, scan, channel in zip(voxels, clean.scans, clean.channels, strict=True):
        if scan is not None:
            target[...] = resample_channel(scan.volume, grid, convert.cleaning, channel).voxels
    return voxels
