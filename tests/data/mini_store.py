"""A small store written by zarr-python only, so that tests of the loader need no conversion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import ndimage
from zarr.codecs import BloscCodec

from liverseg_dist.config import IntensityConfig

INTENSITY = IntensityConfig(lower_hu=-100, upper_hu=240, mean=0.55, std=0.2)


@dataclass
class MiniMeta:
    labelled: bool
    valid_slices: tuple[int, int]
    class_voxels: tuple[int, int, int]
    intensities: tuple[IntensityConfig, ...] = (INTENSITY,)
    present: tuple[bool, ...] = (True,)
    annotated: tuple[str, ...] = ("liver", "tumour")


class MiniStore:
    """The part of `CaseStore` that `PatchSource` uses."""

    def __init__(self, path: Path | str, case_ids: list[str]) -> None:
        self.path, self.case_ids = path, case_ids
        self._group = zarr.open_group(str(path), mode="r")

    @property
    def content_sha256(self) -> str | None:
        return None

    def meta(self, case_id: str) -> MiniMeta:
        attributes: Any = self._group[f"cases/{case_id}"].attrs["liverseg"]
        valid = tuple(attributes["valid_slices"])
        return MiniMeta(attributes["labelled"], valid, tuple(attributes["class_voxels"]))

    def foreground(self, case_id: str) -> np.ndarray:
        return np.asarray(self._group[f"cases/{case_id}/foreground"][:])

    def image(self, case_id: str) -> np.ndarray:
        return np.asarray(self._group[f"cases/{case_id}/image"][:])

    def label(self, case_id: str) -> np.ndarray:
        return np.asarray(self._group[f"cases/{case_id}/label"][:])


def ct_like(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A body with a liver and two tumours of different sizes; int16 HU with noise, and its label."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    liver = (z / 0.7) ** 2 + ((y - 0.1) / 0.5) ** 2 + ((x + 0.2) / 0.5) ** 2 < 1
    label = liver.astype(np.uint8)
    label[liver & (z**2 + (y - 0.1) ** 2 + (x + 0.2) ** 2 < 0.04)] = 2
    label[liver & ((z - 0.3) ** 2 + (y + 0.1) ** 2 + (x + 0.3) ** 2 < 0.006)] = 2
    image = np.where(y**2 + x**2 < 0.8, 40.0, -1000.0) + 60 * (label == 1) + 20 * (label == 2)
    return (image + rng.normal(0, 12, shape) * (image > -500)).astype(np.int16), label


def foreground_of(label: np.ndarray) -> np.ndarray:
    components, _ = ndimage.label(label == 2)
    rows = [(1, 0, *voxel) for voxel in np.argwhere(label == 1)[::7]]
    rows += [(2, int(components[tuple(voxel)]), *voxel) for voxel in np.argwhere(label == 2)]
    return np.array(sorted(rows), dtype=np.int16).reshape(-1, 5)


def write_case(
    group: zarr.Group, case_id: str, image: np.ndarray, label: np.ndarray, labelled: bool = True
) -> None:
    chunk = (16, 32, 32)
    case = group.create_group(f"cases/{case_id}")
    shard = tuple(-(-n // c) * c for n, c in zip(image.shape, chunk, strict=True))
    for name, array in (("image", image), ("label", label)):
        codec = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=array.itemsize)
        stored = case.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunk,
            shards=shard,
            compressors=[codec],
        )
        stored[:] = array
    foreground = foreground_of(label)
    case.create_array("foreground", data=foreground)
    case.attrs["liverseg"] = {
        "labelled": labelled,
        "valid_slices": [0, image.shape[0]],
        "class_voxels": np.bincount(label[label < 3], minlength=3).tolist(),
    }


def write_store(
    path: Path, cases: int = 3, shape: tuple[int, int, int] = (64, 72, 80), labelled: bool = True
) -> MiniStore:
    group = zarr.open_group(str(path), mode="w")
    ids = [f"case_{i}" for i in range(cases)]
    for seed, case_id in enumerate(ids):
        write_case(group, case_id, *ct_like(shape, seed), labelled)
    return MiniStore(path, ids)
