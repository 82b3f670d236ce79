"""The fingerprint of a raw data set: what the rules of `experiment_rules` need to know of it.

It holds geometry, sizes of structures and lesions, and quantiles of the foreground intensities. It
holds no voxels and no header text, so it can be kept as a small JSON file. The idea and most of its
content are those of nnU-Net (https://www.nature.com/articles/s41592-020-01008-z, "Dataset
fingerprint"). Arrays are z, y, x in RAS orientation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from liverseg_dist.config import ChannelConfig
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Float3, Index3

QUANTILES = tuple(float(q) for q in np.linspace(0, 1, 201))
"""In steps of 0.5 %, because CT is clipped to the 0.5 and 99.5 percentiles."""


@dataclass(frozen=True)
class ForegroundIntensity:
    """Values of one channel inside the labelled structures of one case."""

    mean: float
    std: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""


@dataclass(frozen=True)
class CaseFingerprint:
    """What is known of one labelled scan."""

    case_id: str
    files: tuple[tuple[str, int, int], ...]
    """Name, bytes and modification time (ns) of its files: they decide if the entry is current."""
    shape: Index3
    content_shape: Index3
    """Box of the voxels that are not 0 in every channel, as nnU-Net crops scans."""
    spacing_mm: Float3
    foreground_mm: Float3
    """Edges of the box around all labelled structures; zeros for an empty label."""
    structure_voxels: Mapping[str, int]
    lesion_diameters_mm: Mapping[str, tuple[float, ...]]
    """Per structure of kind lesion: the diameters of spheres with the volumes of its components."""
    intensities: tuple[ForegroundIntensity | None, ...]
    """One per channel, None for an absent one; empty for an empty label."""

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CaseFingerprint":
        """Return the entry that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        intensities: list[ForegroundIntensity | None] = []
        for entry in data["intensities"]:
            if entry is None:
                intensities.append(None)
                continue
            quantiles = tuple(float(value) for value in entry["quantiles"])
            # Entries of another version have other quantiles and cannot be pooled with these.
            if len(quantiles) != len(QUANTILES):
                raise ValueError("another number of quantiles")
            intensities.append(
                ForegroundIntensity(float(entry["mean"]), float(entry["std"]), quantiles)
            )
        diameters = {}
        for name, values in data["lesion_diameters_mm"].items():
            diameters[str(name)] = tuple(float(value) for value in values)
        return cls(
            case_id=str(data["case_id"]),
            files=tuple((str(n), int(size), int(time)) for n, size, time in data["files"]),
            shape=_to_index3(data["shape"]),
            content_shape=_to_index3(data["content_shape"]),
            spacing_mm=_to_float3(data["spacing_mm"]),
            foreground_mm=_to_float3(data["foreground_mm"]),
            structure_voxels={str(k): int(v) for k, v in data["structure_voxels"].items()},
            lesion_diameters_mm=diameters,
            intensities=tuple(intensities),
        )


@dataclass(frozen=True)
class DatasetFingerprint:
    """The labelled scans of a data set, its channels and its structures."""

    name: str
    scheme: LabelScheme
    channels: tuple[ChannelConfig, ...]
    cases: tuple[CaseFingerprint, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """(case, reason) of scans that cannot be read."""
    notes: tuple[str, ...] = field(default=())
    """Assumptions about the data set, one line each."""

    @cached_property
    def spacings_mm(self) -> np.ndarray:
        """Voxel sizes, (cases, 3)."""
        return np.array([case.spacing_mm for case in self.cases], dtype=float)

    @cached_property
    def content_shapes(self) -> np.ndarray:
        """Voxels of the content boxes, (cases, 3)."""
        return np.array([case.content_shape for case in self.cases], dtype=float)

    @cached_property
    def heights_mm(self) -> np.ndarray:
        """Length of each scan along z."""
        return np.array([case.shape[0] * case.spacing_mm[0] for case in self.cases])

    @cached_property
    def foregrounds_mm(self) -> np.ndarray:
        """Edges of the foreground boxes, (cases with foreground, 3); may be empty."""
        boxes = [case.foreground_mm for case in self.cases if any(case.foreground_mm)]
        return np.array(boxes, dtype=float).reshape(-1, 3)

    @cached_property
    def lesion_diameters_mm(self) -> np.ndarray:
        """Diameters of all lesions of all kinds, ascending."""
        found: list[float] = []
        for case in self.cases:
            for diameters in case.lesion_diameters_mm.values():
                found += diameters
        return np.sort(np.array(found, dtype=float))

    def lesion_fraction(self) -> float:
        """Return the share of lesion voxels in the content boxes of all cases."""
        names = [structure.name for structure in self.scheme.lesions]
        # Lesions may overlap as structures (a part inside a whole); the sum is an upper bound
        # then.
        lesion = sum(case.structure_voxels.get(n, 0) for case in self.cases for n in names)
        return lesion / max(1.0, float(self.content_shapes.prod(axis=1).sum()))

    def shapes_at(self, spacing_mm: Float3) -> np.ndarray:
        """Return the content shapes (cases, 3) after resampling to a voxel size."""
        return self.content_shapes * self.spacings_mm / np.array(spacing_mm)

    def foreground_percentiles(self, channel: int, percentiles: tuple[float, ...]) -> list[float]:
        """Return percentiles of a channel's foreground values; each case has the same weight."""
        pooled: list[float] = []
        # Quantiles and not voxels are pooled, so that large scans do not outweigh small ones.
        for case in self.cases:
            found = case.intensities[channel] if case.intensities else None
            if found is not None:
                pooled += found.quantiles
        return [float(v) for v in np.percentile(pooled, percentiles)] if pooled else []

    def to_summary(self) -> dict[str, Any]:
        """Return the figures that the rules use, for `--json`."""
        diameters = self.lesion_diameters_mm
        channels = []
        for number, channel in enumerate(self.channels):
            values = self.foreground_percentiles(number, (0.5, 50, 99.5))
            shown = {
                "name": channel.name,
                "modality": channel.modality,
                "intensity": channel.intensity,
            }
            channels.append(shown | {"foreground_0.5_50_99.5": _rounded(values)})
        quantiles = (10, 50, 90)
        summary: dict[str, Any] = {
            "name": self.name,
            "cases": len(self.cases),
            "left_out": [{"case": case, "reason": reason} for case, reason in self.left_out],
            "structures": [structure.name for structure in self.scheme.structures],
            "channels": channels,
            "spacing_mm_median": _rounded(np.median(self.spacings_mm, axis=0)),
            "shape_median": _rounded(np.median([case.shape for case in self.cases], axis=0)),
            "content_shape_median": _rounded(np.median(self.content_shapes, axis=0)),
            "lesions": len(diameters),
        }
        if len(self.foregrounds_mm):
            summary["foreground_mm_p90"] = _rounded(np.percentile(self.foregrounds_mm, 90, axis=0))
        if len(diameters):
            summary["lesion_diameter_mm_p10_p50_p90"] = _rounded(
                np.percentile(diameters, quantiles)
            )
        return summary


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]


def _to_index3(values: Any) -> Index3:
    z, y, x = (int(value) for value in values)
    if min(z, y, x) < 1:
        raise ValueError("a shape has positive edges")
    return z, y, x


def _to_float3(values: Any) -> Float3:
    z, y, x = (float(value) for value in values)
    return z, y, x
