"""Reading a store with CaseStore, zarr-python, tensorstore and OME-Zarr; damaged stores."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tensorstore
import yaozarrs
import zarr
from fsspec.registry import known_implementations

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import RunFailed, UserError
from tests.data.sources import convert, write_source


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labelled scans. Read only."""
    folder = tmp_path_factory.mktemp("store")
    assert convert(write_source(folder / "src", cases=5), folder / "s.zarr")[0] == 0
    return folder / "s.zarr"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the root only, for tests that change it."""
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json").write_bytes((store / "zarr.json").read_bytes())
    return tmp_path / "s.zarr"


def change(store: Path, **root: Any) -> None:
    content = json.loads((store / "zarr.json").read_text())
    content["attributes"]["liverseg"].update(root)
    (store / "zarr.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["image", "label", "source_label", "foreground"])
def test_other_readers_see_the_same_voxels(store: Path, name: str) -> None:
    values = getattr(CaseStore.open(store), name)("liver_1")
    plain = zarr.open_group(str(store), mode="r", use_consolidated=False)
    assert np.array_equal(np.asarray(plain[f"cases/liver_1/{name}"][...]), values)  # type: ignore[index]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(store / "cases/liver_1" / name)},
    }
    other = tensorstore.open(spec, read=True).result().read().result()
    assert np.array_equal(other, values)


def test_one_shard_per_array_with_checksums(store: Path) -> None:
    case = zarr.open_group(str(store / "cases/liver_0"), mode="r")
    assert sorted(name for name, _ in case.arrays()) == [
        "foreground",
        "image",
        "label",
        "source_label",
    ]
    for name, array in case.arrays():
        assert all(n <= s for n, s in zip(array.shape, array.shards, strict=True))
        assert sum(1 for p in (store / "cases/liver_0" / name / "c").rglob("*") if p.is_file()) == 1
        (sharding,) = array.metadata.to_dict()["codecs"]
        assert sharding["configuration"]["codecs"][-1]["name"] == "crc32c"
        assert sharding["configuration"]["index_codecs"][-1]["name"] == "crc32c"
    assert case["image"].chunks == (1, 64, 16, 64)  # type: ignore[union-attr]


def test_ome_zarr_readers_accept_every_case(store: Path) -> None:
    """yaozarrs holds metadata and arrays against the OME-Zarr 0.5 specification."""
    for case in (store / "cases").glob("*/"):
        yaozarrs.validate_zarr_store(str(case))
    image = yaozarrs.open_group(str(store / "cases/liver_0")).ome_metadata()
    assert image is not None
    (scale,) = image.multiscales
    assert [(axis.name, getattr(axis, "unit", None)) for axis in scale.axes] == [
        ("c", None), ("z", "millimeter"), ("y", "millimeter"), ("x", "millimeter"),
    ]  # fmt: skip
    meta = CaseStore.open(store).meta("liver_0")
    steps, origin = scale.datasets[0].coordinateTransformations
    assert tuple(steps.scale) == pytest.approx((1.0, *meta.grid.spacing_mm))
    assert tuple(origin.translation) == pytest.approx((0.0, *meta.grid.world_mm(np.zeros(3))[::-1]))


def test_opening_reads_only_the_root(copy: Path) -> None:
    """Ids, metadata and splits are known without another file: one request to an object store."""
    opened = CaseStore.open(copy)
    assert len(opened.case_ids) == 5
    assert opened.meta("liver_3").grid.shape == (64, 40, 44)
    assert opened.convert == ConvertConfig()
    assert opened.spacing_mm == pytest.approx((2.0, 1.5, 1.5))
    assert opened.class_voxels == tuple(
        np.sum([opened.meta(c).class_voxels for c in opened.case_ids], axis=0)
    )
    assert opened.audit["liver_0"]["status"] == "kept"


def test_parts_are_complete_and_disjoint(store: Path) -> None:
    opened = CaseStore.open(store)
    for fold in range(5):
        train, validation = opened.ids("train", fold), opened.ids("validation", fold)
        assert (len(train), len(validation)) == (4, 1)
        assert sorted({*train, *validation}) == sorted(opened.case_ids)
    assert opened.ids("train", "all") == opened.case_ids
    assert opened.ids("validation", "all") == opened.ids("test") == ()
    with pytest.raises(UserError, match="no fold 5; it has folds 0 to 4"):
        opened.ids("train", 5)


def test_a_store_on_a_remote_file_system(store: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(store), "/remote.zarr", recursive=True)
    opened = CaseStore.open("memory://remote.zarr")
    assert np.array_equal(opened.label("liver_2"), CaseStore.open(store).label("liver_2"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nowhere://bucket/store.zarr", "a URL that fsspec supports"),
        ("http://127.0.0.1:9/store.zarr", "check that this machine can reach it"),
        ("memory://there/is/none.zarr", "no Zarr store found"),
    ],
)
def test_a_wrong_url_gives_one_line(url: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        CaseStore.open(url)
    assert url in str(refused.value)


def test_a_url_without_driver_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = {"class": "no_such_module.FileSystem", "err": "Install absentfs to access it"}
    monkeypatch.setitem(known_implementations, "absent", driver)
    with pytest.raises(
        UserError, match=r"absent://b/s.zarr: Install absentfs to access it, then .*pip install"
    ):
        CaseStore.open("absent://b/s.zarr")


@pytest.mark.parametrize(
    ("schema", "remedy"),
    [
        (3, "install a newer liverseg_dist"),
        (0, "convert the data again"),
        (None, "convert the data"),
    ],
)
def test_an_unknown_schema_is_refused(copy: Path, schema: int | None, remedy: str) -> None:
    change(copy, schema=schema)
    with pytest.raises(
        UserError, match=f"store schema {schema}, this version reads 1 and 2; {remedy}"
    ):
        CaseStore.open(copy)


def use(store: CaseStore) -> None:
    store.spacing_mm, store.intensity, store.convert, store.class_voxels  # noqa: B018 - read
    for part in ("train", "validation", "test"):
        store.ids(part, 0)  # type: ignore[arg-type]
    for case_id in store.case_ids:
        store.meta(case_id)
        store.image(case_id)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("cases", None), ("cases", ["liver_0"]), ("cases", {"../x": {}}), ("cases.liver_0", 5), ("splits", {}),
        ("splits.folds", 3), ("splits.folds", [[["liver_0"]]]), ("splits.train_only", ["absent"]), ("audit", []),
        ("name", "a\nb"), ("spacing_mm", [1, 1]), ("spacing_mm", [1, 1, float("nan")]), ("intensity", {}),
        ("intensity", 4), ("convert", {}), ("convert.cleaning.denoiser", "/etc/passwd"),
        ("cases.liver_0.valid_slices", [0, 10**9]), ("cases.liver_0.valid_slices", 7), ("cases.liver_0.patient", []),
        ("cases.liver_0.class_voxels", [1, 2]), ("cases.liver_0.class_voxels", [10**30, 0, 0]),
        ("cases.liver_0.grid.shape_zyx", [10**5] * 3), ("cases.liver_0.grid.shape_zyx", [0, 1, 1]),
        ("cases.liver_0.grid.affine", "x"), ("cases.liver_0.grid.affine", [[float("inf")] * 4] * 4),
        ("cases.liver_0.labelled", "yes"), ("cases.liver_0.lesions", {"tumour": -1}),
    ],
)  # fmt: skip
def test_damaged_metadata_gives_one_line_before_allocation(
    copy: Path, place: str, value: object
) -> None:
    content = json.loads((copy / "zarr.json").read_text())
    node = content["attributes"]["liverseg"]
    *above, last = place.split(".")
    for key in above:
        node = node[key]
    node[last] = value
    (copy / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(str(copy))) as caught:
        use(CaseStore.open(copy))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change_array",
    [
        lambda array: array.update(shape=[10**5] * 3),
        lambda array: array["chunk_grid"]["configuration"].update(
            chunk_shape=[64 * 10**4, 64 * 10**4, 64 * 10**4]
        ),
        lambda array: array.update(data_type="float64"),
        lambda array: array["codecs"][0].update(name="none"),
    ],
    ids=["shape", "shard", "type", "codec"],
)
def test_an_array_with_impossible_metadata_is_refused(
    store: Path, tmp_path: Path, change_array: Any
) -> None:
    damaged = shutil.copytree(store, tmp_path / "s.zarr")
    file = damaged / "cases" / "liver_0" / "image" / "zarr.json"
    content = json.loads(file.read_text())
    change_array(content)
    file.write_text(json.dumps(content))
    with pytest.raises((RunFailed, UserError), match="damaged"):
        CaseStore.open(damaged).image("liver_0")


def test_deep_nesting_is_damage(copy: Path) -> None:
    (copy / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        CaseStore.open(copy)


def test_a_folder_that_is_not_a_store_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="no Zarr store found"):
        CaseStore.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no Zarr store found"):
        CaseStore.open(tmp_path / "file")
    zarr.create_group(str(tmp_path / "other"), zarr_format=3)
    with pytest.raises(UserError, match="not written by liverseg convert"):
        CaseStore.open(tmp_path / "other")
    (copy / "zarr.json").write_text('{"zarr_format": 3, "node')
    with pytest.raises(UserError, match="is damaged"):
        CaseStore.open(copy)


def test_an_unknown_case_and_a_missing_array_are_named(store: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="no case liver_99"):
        CaseStore.open(store).meta("liver_99")
    for name in ("image", "label", "source_label", "foreground"):
        with pytest.raises(RunFailed, match=f"case liver_0, {name}: its file is missing"):
            getattr(CaseStore.open(copy), name)("liver_0")


def test_a_damaged_chunk_is_an_error_that_names_its_case(store: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store, tmp_path / "s.zarr")
    shard = tmp_path / "s.zarr/cases/liver_4/image/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunFailed, match="case liver_4, image: damaged"):
        CaseStore.open(tmp_path / "s.zarr").image("liver_4")
