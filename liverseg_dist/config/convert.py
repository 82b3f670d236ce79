"""Settings of the conversion: audit, cleaning, slab, store, splits (`convert.*`)."""

import base64
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from liverseg_dist.config.base import Section
from liverseg_dist.texts.paths import UserPath, expand_text

PositiveFloat = Annotated[float, Field(gt=0)]
DATA_URI = "data:application/octet-stream;base64,"
MAX_DENOISER_BYTES = 256 << 10


class CleaningConfig(Section):
    missing_label: Literal["exclude", "unlabelled", "impute"] = "exclude"
    """What becomes of a training image without a label: left out; kept without label (never used for losses); or
    labelled by the run `convert.labels_from` and trained on, but never part of a test or validation set."""
    min_slices: int = Field(default=4, ge=1)
    """A scan that fills fewer than this many of a slab's 64 slices is excluded: the rest of the slab is padding."""
    max_broken_fraction: float = Field(default=0.05, ge=0, lt=1)
    """NaN and infinite voxels become air, blank slices are interpolated; a scan with a larger share is excluded."""
    spacing_table: UserPath | None = None
    """CSV `case,z_mm,y_mm,x_mm` (or YAML `case: [z, y, x]`): the true voxel size of scans whose header lost it."""
    noise: Literal["none", "median", "gaussian", "bilateral", "tv", "autoencoder"] = "none"
    """Noise reduction of the image, slice by slice, before resampling; tv: total variation (Chambolle)."""
    noise_strength: PositiveFloat = 1.0
    """median: radius in voxels; gaussian: sigma in voxels in plane; bilateral: sigma in voxels in plane;
    tv: weight relative to the noise's own sigma; autoencoder: share of the predicted noise taken away, at most 1."""
    denoiser: str | None = None
    """noise=autoencoder: the file that `liverseg denoiser` made. Its content is kept with the settings (as text)."""
    outliers: Literal["percentile", "window", "robust_z"] = "percentile"
    """Clip HU to percentiles of the data set's liver voxels (nnU-Net), to `window_hu`, or around their median."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    window_hu: tuple[float, float] = (-160.0, 240.0)
    robust_z: PositiveFloat = 4.0
    """outliers=robust_z: keep median +- this many robust standard deviations (1.4826 times the median deviation)."""
    standardise: bool = True
    """After the clip and [0, 1]: to zero mean and unit variance over the data set's liver voxels."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Resample to this voxel size (z, y, x); null keeps each scan's own. The slab policy may still thin out z."""
    order: Literal[1, 3] = 3
    """Interpolation of images: 1 linear, 3 cubic spline."""
    thick_order: Literal[0, 1] = 1
    """The same across thick slices (voxels over 3 times longer than wide): 0 nearest, 1 linear."""
    antialias: bool = True
    """Smooth before voxels grow, so that noise does not fold back; matters from a factor of 1.5 upwards."""
    body_margin_mm: float = -1.0
    """Crop in plane to the body plus this margin; negative: no crop."""
    outside_body: Literal["keep", "air"] = "keep"
    """air: table, blanket and air around the body become -1024 HU."""

    @field_validator("denoiser")
    @classmethod
    def _content(cls, value: str | None) -> str | None:
        """A file's name becomes its content, so that store and run need no other file."""
        if value is None or value.startswith(DATA_URI):
            return value
        if (
            value == "null" and not Path(value).exists()
        ):  # the default, as `liverseg settings` prints it
            return None
        try:
            with open(expand_text(value), "rb") as stream:
                content = stream.read(MAX_DENOISER_BYTES + 1)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if len(content) > MAX_DENOISER_BYTES:
            raise ValueError(
                f"larger than {MAX_DENOISER_BYTES >> 10} KiB, so not from `liverseg denoiser`"
            )
        return DATA_URI + base64.b64encode(content).decode("ascii")

    @model_validator(mode="after")
    def _denoiser_given(self) -> "CleaningConfig":
        if self.noise == "autoencoder":
            if self.denoiser is None:
                raise ValueError(
                    "noise=autoencoder needs denoiser=FILE; `liverseg denoiser` makes one"
                )
            if self.noise_strength > 1:
                raise ValueError(
                    f"noise_strength = {self.noise_strength:g}; with noise=autoencoder at most 1"
                )
        return self

    @model_validator(mode="after")
    def _ascending(self) -> "CleaningConfig":
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"percentiles are two ascending numbers from 0 to 100, not {low:g}, {high:g}"
            )
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(
                f"window_hu is lower, upper, not {self.window_hu[0]:g}, {self.window_hu[1]:g}"
            )
        return self


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
    file: UserPath | None = None
    """kind=file: JSON {"test": [...], "folds": [[...], ...]} of case ids, or nnU-Net's splits_final.json."""
    patients: UserPath | None = None
    """CSV `case,patient`; scans of one patient never part."""


class ConvertConfig(Section):
    modality: Literal["CT", "any"] = "CT"
    """CT: a data set whose dataset.json names another modality (MRI, PET ...) is refused; any: its voxels are read as
    HU all the same."""
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig)
    slab: SlabConfig = Field(default_factory=SlabConfig)
    splits: SplitConfig = Field(default_factory=SplitConfig)
    labels_from: UserPath | None = None
    """Folder of a finished run. missing_label=impute: it labels scans without label; unlabelled: it finds their liver,
    so that the slab policy holds for them too."""
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0: one per available core."""
    foreground_samples: int = Field(default=20_000, ge=1)
    """At most this many voxel positions per class are stored for oversampling."""
