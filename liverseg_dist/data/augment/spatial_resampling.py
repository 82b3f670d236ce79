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
) -> tuple[list[Tensor], Tensor]:
    """Resample a field of voxels to the patch with the same centre.

    Args:
        channels_DHW: float32 field of each channel.
        label_DHW: uint8 field of the same shape.
        draw: the transform, which is the same for all channels.
        patch_size: size (z, y, x) of the result in voxels.
        outside: image value outside the field, for each channel.

    Returns:
        Images (float32) and label (uint8) of `patch_size`.
    """
    if draw.is_rotated or draw.control_displacement is not None:
        return _resample_with_grid(channels_DHW, label_DHW, draw, patch_size, outside)
    return _resample_along_axes(channels_DHW, label_DHW, np.diag(draw.matrix), patch_size, outside)


def _resample_along_axes(
    channels: Sequence[Tensor],
    label: Tensor,
    scaling: np.ndarray,
    patch_size: Index3,
    outside: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    # Relative to `outside`, so that the zeros of the weights' border mean `outside`.
    images = [image - value for image, value in zip(channels, outside, strict=True)]
    for axis, (size, scale) in enumerate(zip(patch_size, scaling, strict=True)):
        length = label.shape[axis]
        if scale == 1.0 and length == size:
            continue
        position = _voxel_offsets(size) * scale + (length - 1) / 2
        weights = torch.from_numpy(_linear_weights(position, length)).to(label.device)
        images = [multiply_axis(image, weights, axis) for image in images]
        nearest = np.rint(position).astype(np.int64)
        index = torch.from_numpy(np.clip(nearest, 0, length - 1)).to(label.device)
        label = label.index_select(axis, index)
        outside_field = np.flatnonzero((nearest < 0) | (nearest >= length))
        if len(outside_field):
            label.index_fill_(axis, torch.from_numpy(outside_field).to(label.device), IGNORE)
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


def _linear_weights(position: np.ndarray, length: int) -> np.ndarray:
    """Return rows of linear interpolation weights at `position` (voxels).

    Beyond the ends the outer voxel fades into zero.
    """
    distance = np.abs(position[:, None] - np.arange(length))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def _voxel_offsets(size: int) -> np.ndarray:
    """Return the positions of `size` voxels relative to their centre."""
    return np.arange(size) - (size - 1) / 2


def _resample_with_grid(
    channels: Sequence[Tensor],
    label: Tensor,
    draw: SpatialDraw,
    patch_size: Index3,
    outside: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    positions = sampling_positions(draw, patch_size, label.device)
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


def sampling_positions(draw: SpatialDraw, patch_size: Index3, device: torch.device) -> list[Tensor]:
    """Return where each patch voxel samples the field.

    Returns:
        z, y and x, each (D, H, W), in voxels from the field's centre.
    """
    axes = []
    for axis, size in enumerate(patch_size):
        shape = [1, 1, 1]
        shape[axis] = -1
        offsets = torch.from_numpy(_voxel_offsets(size).astype(np.float32)).to(device)
        axes.append(offsets.view(shape))
    if draw.control_displacement is not None:
        displacement = displacement_field(draw.control_displacement, patch_size, device)
        axes = [axis + moved for axis, moved in zip(axes, displacement, strict=True)]
    positions = []
    for row in draw.matrix:
        z, y, x = (float(value) for value in row)
        positions.append((axes[0] * z + axes[1] * y) + axes[2] * x)
    return positions


def displacement_field(control: np.ndarray, patch_size: Index3, device: torch.device) -> Tensor:
    """Return the uniform cubic B-spline of control displacements.

    The control points reach one knot beyond each end of the patch, as in free-form deformation
    (Rueckert et al. 1999, https://doi.org/10.1109/42.796284).

    Args:
        control: displacements (3, nz, ny, nx) in voxels.
        patch_size: (z, y, x) in voxels.
        device: where the result is computed.

    Returns:
        Displacements (3, D, H, W) in voxels.
    """
    weights = []
    for size, count in zip(patch_size, control.shape[1:], strict=True):
        weights.append(torch.from_numpy(_spline_weights(size, count)).to(device))
    field = torch.from_numpy(control.astype(np.float32)).to(device)
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
