"""Rotation, scaling and elastic deformation of one sample in one interpolation, on whatever device it lies.

Image: trilinear; label: nearest neighbour, so IGNORE and every class survive unmixed. (nnU-Net interpolates a mask per
label: smoother outlines, but twice the time on a CPU, and background invented wherever liver meets IGNORE.) What lies
outside the field is `outside` in the image (air) and IGNORE in the label. Scaling without rotation is separable and
goes through three small matrices instead of `grid_sample`: the same interpolation, three times faster on a CPU.
"""

import numpy as np
import torch
import torch.nn.functional as F

from liverseg_dist.data.augment.presets import SpatialDraw
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import Index3

Tensor = torch.Tensor


def resample_patch(
    image_DHW: Tensor, label_DHW: Tensor, draw: SpatialDraw, patch_size: Index3, outside: float
) -> tuple[Tensor, Tensor]:
    """The patch (float32, uint8) that `draw` sees of a field of voxels with the same centre."""
    if draw.rotates or draw.control_displacement is not None:
        return _resample_by_grid(image_DHW, label_DHW, draw, patch_size, outside)
    return _resample_by_axis(image_DHW, label_DHW, np.diag(draw.matrix), patch_size, outside)


def _resample_by_axis(
    image: Tensor, label: Tensor, scaling: np.ndarray, patch_size: Index3, outside: float
) -> tuple[Tensor, Tensor]:
    image = image - outside
    for axis, (size, scale) in enumerate(zip(patch_size, scaling, strict=True)):
        length = image.shape[axis]
        if scale == 1.0 and length == size:
            continue
        position = _centred(size) * scale + (length - 1) / 2
        weights = torch.from_numpy(_linear_weights(position, length)).to(image.device)
        image = along_axis(image, weights, axis)
        nearest = np.rint(position).astype(np.int64)
        index = torch.from_numpy(np.clip(nearest, 0, length - 1)).to(label.device)
        label = label.index_select(axis, index)
        lost = np.flatnonzero((nearest < 0) | (nearest >= length))
        if len(lost):
            label.index_fill_(axis, torch.from_numpy(lost).to(label.device), IGNORE)
    return image.add_(outside), label


def along_axis(image_DHW: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Apply a matrix (new length, old length) along one axis of a volume."""
    if axis == 2:
        return image_DHW @ weights.T
    if axis == 1:
        return weights @ image_DHW
    flat = weights @ image_DHW.reshape(image_DHW.shape[0], -1)
    return flat.reshape(weights.shape[0], *image_DHW.shape[1:])


def _linear_weights(position: np.ndarray, length: int) -> np.ndarray:
    """Rows of linear interpolation at `position` (voxels); beyond the ends the outer voxel fades into zero."""
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(length))).astype(np.float32)


def _centred(size: int) -> np.ndarray:
    return np.arange(size) - (size - 1) / 2


def _resample_by_grid(
    image: Tensor, label: Tensor, draw: SpatialDraw, patch_size: Index3, outside: float
) -> tuple[Tensor, Tensor]:
    places = sampling_positions(draw, patch_size, image.device)
    grid = torch.empty((*patch_size, 3), dtype=torch.float32, device=image.device)
    for axis, size in enumerate(
        image.shape
    ):  # grid_sample wants x, y, z in units of half the field
        torch.mul(places[axis], 2.0 / size, out=grid[..., 2 - axis])
    above = (image - outside)[None, None]
    moved = F.grid_sample(
        above, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return moved[0, 0].add_(outside), _nearest_label(label, places)


def _nearest_label(label: Tensor, places: list[Tensor]) -> Tensor:
    """Labels next to `places`; IGNORE beyond the field, which a rim of one voxel stands for."""
    rimmed = F.pad(label, (1, 1, 1, 1, 1, 1), value=IGNORE)
    exact = (
        torch.float32 if rimmed.numel() < 2**24 else torch.float64
    )  # whole numbers; integer products are 10x slower
    index = torch.zeros((), dtype=exact, device=label.device)
    for place, size in zip(places, label.shape, strict=True):
        along = (
            (place + (size + 1) / 2).round_().clamp_(0, size + 1)
        )  # (size - 1) / 2, and one for the rim
        index = (index * (size + 2)).add(along)
    return rimmed.view(-1).index_select(0, index.to(torch.int32).view(-1)).view(index.shape)


def sampling_positions(draw: SpatialDraw, patch_size: Index3, device: torch.device) -> list[Tensor]:
    """Where each patch voxel looks: its z, y and x, each (D, H, W), in voxels from the field's centre."""
    axes = [
        torch.from_numpy(_centred(size).astype(np.float32))
        .to(device)
        .view([-1 if i == axis else 1 for i in range(3)])
        for axis, size in enumerate(patch_size)
    ]
    if draw.control_displacement is not None:
        displacement = displacement_field(draw.control_displacement, patch_size, device)
        axes = [axis + moved for axis, moved in zip(axes, displacement, strict=True)]
    places = []
    for row in draw.matrix:
        z, y, x = (float(value) for value in row)
        places.append((axes[0] * z + axes[1] * y) + axes[2] * x)
    return places


def displacement_field(control: np.ndarray, patch_size: Index3, device: torch.device) -> Tensor:
    """Uniform cubic B-spline through control displacements (3, nz, ny, nx): (3, D, H, W) in voxels.

    The control points reach one knot beyond each end of the patch, as in free-form deformation (Rueckert et al. 1999,
    https://doi.org/10.1109/42.796284).
    """
    weights = [
        torch.from_numpy(_spline_weights(size, count)).to(device)
        for size, count in zip(patch_size, control.shape[1:], strict=True)
    ]
    field = torch.from_numpy(control.astype(np.float32)).to(device)
    return torch.stack([_separable(component, weights) for component in field])


def _separable(volume: Tensor, weights: list[Tensor]) -> Tensor:
    for axis in (2, 1, 0):
        volume = along_axis(volume, weights[axis], axis)
    return volume


def _spline_weights(size: int, count: int) -> np.ndarray:
    """Cubic B-spline weights (size, count) of the control points at `size` voxels, which span count - 3 intervals."""
    place = np.linspace(0.0, count - 3, size) + 1.0
    distance = np.abs(place[:, None] - np.arange(count))
    near = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    far = (2.0 - np.minimum(distance, 2.0)) ** 3 / 6.0
    return np.where(distance < 1.0, near, far).astype(np.float32)


def centre_crop(volume: Tensor, shape: Index3) -> Tensor:
    """The middle of the last three axes, a view; an axis shorter than asked stays as it is."""
    z, y, x = (
        slice(max(0, have - want) // 2, max(0, have - want) // 2 + min(have, want))
        for have, want in zip(volume.shape[-3:], shape, strict=True)
    )
    return volume[..., z, y, x]
