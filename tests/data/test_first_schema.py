"""Stores of schema 1 (one channel of CT, images without an axis of channels) are read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from liverseg_dist.config import CT_CHANNELS, DataConfig
from liverseg_dist.data.loading.case_source import PatchSource
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import make_compressors, shard_shape
from liverseg_dist.labels import LITS_SCHEME
from tests.data.sources import convert, write_source

FIRST_IMAGE_CHUNK = (64, 16, 64)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaseStore, CaseStore]:
    """A store, and the same store as schema 1 wrote it."""
    folder = tmp_path_factory.mktemp("stores")
    assert convert(write_source(folder / "src", cases=5), folder / "new.zarr")[0] == 0
    shutil.copytree(folder / "new.zarr", folder / "first.zarr")
    write_as_first_schema(folder / "first.zarr")
    return CaseStore.open(folder / "new.zarr"), CaseStore.open(folder / "first.zarr")


def write_as_first_schema(path: Path) -> None:
    """Replace root and images by those of schema 1, which had no loading index."""
    (path / "loading.index").unlink()
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    root = content["attributes"]["liverseg"]
    for key in ("labels", "channels"):
        del root[key]
    root |= {"schema": 1, "label_names": ["background", "liver", "tumour"]}
    group = zarr.open_group(str(path), mode="r+")
    for case_id, case in root["cases"].items():
        case["tumours"] = case.pop("lesions")["tumour"]
        image = np.asarray(group[f"cases/{case_id}/image"])[0]
        shutil.rmtree(path / "cases" / case_id / "image")
        array = group.create_array(
            f"cases/{case_id}/image",
            shape=image.shape,
            dtype=image.dtype,
            chunks=FIRST_IMAGE_CHUNK,
            shards=shard_shape(image.shape, FIRST_IMAGE_CHUNK),
            compressors=make_compressors(2),
        )
        array[...] = image
    file.write_text(json.dumps(content))


def test_labels_and_channels_are_those_of_lits(stores: tuple[CaseStore, CaseStore]) -> None:
    new, first = stores
    assert first.labels == LITS_SCHEME == new.labels
    assert first.channels == CT_CHANNELS == new.channels
    assert first.class_voxels == new.class_voxels


def test_metadata_and_voxels_are_equal(stores: tuple[CaseStore, CaseStore]) -> None:
    new, first = stores
    for case_id in new.case_ids:
        assert first.meta(case_id) == new.meta(case_id)
        assert (first.image(case_id) == new.image(case_id)).all()
        assert first.image(case_id).ndim == 4


def test_samples_are_equal(stores: tuple[CaseStore, CaseStore]) -> None:
    settings = DataConfig(patch_size=(32, 24, 24), augmentation="nnunet")
    samples = []
    for store in stores:
        source = PatchSource(store, store.case_ids, settings, seed=3, global_batch_size=2)
        samples.append(source.read_batch(range(6)))
        source.close()
    for new, first in zip(*samples, strict=True):
        assert new.plan == first.plan
        assert new.traits == first.traits
        assert (new.image_CDHW == first.image_CDHW).all()
        assert (new.label_DHW == first.label_DHW).all()
