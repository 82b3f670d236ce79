"""One stream of samples for any world size, threads, prefetch depth and restart; failures."""

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverseg_dist.config import DataConfig
from liverseg_dist.data.augment import DeviceTransform, draw_augmentation
from liverseg_dist.data.augment.presets import PRESETS, build_preset
from liverseg_dist.data.loading import DevicePrefetcher, PatchLoader, PatchSource
from liverseg_dist.errors import RunFailed, UserError
from tests.data.mini_store import INTENSITY, MiniStore, write_store

PATCH = (16, 24, 24)
SETTINGS = DataConfig(patch_size=PATCH, augmentation="strong", stall_timeout_s=30)
BATCH, SAMPLES = 4, 48


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MiniStore:
    return write_store(
        tmp_path_factory.mktemp("loader") / "store.zarr", cases=3, shape=(64, 48, 56)
    )


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("liverseg-loader")] == []


def rank_batches(rank: int, world_size: int, first: int = 0, micro: int = 2) -> Iterator[list[int]]:
    """As in the trainer: rank r of W has positions r, r + W, ... of each global batch."""
    for step in range(first // BATCH, SAMPLES // BATCH):
        mine = list(range(step * BATCH, (step + 1) * BATCH))[rank::world_size]
        yield from (mine[i : i + micro] for i in range(0, len(mine), micro))


def digests(
    store: MiniStore, batches: Iterator[list[int]], workers: int = 0, prefetch: int = 2
) -> dict:
    """Sample number -> digest of the network's input."""
    source = PatchSource(store, store.case_ids, SETTINGS, seed=7, global_batch_size=BATCH)
    transform = DeviceTransform(build_preset(SETTINGS), PATCH)
    found = {}
    with PatchLoader(source, batches, workers, prefetch) as loader:
        for batch in loader:
            image_BCDHW, label_BDHW = transform(batch.to("cpu"))
            for i, index in enumerate(batch.indices):
                content = image_BCDHW[i].numpy().tobytes() + label_BDHW[i].numpy().tobytes()
                found[index] = (batch.case_ids[i], hashlib.sha256(content).hexdigest())
    return found


@pytest.fixture(scope="module")
def reference(store: MiniStore) -> dict:
    found = digests(store, rank_batches(0, 1))
    assert sorted(found) == list(range(SAMPLES))
    assert len({digest for _, digest in found.values()}) == SAMPLES
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_one_stream_for_any_world_size_and_threads(
    store: MiniStore, reference: dict, world_size: int, workers: int
) -> None:
    merged: dict = {}
    for rank in range(world_size):
        mine = digests(store, rank_batches(rank, world_size), workers, prefetch=1 + rank % 3)
        assert not merged.keys() & mine.keys()
        merged |= mine
    assert merged == reference


@pytest.mark.parametrize("first", [4, 20, 44])
def test_restart_continues_the_same_stream(store: MiniStore, reference: dict, first: int) -> None:
    assert digests(store, rank_batches(0, 1, first), 1) == {
        n: reference[n] for n in range(first, SAMPLES)
    }


def test_micro_batch_size_changes_nothing(store: MiniStore, reference: dict) -> None:
    assert digests(store, rank_batches(0, 1, micro=1)) == reference
    assert digests(store, rank_batches(0, 1, micro=4)) == reference


def test_batches_contain_the_stored_voxels(store: MiniStore) -> None:
    settings = SETTINGS.model_copy(update={"augmentation": "none"})
    source = PatchSource(store, store.case_ids, settings, 3, BATCH)
    with PatchLoader(source, [[0, 1, 2, 3]], workers=1) as loader:
        (batch,) = list(loader)
    assert batch.image_BCDHW.dtype == torch.int16
    assert batch.label_BDHW.dtype == torch.uint8
    assert batch.image_BCDHW.shape == (4, 1, *PATCH)
    for i, index in enumerate(batch.indices):
        plan = source.plan_sample(index)
        box = tuple(slice(a, a + n) for a, n in zip(plan.patch_start, PATCH, strict=True))
        np.testing.assert_array_equal(
            batch.image_BCDHW[i, 0].numpy(), store.image(plan.case_id)[box]
        )
        np.testing.assert_array_equal(batch.label_BDHW[i].numpy(), store.label(plan.case_id)[box])
    expected = [INTENSITY.lower_hu, INTENSITY.upper_hu, INTENSITY.mean, INTENSITY.std]
    torch.testing.assert_close(batch.intensity_BC4, torch.tensor([[expected]] * 4))


def test_foreground_samples_have_their_class_at_the_centre(store: MiniStore) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, 3, BATCH)
    plans = [source.plan_sample(n) for n in range(40)]
    centres = {plan.index: plan.centre for plan in plans if plan.centre}
    assert sorted(centres) == [n for n in range(40) if n % BATCH == 3]
    for plan in plans:
        if plan.centre:
            assert store.label(plan.case_id)[plan.centre.voxel_zyx] == plan.centre.label
    source.close()


def test_patch_larger_than_the_image_is_padded(store: MiniStore) -> None:
    settings = DataConfig(patch_size=(64, 60, 64), augmentation="none")
    source = PatchSource(store, store.case_ids, settings, 0, 2)
    patch = source.read_sample(0)
    inside = np.zeros(patch.label_DHW.shape, bool)
    inside[:, 6:54, 4:60] = True
    np.testing.assert_array_equal(
        patch.image_CDHW[0][inside].reshape(64, 48, 56), store.image(patch.case_id)
    )
    assert (patch.label_DHW[~inside] == 255).all()
    assert (patch.image_CDHW[0][~inside] == INTENSITY.lower_hu).all()
    source.close()


def test_rotated_samples_are_read_with_their_surrounding(store: MiniStore) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, 3, BATCH)
    plan = next(p for p in map(source.plan_sample, range(100)) if p.shape != PATCH)
    draw = draw_augmentation(PRESETS["strong"], PATCH, plan.augment_seed)
    assert plan.shape == draw.field_shape
    patch = source.read_sample(plan.index)
    assert patch.image_CDHW.shape == (1, *plan.shape)
    offset = [a - b for a, b in zip(plan.patch_start, plan.start, strict=True)]
    inner = patch.image_CDHW[0][tuple(slice(o, o + n) for o, n in zip(offset, PATCH, strict=True))]
    box = tuple(slice(a, a + n) for a, n in zip(plan.patch_start, PATCH, strict=True))
    np.testing.assert_array_equal(inner, store.image(plan.case_id)[box])
    source.close()


def test_no_surrounding_above_and_below_a_whole_slab(store: MiniStore) -> None:
    settings = SETTINGS.model_copy(update={"patch_size": (64, 24, 24)})
    source = PatchSource(store, store.case_ids, settings, 3, BATCH)
    shapes = {source.plan_sample(n).shape for n in range(100)}
    assert len(shapes) > 10
    assert {shape[0] for shape in shapes} == {64}
    source.close()


def test_closing_early_stops_the_threads(store: MiniStore) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, 3, BATCH)
    loader = PatchLoader(source, ([n] for n in range(10**9)), workers=2, prefetch=3)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_device_prefetcher_gives_the_same_samples(store: MiniStore, reference: dict) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, seed=7, global_batch_size=BATCH)
    with PatchLoader(source, rank_batches(0, 1), workers=1) as loader:
        got = {}
        batches = DevicePrefetcher(
            loader, DeviceTransform(PRESETS["strong"], PATCH), torch.device("cpu")
        )
        for batch in batches:
            batches.begin_next()
            for i, index in enumerate(batch.indices):
                content = (
                    batch.image_BCDHW[i].numpy().tobytes() + batch.label_BDHW[i].numpy().tobytes()
                )
                got[index] = (batch.case_ids[i], hashlib.sha256(content).hexdigest())
    assert got == reference
    assert batches.wait_s == loader.wait_s > 0


def digests_of_packed(store: MiniStore, settings: DataConfig, monkeypatch: Any) -> tuple[dict, Any]:
    """Digests as `digests`, of batches that carry their tables; and the copies of each batch."""
    source = PatchSource(store, store.case_ids, settings, seed=7, global_batch_size=BATCH)
    transform = DeviceTransform(build_preset(settings), PATCH)
    copies: Counter[str] = Counter()
    from_numpy, to = torch.from_numpy, torch.Tensor.to
    found, batches = {}, 0
    with (
        # Without threads, whose own tensors would be counted.
        PatchLoader(source, rank_batches(0, 1), 0, list_tables=transform.list_tables) as loader,
        monkeypatch.context() as patched,
    ):
        for batch in loader:
            # Pageable memory becomes a tensor by `from_numpy` or `tensor`; `to` copies it.
            for name in ("from_numpy", "tensor", "as_tensor"):
                real = getattr(torch, name)
                patched.setattr(torch, name, counted(copies, "host arrays", real))
            patched.setattr(torch.Tensor, "to", counted(copies, "to", to, only_devices=True))
            moved = batch.to("cpu")
            copies["transfers"] += copies.pop("to")
            image_BCDHW, label_BDHW = transform(moved)
            patched.undo()
            assert torch.from_numpy is from_numpy
            batches += 1
            for i, index in enumerate(batch.indices):
                content = image_BCDHW[i].numpy().tobytes() + label_BDHW[i].numpy().tobytes()
                found[index] = (batch.case_ids[i], hashlib.sha256(content).hexdigest())
    return found, (dict(copies), batches)


def counted(copies: Counter[str], name: str, real: Any, only_devices: bool = False) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        target = arguments[1] if len(arguments) > 1 else None
        if not only_devices or isinstance(target, (str, torch.device)):
            copies[name] += 1
        return real(*arguments, **named)

    return call


def test_a_batch_is_one_transfer_and_the_augmentation_copies_nothing(
    store: MiniStore, reference: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each copy from memory that is not pinned waits for the stream."""
    found, (copies, batches) = digests_of_packed(store, SETTINGS, monkeypatch)
    assert found == reference
    assert copies == {"transfers": batches}
    assert batches == SAMPLES // 2


def test_the_parts_of_a_packed_batch_share_one_block(store: MiniStore) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, seed=7, global_batch_size=BATCH)
    transform = DeviceTransform(build_preset(SETTINGS), PATCH)
    seen = 0
    with PatchLoader(source, rank_batches(0, 1), 1, list_tables=transform.list_tables) as loader:
        for batch in loader:
            blocks = {batch.image_BCDHW.untyped_storage().data_ptr()}
            blocks.add(batch.label_BDHW.untyped_storage().data_ptr())
            for key, table in batch.tables.tensors.items():
                blocks.add(table.untyped_storage().data_ptr())
                make, arguments = key
                np.testing.assert_array_equal(table.numpy(), make(*arguments))
                seen += 1
            assert len(blocks) == 1
    assert seen > SAMPLES


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> MiniStore:
    """A store whose case_1 has a damaged image shard."""
    store = write_store(tmp_path / "store.zarr", cases=3, shape=(16, 32, 32))
    shard = tmp_path / "store.zarr/cases/case_1/image/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    return store


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_chunk_stops_the_run_and_is_reported(broken: MiniStore, workers: int) -> None:
    settings = DataConfig(patch_size=(16, 16, 16))
    source = PatchSource(broken, broken.case_ids, settings, 0, 2)
    with (
        PatchLoader(source, ([n] for n in range(50)), workers) as loader,
        pytest.raises(
            RunFailed, match=r"cases/case_1/image/c/0/0/0.*liverseg verify.*data.on_read_error=skip"
        ),
    ):
        list(loader)


def test_skip_replaces_the_sample_and_logs_it(
    broken: MiniStore, caplog: pytest.LogCaptureFixture
) -> None:
    settings = DataConfig(patch_size=(16, 16, 16), on_read_error="skip")

    def stream(workers: int) -> list[tuple[int, str, int]]:
        source = PatchSource(broken, broken.case_ids, settings, 0, 2)
        with PatchLoader(source, ([n, n + 1] for n in range(0, 30, 2)), workers) as loader:
            return [
                (n, case, int(image.long().sum()))
                for b in loader
                for n, case, image in zip(b.indices, b.case_ids, b.image_BCDHW, strict=True)
            ]

    with caplog.at_level(logging.WARNING):
        first = stream(0)
    assert [n for n, _, _ in first] == list(range(30))
    assert {case for _, case, _ in first} == {"case_0", "case_2"}
    assert "case_1" in caplog.text
    assert len(caplog.records) == 1
    assert stream(2) == first


def test_skip_fails_if_no_case_is_readable(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store.zarr", cases=1, shape=(16, 32, 32))
    (tmp_path / "store.zarr/cases/case_0/image/c/0/0/0").unlink()
    source = PatchSource(
        store, store.case_ids, DataConfig(patch_size=(16, 16, 16), on_read_error="skip"), 0, 2
    )
    with pytest.raises(RunFailed, match="20 cases are unreadable"):
        source.read_sample(0)


def test_hanging_file_system_is_reported_with_the_case(tmp_path: Path) -> None:
    """A FIFO instead of the shard: open() waits without end, as with a dead file server."""
    store = write_store(tmp_path / "store.zarr", cases=1, shape=(16, 32, 32))
    shard = tmp_path / "store.zarr/cases/case_0/image/c/0/0/0"
    source = PatchSource(
        store, store.case_ids, DataConfig(patch_size=(16, 16, 16), stall_timeout_s=0.5), 0, 2
    )
    source.read_sample(0)
    source.close()
    shard.unlink()
    os.mkfifo(shard)
    loader = PatchLoader(source, [[0], [1]], workers=1)
    release = threading.Timer(2.0, lambda: os.close(os.open(shard, os.O_WRONLY)))  # ends the thread
    release.start()
    started = time.monotonic()
    with pytest.raises(
        RunFailed, match=r"stuck for 0 s: reading case case_0 \(sample 0\).*samples 0"
    ):
        next(loader)
    assert time.monotonic() - started < 30
    release.join()


def test_failing_thread_is_reported(store: MiniStore) -> None:
    source = PatchSource(store, store.case_ids, SETTINGS, 0, BATCH)
    with (
        PatchLoader(source, [[-1]], workers=1) as loader,
        pytest.raises(RunFailed, match="looking up sample -1"),
    ):
        next(loader)


def test_user_errors(store: MiniStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fold 0 has no training case.*data.fold"):
        PatchSource(store, [], SETTINGS, 0, BATCH)
    unlabelled = write_store(tmp_path / "s.zarr", cases=1, shape=(16, 16, 16), labelled=False)
    source = PatchSource(unlabelled, unlabelled.case_ids, SETTINGS, 0, BATCH)
    with pytest.raises(UserError, match="case_0 has no label"):
        source.read_sample(0)
