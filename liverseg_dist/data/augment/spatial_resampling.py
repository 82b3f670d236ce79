"""Rotation, scaling and elastic deformation of one sample in one interpolation.

Image: trilinear; label: nearest neighbour, so that IGNORE and every class survive unmixed. (nnU-Net
interpolates one mask per label: outlines are smoother, but it takes twice the time on a CPU and
invents background where liver and IGNORE are neighbours.) Voxels outside the field are `outside`
in the image (air) and IGNORE in the label.

Scaling without rotation is separable: three small matrix products replace `grid_sample`. The
interpolation is the same, and it is three times faster on a CPU.

Used by `spatial_transforms.SpatialTransform`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from liverseg_dist.data.augment.host_tables import NO_TABLES, DeviceTables, TableKey
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import Index3

Tensor = torch.Tensor
_EXACT_FLOAT32 = 2**24
"""float32 represents all integers up to here."""


@dataclass(frozen=True, eq=False)
class SpatialDraw:
    """Output voxel p shows the input at `matrix @ (p + displacement(p))`.

    p: position (z, y, x) in voxels from the patch's centre.
    """

    matrix: np.ndarray
    """3x3: rotation times scaling."""
    is_rotated: bool
    control_displacement: np.ndarray | None
    """Elastic deformation: displacement in voxels (3, nz, ny, nx) at the control points of a cubic
    B-spline; None: no deformation."""


def resample_patch(
    channels_DHW: Sequence[Tensor],
    label_DHW: Tensor,
    draw: SpatialDraw,
    patch_size: Index3,
    outside: Sequence[float],
    tables: DeviceTables = NO_TABLES,
) -> tuple[list[Tensor], Tensor]:
    """Resample a field of voxels to the patch with the same centre.

    Args:
        channels_DHW: float32 field of each channel.
        label_DHW: uint8 field of the same shape.
        draw: the transform, which is the same for all channels.
        patch_size: size (z, y, x) of the result in voxels.
        outside: image value outside the field, for each channel.
        tables: tables that are on the device already (`list_resampling_tables`).

    Returns:
        Images (float32) and label (uint8) of `patch_size`.
    """
    if draw.is_rotated or draw.control_displacement is not None:
        return _resample_with_grid(channels_DHW, label_DHW, draw, patch_size, outside, tables)
    return _resample_along_axes(channels_DHW, label_DHW, draw, patch_size, outside, tables)


def list_resampling_tables(
    draw: SpatialDraw, field_shape: Index3, patch_size: Index3
) -> list[TableKey]:
    """Return the tables that `resample_patch` needs for a field of this shape."""
    keys: list[TableKey] = []
    if draw.control_displacement is not None:
        keys.append((_control_values, _hashable(draw.control_displacement)))
        for size, count in zip(patch_size, draw.control_displacement.shape[1:], strict=True):
            keys.append((_spline_weights, (size, count)))
    if not draw.is_rotated and draw.control_displacement is None:
        for _, arguments in _list_resized_axes(draw, field_shape, patch_size):
            for make in (_linear_weights, _nearest_rows, _rows_outside):
                keys.append((make, arguments))
    return keys


def _list_resized_axes(
    draw: SpatialDraw, field_shape: Sequence[int], patch_size: Index3
) -> list[tuple[int, tuple[int, float, int]]]:
    """Axes that change, each with its new size, its scale and its old length."""
    resized = []
    for axis, (size, scale) in enumerate(zip(patch_size, np.diag(draw.matrix), strict=True)):
        length = field_shape[axis]
        if scale != 1.0 or length != size:
            resized.append((axis, (size, float(scale), length)))
    return resized


def _resample_along_axes(
    channels: Sequence[Tensor],
    label: Tensor,
    draw: SpatialDraw,
    patch_size: Index3,
    outside: Sequence[float],
    tables: DeviceTables,
) -> tuple[list[Tensor], Tensor]:
    # Relative to `outside`, so that the zeros of the weights' border mean `outside`.
    images = [image - value for image, value in zip(channels, outside, strict=True)]
    for axis, arguments in _list_resized_axes(draw, label.shape, patch_size):
        weights = tables.get_table(label.device, _linear_weights, *arguments)
        images = [multiply_axis(image, weights, axis) for image in images]
        index = tables.get_table(label.device, _nearest_rows, *arguments)
        label = label.index_select(axis, index)
        outside_field = tables.get_table(label.device, _rows_outside, *arguments)
        if outside_field.numel():
            label.index_fill_(axis, outside_field, IGNORE)
    for image, value in zip(images, outside, strict=True):
        image.add_(value)
    return images, label


def multiply_axis(image_DHW: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Multiply one axis of a volume by a matrix (new length, old length)."""
    if axis == 2:
        return image_DHW @ weights.T
    if axis == 1:
        return weights @ image_DHW
    flat = weights @ image_DHW.reshape(image_DHW.shape[0], -1)
    return flat.reshape(weights.shape[0], *image_DHW.shape[1:])


def _positions_along_axis(size: int, scale: float, length: int) -> np.ndarray:
    """Return where `size` voxels sample an axis of `length` voxels with the same centre."""
    return _voxel_offsets(size) * scale + (length - 1) / 2


def _linear_weights(size: int, scale: float, length: int) -> np.ndarray:
    """Return rows (size, length) of linear interpolation weights.

    Beyond the ends the outer voxel fades into zero.
    """
    position = _positions_along_axis(size, scale, length)
    distance = np.abs(position[:, None] - np.arange(length))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def _nearest_rows(size: int, scale: float, length: int) -> np.ndarray:
    """Return the nearest voxel inside the field (int64)."""
    nearest = np.rint(_positions_along_axis(size, scale, length)).astype(np.int64)
    return np.clip(nearest, 0, length - 1)


def _rows_outside(size: int, scale: float, length: int) -> np.ndarray:
    """Return the voxels (int64) whose nearest position is outside the field."""
    nearest = np.rint(_positions_along_axis(size, scale, length)).astype(np.int64)
    return np.flatnonzero((nearest < 0) | (nearest >= length))


def _hashable(control: np.ndarray) -> tuple[bytes, tuple[int, ...]]:
    """Arguments of `_control_values`; a few KB, so that equal values mean an equal table."""
    return control.astype(np.float32).tobytes(), control.shape


def _control_values(values: bytes, shape: tuple[int, ...]) -> np.ndarray:
    # A copy: torch needs an array that can be written.
    return np.frombuffer(values, np.float32).reshape(shape).copy()


def _voxel_offsets(size: int) -> np.ndarray:
    """Return the positions of `size` voxels relative to their centre."""
    return np.arange(size) - (size - 1) / 2


def _resample_with_grid(
    channels: Sequence[Tensor],
    label: Tensor,
    draw: SpatialDraw,
    patch_size: Index3,
    outside: Sequence[float],
    tables: DeviceTables,
) -> tuple[list[Tensor], Tensor]:
    positions = sampling_positions(draw, patch_size, label.device, tables)
    grid = torch.empty((*patch_size, 3), dtype=torch.float32, device=label.device)
    # `grid_sample` wants (x, y, z) in units of half the field.
    for axis, size in enumerate(label.shape):
        torch.mul(positions[axis], 2.0 / size, out=grid[..., 2 - axis])
    relative = [image - value for image, value in zip(channels, outside, strict=True)]
    resampled = F.grid_sample(
        # One call for all channels, which have the same neighbours and weights.
        relative[0][None, None] if len(relative) == 1 else torch.stack(relative)[None],
        grid[None],
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    images = []
    for image, value in zip(resampled[0].unbind(dim=0), outside, strict=True):
        images.append(image.add_(value))
    return images, _sample_nearest_label(label, positions)


def _sample_nearest_label(label: Tensor, positions: list[Tensor]) -> Tensor:
    """Return the labels nearest to `positions`; IGNORE outside the field.

    A border of one voxel with the label IGNORE stands for everything outside.
    """
    bordered = F.pad(label, (1, 1, 1, 1, 1, 1), value=IGNORE)
    # The index is computed in floating point: products of integers are 10 times slower.
    dtype = torch.float32 if bordered.numel() < _EXACT_FLOAT32 else torch.float64
    index = torch.zeros((), dtype=dtype, device=label.device)
    for position, size in zip(positions, label.shape, strict=True):
        # (size - 1) / 2 from the centre to the first voxel, and one for the border.
        along = (position + (size + 1) / 2).round_().clamp_(0, size + 1)
        index = (index * (size + 2)).add(along)
    flat_index = index.to(torch.int32).view(-1)
    return bordered.view(-1).index_select(0, flat_index).view(index.shape)


def sampling_positions(
    draw: SpatialDraw, patch_size: Index3, device: torch.device, tables: DeviceTables = NO_TABLES
) -> list[Tensor]:
    """Return where each patch voxel samples the field.

    Returns:
        z, y and x, each (D, H, W), in voxels from the field's centre.
    """
    axes = []
    for axis, size in enumerate(patch_size):
        shape = [1, 1, 1]
        shape[axis] = -1
        # Halves of integers, which float32 represents: the same bits as `_voxel_offsets`.
        offsets = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
        axes.append(offsets.view(shape))
    if draw.control_displacement is not None:
        displacement = displacement_field(draw.control_displacement, patch_size, device, tables)
        axes = [axis + moved for axis, moved in zip(axes, displacement, strict=True)]
    positions = []
    for row in draw.matrix:
        z, y, x = (float(value) for value in row)
        positions.append((axes[0] * z + axes[1] * y) + axes[2] * x)
    return positions


def displacement_field(
    control: np.ndarray,
    patch_size: Index3,
    device: torch.device,
    tables: DeviceTables = NO_TABLES,
) -> Tensor:
    """Return the uniform cubic B-spline of control displacements.

    The control points reach one knot beyond each end of the patch, as in free-form deformation
    (Rueckert et al. 1999, https://doi.org/10.1109/42.796284).

    Args:
        control: displacements (3, nz, ny, nx) in voxels.
        patch_size: (z, y, x) in voxels.
        device: where the result is computed.
        tables: tables that are on the device already.

    Returns:
        Displacements (3, D, H, W) in voxels.
    """
    weights = []
    for size, count in zip(patch_size, control.shape[1:], strict=True):
        weights.append(tables.get_table(device, _spline_weights, size, count))
    field = tables.get_table(device, _control_values, *_hashable(control))
    return torch.stack([_multiply_all_axes(component, weights) for component in field])


def _multiply_all_axes(volume: Tensor, weights: list[Tensor]) -> Tensor:
    for axis in (2, 1, 0):
        volume = multiply_axis(volume, weights[axis], axis)
    return volume


def _spline_weights(size: int, count: int) -> np.ndarray:
    """Return cubic B-spline weights (size, count) of `count` control points at `size` voxels.

    The voxels span count - 3 intervals of control points.
    """
    position = np.linspace(0.0, count - 3, size) + 1.0
    distance = np.abs(position[:, None] - np.arange(count))
    near = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    far = (2.0 - np.minimum(distance, 2.0)) ** 3 / 6.0
    return np.where(distance < 1.0, near, far).astype(np.float32)


def crop_centre(volume: Tensor, shape: Index3) -> Tensor:
    """Return a view of the middle of the last three axes.

    An axis that is shorter than `shape` stays as it is.
    """
    box = []
    for length, wanted in zip(volume.shape[-3:], shape, strict=True):
        start = max(0, length - wanted) // 2
        box.append(slice(start, start + min(length, wanted)))
    z, y, x = box
    return volume[..., z, y, x]
