"""Settings of the conversion: audit, cleaning, slab, store, splits (`convert.*`)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from liverseg_dist.config.base import Section

PositiveFloat = Annotated[float, Field(gt=0)]


class CleaningConfig(Section):
    missing_label: Literal["exclude", "unlabelled"] = "exclude"
    """What becomes of a training image without a label: left out, or kept without label (never used for losses)."""
    noise: Literal["none", "median", "gaussian", "tv"] = "none"
    """Noise reduction of the image before resampling."""
    noise_strength: PositiveFloat = 1.0
    """median: radius in voxels; gaussian: sigma in voxels in plane; tv: weight relative to the noise's own sigma."""
    outliers: Literal["percentile", "window"] = "percentile"
    """Clip HU to percentiles of the data set's liver voxels (nnU-Net), or to `window_hu`."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    window_hu: tuple[float, float] = (-160.0, 240.0)
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Resample to this voxel size (z, y, x); null keeps each scan's own. The slab policy may still thin out z."""
    body_margin_mm: float = -1.0
    """Crop in plane to the body plus this margin; negative: no crop."""


class SlabConfig(Section):
    policy: Literal["fit", "window", "tile"] = "fit"
    """fit: the whole liver plus margin in 64 slices, resampled along z when needed; window: 64 contiguous native
    slices with most tumour, then most liver; tile: overlapping slabs that cover the liver."""
    slices: Literal[64] = 64
    margin_mm: float = Field(default=10.0, ge=0)
    """fit: kept above and below the liver."""


class SplitConfig(Section):
    kind: Literal["stratified", "nnunet", "file"] = "stratified"
    folds: int = Field(default=5, ge=2)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of patients held out as the test set (`stratified` only)."""
    file: Path | None = None
    """kind=file: JSON {"test": [...], "folds": [[...], ...]} of case ids."""
    patients: Path | None = None
    """CSV `case,patient`; scans of one patient never part."""


class ConvertConfig(Section):
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig)
    slab: SlabConfig = Field(default_factory=SlabConfig)
    splits: SplitConfig = Field(default_factory=SplitConfig)
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0: one per available core."""
    foreground_samples: int = Field(default=20_000, ge=1)
    """At most this many voxel positions per class are stored for oversampling."""
