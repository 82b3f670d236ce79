"""Metadata of one stored case (one slab of a scan), as a typed record.

The same fields appear in three files: in the attribute of the case's Zarr group, in the record of
the scan and in the root of the store. This module is the only place that defines their JSON form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from liverseg_dist.volume import Float3, Grid


@dataclass(frozen=True)
class StoredCase:
    """What is known of a stored case without reading a voxel."""

    labelled: bool
    grid: Grid
    """Of the stored slab."""
    source_grid: Grid
    """Of the scan's file."""
    valid_slices: tuple[int, int]
    """First slice, and one past the last, that are not padding."""
    class_voxels: tuple[int, ...]
    """Voxels of each class in the stored label, background first."""
    lesions: Mapping[str, int]
    """Connected components of each lesion structure in the stored label."""
    slab_policy: str
    spacing_mm: Float3
    """Voxel size (z, y, x) of the slab."""
    parent: str
    """Id of the scan that the slab was cut from."""
    cleaning: Mapping[str, Any]
    """What each cleaning step did to the scan."""
    source_sha256: str
    annotated: tuple[str, ...] | None = None
    """Names of the annotated structures; None: all of the scheme."""
    present: tuple[bool, ...] | None = None
    """Whether the case has each channel; None: it has all."""
    intensities: tuple[Mapping[str, float] | None, ...] | None = None
    """Normalisation of each channel (`IntensityConfig`), where it is the scan's own; None: all
    channels have the normalisation of the data set."""
    imputed_by: str | None = None
    """Fingerprint of the run that labelled the scan; None for a label made by people."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the case, by its path in the case's folder."""

    @property
    def has_manual_label(self) -> bool:
        """Whether people labelled the case; only these cases take part in statistics and splits."""
        return self.labelled and self.imputed_by is None

    def to_attributes(self) -> dict[str, Any]:
        """JSON of the case's Zarr attribute: every field except the checksums."""
        attributes = {
            "labelled": self.labelled,
            "grid": self.grid.to_json(),
            "source_grid": self.source_grid.to_json(),
            "valid_slices": list(self.valid_slices),
            "class_voxels": list(self.class_voxels),
            "lesions": dict(self.lesions),
            "slab": {"policy": self.slab_policy, "spacing_mm": list(self.spacing_mm)},
            "parent": self.parent,
            "cleaning": dict(self.cleaning),
            "source_sha256": self.source_sha256,
        }
        # The key is absent for manual labels: stores written before labels could be imputed have
        # no such key either, and their bytes must not change when they are converted again.
        if self.imputed_by is not None:
            attributes["imputed_by"] = self.imputed_by
        # The following keys are absent for the common case, which readers assume without them.
        if self.annotated is not None:
            attributes["annotated"] = list(self.annotated)
        if self.present is not None:
            attributes["present"] = list(self.present)
        if self.intensities is not None:
            attributes["intensity"] = [
                None if entry is None else dict(entry) for entry in self.intensities
            ]
        return attributes

    def to_json(self) -> dict[str, Any]:
        """JSON of the case in the record of its scan."""
        return {**self.to_attributes(), "files": dict(self.files)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StoredCase":
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: A field is missing or has another type.
        """
        first, last = data["valid_slices"]
        z_mm, y_mm, x_mm = data["slab"]["spacing_mm"]
        return cls(
            labelled=data["labelled"],
            grid=Grid.from_json(data["grid"]),
            source_grid=Grid.from_json(data["source_grid"]),
            valid_slices=(first, last),
            class_voxels=tuple(data["class_voxels"]),
            lesions=dict(data["lesions"]),
            slab_policy=data["slab"]["policy"],
            spacing_mm=(z_mm, y_mm, x_mm),
            parent=data["parent"],
            cleaning=dict(data["cleaning"]),
            source_sha256=data["source_sha256"],
            annotated=_optional_tuple(data.get("annotated")),
            present=_optional_tuple(data.get("present")),
            intensities=_optional_tuple(data.get("intensity")),
            imputed_by=data.get("imputed_by"),
            files=dict(data["files"]),
        )


def _optional_tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
