"""Quantities of one case: volumes and burden of its structures, and a row of figures for each of
its lesions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation

from liverseg_dist.clinical.components import (
    LITS_CONNECTIVITY,
    Box,
    Component,
    bounding_box,
    cut_faces,
    find_components,
)
from liverseg_dist.clinical.diameters import (
    AxialDiameters,
    longest_diameter_mm,
    measure_axial_diameters,
)
from liverseg_dist.clinical.shape import OrganSurface, sphericity
from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.volume import Float3, Volume

QUANTITIES_VERSION = 2
"""Changes with every change of a definition: stored results of another version are computed
again."""
PROBABILITY_BOUNDS = (0.75, 0.25)
"""Voxels at least this probable make up the low and the high volume."""
SHELL_VOXELS = 2
"""A lesion's probabilities are read this far around its mask."""


@dataclass(frozen=True)
class IntensityStatistics:
    """Of the voxels of a mask, in the image's unit (HU for CT)."""

    mean: float
    sd: float
    p10: float
    median: float
    p90: float


@dataclass(frozen=True)
class VolumeRange:
    """Volume that the probabilities leave open, in ml.

    Attributes:
        low: Voxels with a probability of at least 0.75.
        expected: Sum of the probabilities: a voxel that is half tumour counts half (partial
            volume).
        high: Voxels with a probability of at least 0.25.
    """

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class LesionQuantities:
    """Figures of one lesion, a connected component of a lesion structure.

    Attributes:
        structure: Name of the lesion structure.
        number: From 1 within the structure, by descending volume.
        voxels: Voxels of the mask.
        volume_ml: Voxels times voxel volume; a lower bound where `cut_by` is not empty.
        long_axis_mm: Longest axial diameter (RECIST).
        short_axis_mm: Its longest perpendicular in the same slice (WHO).
        longest_3d_mm: Longest diameter in 3D.
        sphericity: 1 for a ball; None for very small lesions.
        centroid_mm: In patient coordinates, RAS+.
        surface_distance_mm: To the surface of the organ it lies in; None without an organ.
        cut_by: Sides of the scan that cut it (`components.FACES`), `unlabelled` for voxels without
            annotation.
        intensity: None without an image.
        volume_range: None without probabilities.
        channels: As `intensity`, of the scan's further channels in order.
        box: Bounding box in the canonical (RAS) volume, [[start, stop], ...] along z, y, x.
        axes_zyx: Ends of long and short axis as voxel indices in the canonical volume, (4, 3).
    """

    structure: str
    number: int
    voxels: int
    volume_ml: float
    long_axis_mm: float
    short_axis_mm: float
    longest_3d_mm: float
    sphericity: float | None
    centroid_mm: Float3
    surface_distance_mm: float | None
    cut_by: tuple[str, ...]
    intensity: IntensityStatistics | None
    channels: tuple[IntensityStatistics | None, ...]
    volume_range: VolumeRange | None
    box: tuple[tuple[int, int], ...]
    axes_zyx: tuple[Float3, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StructureQuantities:
    """Figures of one structure as a whole.

    Attributes:
        volume_ml: A lower bound where `cut_by` is not empty.
        burden: Of a lesion structure, its share of the organ it lies in; of an organ, the share
            that all lesions inside take together. None where the organ is empty or has no lesion
            structure.
        lesions: Number of components of a lesion structure, None for an organ.
        centroid_mm: In patient coordinates, RAS+; None where the structure is empty.
        intensity: Of the scan's first channel; None without one.
        channels: As `intensity`, of the scan's further channels in order.
    """

    structure: str
    kind: str
    inside: str | None
    voxels: int
    volume_ml: float
    burden: float | None
    lesions: int | None
    centroid_mm: Float3 | None
    cut_by: tuple[str, ...]
    intensity: IntensityStatistics | None
    channels: tuple[IntensityStatistics | None, ...]
    volume_range: VolumeRange | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CaseQuantities:
    """All figures of a case; structures in the scheme's order, lesions by structure and number."""

    structures: tuple[StructureQuantities, ...]
    lesions: tuple[LesionQuantities, ...]
    spacing_mm: Float3
    shape_zyx: tuple[int, int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "spacing_mm": list(self.spacing_mm),
            "shape_zyx": list(self.shape_zyx),
            "structures": [structure.to_json() for structure in self.structures],
            "lesions": [lesion.to_json() for lesion in self.lesions],
        }


def quantify_case(
    mask: Volume,
    scheme: LabelScheme,
    image: Volume | None = None,
    probabilities: Mapping[str, Volume] | None = None,
    connectivity: int = LITS_CONNECTIVITY,
    channels: Sequence[Volume | None] = (),
) -> CaseQuantities:
    """Measure every structure and every lesion of a mask.

    Args:
        mask: Label values of the scheme (uint8), in any orientation.
        scheme: What the values mean.
        image: The scan on the mask's grid, for intensity statistics.
        probabilities: By structure name, probabilities (0 to 1) on the mask's grid.
        connectivity: Neighbours that make one lesion: 6, 18 or 26.
        channels: Further channels of the scan on the mask's grid, None for an absent one.

    Raises:
        ValueError: Image or probabilities lie on another grid.
    """
    for other in (image, *channels, *(probabilities or {}).values()):
        # Resampling here would hide that the files belong to different scans.
        if other is not None and not other.grid.matches(mask.grid):
            raise ValueError("image and probabilities lie on the mask's grid")
    scan = _Scan(
        # Axial slices, sides and pictures are defined in this orientation only.
        mask.reoriented(),
        scheme,
        None if image is None else image.reoriented().voxels,
        tuple(None if one is None else one.reoriented().voxels for one in channels),
        {name: volume.reoriented().voxels for name, volume in (probabilities or {}).items()},
        connectivity,
    )
    structures, lesions = [], []
    for structure in scheme.structures:
        of_structure = scan.measure_lesions(structure) if structure.kind == "lesion" else None
        structures.append(scan.measure_structure(structure, of_structure))
        lesions += of_structure or []
    return CaseQuantities(tuple(structures), tuple(lesions), mask.spacing_mm, mask.shape)


@dataclass(frozen=True)
class _Scan:
    """Everything about a case in canonical orientation."""

    mask: Volume
    scheme: LabelScheme
    image_zyx: np.ndarray | None
    channels_zyx: tuple[np.ndarray | None, ...]
    probability_zyx: Mapping[str, np.ndarray]
    connectivity: int

    def measure_structure(
        self, structure: Structure, lesions: list[LesionQuantities] | None
    ) -> StructureQuantities:
        whole = self.scheme.mask_of(self.mask.voxels, structure)
        box = bounding_box(whole)
        voxels = int(np.count_nonzero(whole))
        centroid: Float3 | None = None
        faces: tuple[str, ...] = ()
        if box is not None:
            centroid = _centroid_mm(whole[box], box, self.mask)
            faces = cut_faces(whole[box], box, self.mask.voxels, self.scheme.ignore)
        probability = self.probability_zyx.get(structure.name)
        return StructureQuantities(
            structure.name,
            structure.kind,
            structure.inside,
            voxels,
            voxels * self.mask.grid.voxel_volume_ml,
            self._burden(structure, voxels),
            None if lesions is None else len(lesions),
            centroid,
            faces,
            _values_in(self.image_zyx, box, whole),
            tuple(_values_in(channel, box, whole) for channel in self.channels_zyx),
            None
            if probability is None
            else _volume_range(probability, self.mask.grid.voxel_volume_ml),
        )

    def measure_lesions(self, structure: Structure) -> list[LesionQuantities]:
        whole = self.scheme.mask_of(self.mask.voxels, structure)
        components = list(find_components(whole, self.connectivity))
        surface, around = None, None
        if structure.inside is not None and components:
            organ = self.scheme.mask_of(self.mask.voxels, structure.inside)
            # The margin keeps the surface of the organ inside the crop.
            around = bounding_box(organ, margin=1)
            if around is not None:
                grid = self.mask.grid.cropped([s.start for s in around], organ[around].shape)
                surface = OrganSurface(organ[around], grid)
        return [
            self._measure_lesion(structure, component, whole, surface) for component in components
        ]

    def _measure_lesion(
        self,
        structure: Structure,
        component: Component,
        whole: np.ndarray,
        surface: OrganSurface | None,
    ) -> LesionQuantities:
        box, mask = component.box, component.mask_zyx
        grid = self.mask.grid.cropped([axis.start for axis in box], mask.shape)
        axial = measure_axial_diameters(mask, grid)
        probability = self.probability_zyx.get(structure.name)
        return LesionQuantities(
            structure.name,
            component.number,
            component.voxels,
            component.voxels * grid.voxel_volume_ml,
            axial.long_mm,
            axial.short_mm,
            longest_diameter_mm(mask, grid),
            sphericity(mask, grid),
            _centroid_mm(mask, box, self.mask),
            None if surface is None else surface.distance_mm(mask, grid),
            cut_faces(mask, box, self.mask.voxels, self.scheme.ignore),
            _values_of(self.image_zyx, box, mask),
            tuple(_values_of(channel, box, mask) for channel in self.channels_zyx),
            None if probability is None else self._lesion_range(component, whole, probability),
            tuple((axis.start, axis.stop) for axis in box),
            _axes_in_scan(axial, box),
        )

    def _burden(self, structure: Structure, voxels: int) -> float | None:
        if structure.kind == "lesion":
            if structure.inside is None:
                return None
            organ = int(np.count_nonzero(self.scheme.mask_of(self.mask.voxels, structure.inside)))
            return voxels / organ if organ else None
        inside = [lesion for lesion in self.scheme.lesions if lesion.inside == structure.name]
        if not inside or not voxels:
            return None
        # Structures may overlap in nested schemes: a voxel counts once.
        taken = np.zeros(self.mask.shape, dtype=bool)
        for lesion in inside:
            taken |= self.scheme.mask_of(self.mask.voxels, lesion)
        return int(np.count_nonzero(taken)) / voxels

    def _lesion_range(
        self, component: Component, whole: np.ndarray, probability: np.ndarray
    ) -> VolumeRange:
        """From the lesion and a shell around it, without the voxels of other lesions."""
        z, y, x = (
            slice(max(0, axis.start - SHELL_VOXELS), min(size, axis.stop + SHELL_VOXELS))
            for axis, size in zip(component.box, whole.shape, strict=True)
        )
        own = np.zeros(whole[z, y, x].shape, dtype=bool)
        inner = [
            slice(axis.start - grown.start, axis.stop - grown.start)
            for axis, grown in zip(component.box, (z, y, x), strict=True)
        ]
        own[tuple(inner)] = component.mask_zyx
        # Probability around a lesion belongs to it, unless another lesion is there.
        region = binary_dilation(own, iterations=SHELL_VOXELS) & ~(whole[z, y, x] & ~own)
        return _volume_range(
            np.where(region, probability[z, y, x], 0.0), self.mask.grid.voxel_volume_ml
        )


def _axes_in_scan(axial: AxialDiameters, box: Box) -> tuple[Float3, ...]:
    corner = np.array([axis.start for axis in box])
    points = np.concatenate([axial.long_ends_zyx, axial.short_ends_zyx]) + corner
    return tuple((float(z), float(y), float(x)) for z, y, x in points)


def _centroid_mm(mask_zyx: np.ndarray, box: Box, volume: Volume) -> Float3:
    index = np.argwhere(mask_zyx).mean(axis=0) + [axis.start for axis in box]
    right, anterior, superior = volume.grid.world_mm(index)
    return float(right), float(anterior), float(superior)


def _values_in(
    image: np.ndarray | None, box: Box | None, whole: np.ndarray
) -> IntensityStatistics | None:
    """Statistics of an image in a mask of the scan's size; None where either is missing."""
    return None if box is None else _values_of(image, box, whole[box])


def _values_of(image: np.ndarray | None, box: Box, mask: np.ndarray) -> IntensityStatistics | None:
    """Statistics of an image in a mask that fills a box."""
    return None if image is None else _statistics(image[box][mask])


def _statistics(values: np.ndarray) -> IntensityStatistics | None:
    # One NaN would make every figure NaN; float64, because sums of float32 lose digits.
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        return None
    p10, median, p90 = np.percentile(finite, (10, 50, 90))
    return IntensityStatistics(
        float(finite.mean()), float(finite.std()), float(p10), float(median), float(p90)
    )


def _volume_range(probability: np.ndarray, voxel_ml: float) -> VolumeRange:
    low, high = (
        int(np.count_nonzero(probability >= bound)) * voxel_ml for bound in PROBABILITY_BOUNDS
    )
    return VolumeRange(low, float(probability.sum(dtype=np.float64)) * voxel_ml, high)
