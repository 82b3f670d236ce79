"""The settings of a run from a result folder of nnU-Net v2, so that the network is used like a run.

Voxel size, normalisation, channels, labels, mirrored axes and the sliding window are those of
nnU-Net. Scans are given to the network in RAS orientation, which is that of the Medical
Segmentation Decathlon and of TotalSegmentator: plans.json does not record the orientation of the
training files. Used by `liverseg nnunet`.
"""

from collections.abc import Mapping
from typing import Any

from liverseg_dist.config import ChannelConfig, IntensityConfig, Settings
from liverseg_dist.data.io.modality import MODALITY_KEYS, read_channels
from liverseg_dist.data.io.source_labels import read_source_labels
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import LabelScheme
from liverseg_dist.model.nnunet_folder import DATASET, PLANS, NnunetFolder
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology

AXIS_NAMES = "zyx"
CT_SCHEME = "CTNormalization"
ORDER_KEY = "regions_class_order"
RESAMPLING = "resample_data_or_seg_to_shape"
MAX_REASON_CHARACTERS = 200
IMAGE_ORDERS, AXIAL_ORDERS = (1, 3), (0, 1)
"""Interpolations that `convert.cleaning` has, in plane and across thick slices."""


def build_run_settings(folder: NnunetFolder) -> Settings:
    """Return the resolved settings of a run with nnU-Net's network and preprocessing.

    Raises:
        UserError: the network or the preprocessing has no equal in this program, or the folder's
            files are damaged.
    """
    try:
        settings = _convert_settings(folder)
    # Any value of the two files may be of another type than nnU-Net writes.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise UserError(
            f"{folder.root}: {PLANS} or {DATASET} is not as nnU-Net writes it ({printable(reason)})"
        ) from None
    data = settings.data
    assert data.spacing_mm is not None
    # Checks that the patch fits the strides.
    model = resolve_topology(settings.model, data.patch_size, data.spacing_mm)
    return settings.model_copy(update={"model": model})


def _convert_settings(folder: NnunetFolder) -> Settings:
    labels, regions = _read_labels(folder)
    channels, intensities = _read_channels(folder)
    outputs = OutputChannels(labels, regions)
    model = {
        **folder.list_model_settings(),
        "regions": regions,
        "in_channels": len(channels),
        "out_channels": outputs.count,
    }
    mirror_axes = [AXIS_NAMES[axis] for axis in folder.mirror_axes]
    values: dict[str, Any] = {
        "data": {
            "spacing_mm": [float(mm) for mm in folder.list_by_file_axes("spacing")],
            "patch_size": [int(n) for n in folder.list_by_file_axes("patch_size")],
            "channels": [channel.model_dump(mode="json") for channel in channels],
            "labels": labels.to_json(),
            "mirror_axes": mirror_axes,
            "fold": "all",
        },
        "model": model,
        "convert": {"cleaning": _read_resampling(folder)},
        "inference": {
            "average": "logits",
            "mirror": bool(mirror_axes),
            "overlap": 0.5,
            "window_weights": "gaussian",
            "padding": "mean",
        },
    }
    settings = Settings.model_validate(values)
    only = intensities[0] if len(intensities) == 1 else tuple(intensities)
    data = settings.data.model_copy(update={"intensity": only})
    return settings.model_copy(update={"data": data})


def _read_labels(folder: NnunetFolder) -> tuple[LabelScheme, bool]:
    """The label scheme, and whether the outputs are its regions."""
    where = folder.root / DATASET
    labels = read_source_labels(folder.dataset, where)[0].scheme
    if not labels.is_contiguous:
        raise UserError(f"{where}: label values are not 0, 1, 2, ... without gaps")
    regions = folder.dataset.get(ORDER_KEY) is not None
    # nnU-Net paints regions in the order that the file gives, this program containers first.
    order = [value for _, value in labels.paint_order]
    if regions and list(folder.dataset[ORDER_KEY]) != order:
        raise UserError(
            f"{where}: {ORDER_KEY} is {folder.dataset[ORDER_KEY]}; only {order} is supported, "
            "where containers are painted before what they contain"
        )
    return labels, regions


def _read_channels(
    folder: NnunetFolder,
) -> tuple[tuple[ChannelConfig, ...], list[IntensityConfig]]:
    """The channels and their normalisation."""
    where = folder.root / PLANS
    entry = next((folder.dataset[key] for key in MODALITY_KEYS[::-1] if key in folder.dataset), "")
    channels, _ = read_channels(DATASET, entry)
    schemes = folder.configuration.get("normalization_schemes")
    if not isinstance(schemes, list) or len(schemes) != len(channels):
        raise UserError(f"{where}: normalization_schemes are not one per channel")
    found, intensities = [], []
    for number, (channel, scheme) in enumerate(zip(channels, schemes, strict=True)):
        if scheme != CT_SCHEME:
            raise UserError(
                f"{where}: channel {channel.name} has {printable(str(scheme))}, over the whole "
                f"image; only {CT_SCHEME} is equal in this program. The weights can start a "
                f"training: model.pretrained={folder.root}"
            )
        # nnU-Net applies the data set's figures for any name of the channel.
        found.append(ChannelConfig(name=channel.name))
        intensities.append(_read_intensity(folder, number))
    return tuple(found), intensities


def _read_intensity(folder: NnunetFolder, channel: int) -> IntensityConfig:
    where = folder.root / PLANS
    properties = folder.plans.get("foreground_intensity_properties_per_channel")
    figures = properties.get(str(channel)) if isinstance(properties, Mapping) else None
    try:
        lower, upper = float(figures["percentile_00_5"]), float(figures["percentile_99_5"])  # type: ignore[index]
        mean, std = float(figures["mean"]), float(figures["std"])  # type: ignore[index]
        width = upper - lower
        # Both scale linearly between the percentiles; here the figures are those after the scaling.
        return IntensityConfig(
            lower_hu=lower, upper_hu=upper, mean=(mean - lower) / width, std=std / width
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{where}: foreground_intensity_properties_per_channel of channel {channel} are not "
            "usable"
        ) from None


def _read_resampling(folder: NnunetFolder) -> dict[str, Any]:
    """Settings `convert.cleaning` with nnU-Net's interpolation and without any cleaning."""
    kwargs = folder.configuration.get("resampling_fn_data_kwargs", {})
    name = folder.configuration.get("resampling_fn_data", RESAMPLING)
    order, order_z = kwargs.get("order", 3), kwargs.get("order_z", 0)
    if name != RESAMPLING or order not in IMAGE_ORDERS or order_z not in AXIAL_ORDERS:
        raise UserError(
            f"{folder.root / PLANS}: images are resampled by {printable(str(name))} with order "
            f"{order} and {order_z}, which is not supported"
        )
    return {"order": order, "order_z": order_z, "antialias": False}
