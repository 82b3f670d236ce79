"""Settings of the conversion: audit, cleaning, slab, store, splits (`convert.*`).

A store records these settings. They therefore also describe how a new scan is prepared for a
trained network.
"""

import base64
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from liverseg_dist.config.base import Section
from liverseg_dist.config.channels import ChannelConfig, check_channel_names
from liverseg_dist.config.labels import LabelSettings, parse_label_settings
from liverseg_dist.texts.paths import UserPath, expand_text

PositiveFloat = Annotated[float, Field(gt=0)]
DATA_URI = "data:application/octet-stream;base64,"
MAX_DENOISER_BYTES = 256 << 10


class CleaningConfig(Section):
    missing_label: Literal["exclude", "unlabelled", "impute"] = "exclude"
    """Training images without a label. exclude: not stored; unlabelled: stored without a label and
    not used in losses; impute: labelled by the run `convert.labels_from` and used for training,
    never for test or validation."""
    min_slices: int = Field(default=4, ge=1)
    """Exclude a scan that fills fewer than this many of a slab's 64 slices; the rest would be
    padding."""
    max_broken_fraction: float = Field(default=0.05, ge=0, lt=1)
    """NaN and infinite voxels become air, and blank slices are interpolated. Exclude a scan in
    which they are a larger fraction than this."""
    spacing_table: UserPath | None = None
    """CSV `case,z_mm,y_mm,x_mm` (or YAML `case: [z, y, x]`): the true voxel size of scans whose
    header has a wrong one."""
    noise: Literal["none", "median", "gaussian", "bilateral", "tv", "autoencoder"] = "none"
    """Noise reduction, slice by slice, before resampling; tv: total variation (Chambolle)."""
    noise_strength: PositiveFloat = 1.0
    """median: radius in voxels; gaussian and bilateral: sigma in voxels, in plane; tv: weight
    relative to the estimated sigma of the noise; autoencoder: fraction of the predicted noise that
    is subtracted, at most 1."""
    denoiser: str | None = None
    """For noise=autoencoder: a file written by `liverseg denoiser`. The settings hold its content
    (as base64 text)."""
    outliers: Literal["percentile", "window", "robust_z"] = "percentile"
    """Clip HU to percentiles of the data set's liver voxels (as nnU-Net), to `window_hu`, or to a
    range around their median."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    window_hu: tuple[float, float] = (-160.0, 240.0)
    robust_z: PositiveFloat = 4.0
    """For outliers=robust_z: the range is median +- this many robust standard deviations (1.4826
    times the median absolute deviation)."""
    standardise: bool = True
    """After clipping and scaling to [0, 1]: shift and scale to zero mean and unit variance over the
    data set's liver voxels."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Resample to this voxel size (z, y, x); null: keep the voxel size of each scan. The slab
    policy may still resample along z."""
    order: Literal[1, 3] = 3
    """Interpolation of images: 1 linear, 3 cubic spline."""
    # Stores and fingerprints of results keep the old name, so that their bytes do not change.
    order_z: Literal[0, 1] = Field(
        default=1,
        validation_alias=AliasChoices("order_z", "thick_order"),
        serialization_alias="thick_order",
    )
    """Interpolation across thick slices (voxels over 3 times longer than wide): 0 nearest, 1
    linear."""
    antialias: bool = True
    """Low-pass filter before downsampling, to prevent aliasing; has an effect from a factor of
    1.5."""
    body_margin_mm: float = -1.0
    """Crop in plane to the body plus this margin; negative: do not crop."""
    outside_body: Literal["keep", "air"] = "keep"
    """air: set everything outside the body (table, blanket, air) to -1024 HU."""

    @field_validator("denoiser")
    @classmethod
    def _read_denoiser(cls, value: str | None) -> str | None:
        """Replace the file name by the file's content, so that a store or run needs no other
        file."""
        if value is None or value.startswith(DATA_URI):
            return value
        # `liverseg settings` prints the default as null, so users write it on the command line.
        if value == "null" and not Path(value).exists():
            return None
        try:
            with open(expand_text(value), "rb") as stream:
                # One byte more than allowed is enough to detect a file that is too large.
                content = stream.read(MAX_DENOISER_BYTES + 1)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if len(content) > MAX_DENOISER_BYTES:
            raise ValueError(
                f"larger than {MAX_DENOISER_BYTES >> 10} KiB, so not written by `liverseg denoiser`"
            )
        return DATA_URI + base64.b64encode(content).decode("ascii")

    @model_validator(mode="after")
    def _check_denoiser(self) -> "CleaningConfig":
        if self.noise == "autoencoder":
            if self.denoiser is None:
                raise ValueError(
                    "noise=autoencoder needs denoiser=FILE; `liverseg denoiser` writes one"
                )
            if self.noise_strength > 1:
                raise ValueError(
                    f"noise_strength = {self.noise_strength:g}; noise=autoencoder allows at most 1"
                )
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> "CleaningConfig":
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"percentiles must be two ascending numbers from 0 to 100, not {low:g}, {high:g}"
            )
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(
                f"window_hu must be lower, upper, not {self.window_hu[0]:g}, {self.window_hu[1]:g}"
            )
        return self


class SlabConfig(Section):
    policy: Literal["fit", "window", "tile"] = "fit"
    """fit: all structures plus a margin in 64 slices, resampled along z if necessary; window: the
    64 contiguous original slices with most lesion voxels, then most organ voxels; tile: overlapping
    slabs that cover all structures."""
    slices: Literal[64] = 64
    margin_mm: float = Field(default=10.0, ge=0)
    """For policy=fit: margin above and below these structures."""
    around: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Structures that the slab is placed around; null: all."""


class SplitConfig(Section):
    kind: Literal["stratified", "nnunet", "file"] = "stratified"
    """stratified: by the burden of lesions, or by the labelled volume without lesions; nnunet: the
    folds of nnU-Net; file: from `splits.file`."""
    folds: int = Field(default=5, ge=2)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of patients in the test set (kind=stratified only)."""
    file: UserPath | None = None
    """For kind=file: JSON {"test": [...], "folds": [[...], ...]} of case ids, or nnU-Net's
    splits_final.json."""
    patients: UserPath | None = None
    """CSV `case,patient`; all scans of a patient are in the same part."""


class ConvertConfig(Section):
    modality: Literal["CT", "any"] = "CT"
    """Without effect since the channels name their modality (`channels`, or dataset.json); kept so
    that earlier settings load."""
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig)
    slab: SlabConfig = Field(default_factory=SlabConfig)
    splits: SplitConfig = Field(default_factory=SplitConfig)
    channels: tuple[ChannelConfig, ...] | None = None
    """Channels of the images, in the order of the files `_0000`, `_0001`, ... or of the last axis of
    4D files; null: as dataset.json names them, else one channel of CT."""
    labels: LabelSettings | None = None
    """Structures of the store: which labels of the data set they are made of (`from`), kind,
    container (`inside`) and SNOMED code; `spleen: drop` drops a label, `"*": drop` all that are not
    named. null: as dataset.json names them, else those of LiTS."""
    annotated: dict[str, tuple[str, ...]] | None = None
    """Partly labelled data: pattern of case ids (`amos_*`) -> structures that were annotated there;
    the first pattern that fits counts. null: as dataset.json lists them, else all."""
    annotated_table: UserPath | None = None
    """The same as a CSV `case,structures`, structures separated by semicolons."""
    register_channels: Literal["none", "rigid"] = "none"
    """rigid: register each channel to the first one of its scan (mutual information), where the
    patient moved between the series; none: trust the positions in the headers."""
    labels_from: UserPath | None = None
    """Folder of a finished run. With missing_label=impute it labels the scans without a label; with
    missing_label=unlabelled it locates their liver, so that the slab policy applies to them too."""
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0: one per available core."""
    foreground_samples: int = Field(default=20_000, ge=1)
    """Maximum number of voxel positions per class that are stored for oversampling."""

    @field_validator("labels", mode="before")
    @classmethod
    def _parse_labels(cls, value: object) -> object:
        return parse_label_settings(value)

    @field_validator("channels")
    @classmethod
    def _check_channels(
        cls, value: tuple[ChannelConfig, ...] | None
    ) -> tuple[ChannelConfig, ...] | None:
        if value is not None:
            if not value:
                raise ValueError("an image needs at least one channel")
            check_channel_names(value)
        return value
