"""CPU time of a training sample from disk to network input: this project, nnU-Net and MONAI on equal cases.

  OMP_NUM_THREADS=1 python tools/bench/loader.py [--patch 64 128 128] [--samples 40] [--scan CT.nii.gz LABEL.nii.gz]

The headline, first, is the whole way for all systems: loading plus augmentation, both on the CPU. Then follow its
parts: loading alone (nnU-Net's loader without transforms), augmentation alone, one patch from disk, and what this
project leaves to the loader's CPU when a GPU augments, which the peers cannot do.
Cases are synthetic (CT-like noise), or cut from a scan. Each comparison prints one JSON line; a table follows at the
end. Times are CPU milliseconds per sample on one core, all in this process; `ratio` is peer / this project. nnU-Net's
loader takes part if nnunetv2 and blosc2 can be imported (pip install nnunetv2; remove its torchvision), its transforms
always. All use nnU-Net's augmentation; MONAI's transforms get the same probabilities and ranges.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore
import torch
import zarr
from loader_monai import time_monai
from loader_peers import (
    INTENSITY,
    Case,
    cpu_ms,
    nnUNetDataLoader,
    time_nnunet_loader,
    time_nnunet_transforms,
)
from scipy import ndimage

from liverseg_dist.config import DataConfig, IntensityConfig
from liverseg_dist.data.augment import PRESETS, DeviceTransform
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.loading import PatchLoader, PatchSource
from liverseg_dist.data.loading.array_reader import StoreReader
from liverseg_dist.data.loading.index_writer import write_index
from liverseg_dist.data.store.layout import IMAGE_CHUNK, INDEX_FILE, LABEL_CHUNK, make_compressors
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.volume import Index3

SLAB: Index3 = (64, 512, 512)
NNUNET = "nnU-Net loader, blosc2"
BUSY_S = 0.02
"""CPU seconds of Python a sample, in the main thread, while others read."""


@dataclass(frozen=True)
class Contest:
    case: str
    vs: str
    ours_ms: float
    theirs_ms: float

    def as_json(self, patch: Index3) -> str:
        named = {
            "bench": "loader",
            "patch": "x".join(map(str, patch)),
            "case": self.case,
            "vs": self.vs,
        }
        figures = {"ours_ms": round(self.ours_ms, 3), "theirs_ms": round(self.theirs_ms, 3)}
        return json.dumps({**named, **figures, "ratio": round(self.theirs_ms / self.ours_ms, 2)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--patch", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--samples", type=int, default=40, help="of each peer; ours takes five times as many"
    )
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument(
        "--scan",
        type=Path,
        nargs=2,
        metavar=("CT", "LABEL"),
        help="real voxels instead of synthetic ones",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    patch: Index3 = tuple(args.patch)
    cases = list(make_cases(args.cases, args.scan))
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store.zarr", cases)
        contests = []
        for contest in run_contests(Path(folder), store, cases, patch, args.samples):
            contests.append(contest)
            print(contest.as_json(patch), flush=True)
    print(
        f"\n{'case, CPU ms per sample':44} {'against':34} {'liverseg':>8} {'peer':>8} {'ratio':>7}"
    )
    for c in contests:
        print(
            f"{c.case:44} {c.vs:34} {c.ours_ms:8.2f} {c.theirs_ms:8.2f} {c.theirs_ms / c.ours_ms:7.1f}"
        )


def run_contests(
    folder: Path, store: "BenchStore", cases: list[Case], patch: Index3, samples: int
) -> Iterator[Contest]:
    loaded, transformed = time_ours(store, patch, 5 * samples)
    whole = {}
    if nnUNetDataLoader is not None:
        whole[NNUNET] = time_nnunet_loader(folder / "nnunet", cases, patch, samples)
    whole |= {
        "MONAI CacheDataset": time_monai(cases, patch, samples // 2),
        "MONAI CacheDataset, indices cached": time_monai(
            cases, patch, samples, cached_indices=True
        ),
        "MONAI PersistentDataset": time_monai(cases, patch, samples // 2, disk=folder / "monai"),
    }
    for name, spent in whole.items():
        yield Contest("loading and augmentation", name, loaded + transformed, spent)
    if nnUNetDataLoader is not None:
        spent = time_nnunet_loader(folder / "plain", cases, patch, samples, is_augmented=False)
        yield Contest("loading alone", NNUNET, loaded, spent)
    spent = time_nnunet_transforms(cases, patch, samples)
    yield Contest("augmentation alone", "batchgeneratorsv2 (nnU-Net)", transformed, spent)
    readers = time_readers(folder, store, cases, patch)
    ours = readers.pop("ours")
    for name, spent in readers.items():
        yield Contest("one random image patch from disk", name, ours, spent)
    for name, spent in whole.items():
        yield Contest("CPU of a loader whose device augments", name, loaded, spent)
    yield time_threads_against_processes(store, patch, 2 * samples)
    yield from time_unknown_cases(store, patch, max(2, samples // len(cases)))


# --- cases --------------------------------------------------------------------------------------------------------


def make_cases(count: int, scan: list[Path] | None) -> Iterator[Case]:
    """Slabs of 64 slices: image (int16 HU) and label (uint8)."""
    if scan is not None:
        image, label = (
            read_nifti(path, kind).voxels
            for path, kind in zip(scan, ("image", "label"), strict=True)
        )
        first = max(0, int(np.median(np.nonzero(label)[0])) - SLAB[0] // 2)
        image, label = image[first : first + SLAB[0]], label[first : first + SLAB[0]]
    else:
        image, label = made_case()
    for number in range(count):
        yield (
            np.ascontiguousarray(np.roll(image, 25 * number, axis=2).astype(np.int16)),
            np.ascontiguousarray(np.roll(label, 25 * number, axis=2).astype(np.uint8)),
        )


def made_case() -> Case:
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SLAB), indexing="ij")
    organs = ndimage.zoom(
        rng.normal(size=(8, 16, 16)).astype(np.float32),
        [n / m for n, m in zip(SLAB, (8, 16, 16), strict=True)],
        order=1,
    )
    label = (z**2 / 1.2 + ((y - 0.1) / 0.5) ** 2 + ((x + 0.25) / 0.5) ** 2 < 1).astype(np.uint8)
    for centre, size in (
        ((0, 0.1, -0.2), 0.12),
        ((0.4, -0.1, -0.4), 0.04),
        ((-0.5, 0.2, -0.1), 0.06),
    ):
        label[(z - centre[0]) ** 2 / 4 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < size**2] = 2
    inside = (y / 0.75) ** 2 + (x / 0.9) ** 2 < 1
    noise = ndimage.gaussian_filter(rng.normal(size=SLAB).astype(np.float32), (0.3, 0.7, 0.7))
    image = 30 + 30 * organs + 60 * (label == 1) + 20 * (label == 2) + 12 * noise / noise.std()
    return np.where(inside, image, -1000 + 4 * noise).astype(np.int16), label


@dataclass(frozen=True)
class BenchMeta:
    labelled: bool = True
    valid_slices: tuple[int, int] = (0, SLAB[0])
    class_voxels: tuple[int, int, int] = (1, 1, 1)
    intensities: tuple[IntensityConfig, ...] = (INTENSITY,)
    present: tuple[bool, ...] = (True,)
    annotated: tuple[str, ...] = LITS_SCHEME.structure_names


@dataclass(frozen=True)
class BenchStore:
    """The store's layout without its bookkeeping."""

    path: Path
    case_ids: list[str]
    foregrounds: list[np.ndarray]
    channels: int = 1

    content_sha256: str | None = None
    """Set where the store has a loading index."""

    def meta(self, case_id: str) -> BenchMeta:
        return BenchMeta(intensities=(INTENSITY,) * self.channels, present=(True,) * self.channels)

    def foreground(self, case_id: str) -> np.ndarray:
        return self.foregrounds[self.case_ids.index(case_id)]


def write_store(path: Path, cases: list[Case], channels: int = 1) -> BenchStore:
    """Write cases in the store's layout; further channels have the same texture at other places."""
    group = zarr.open_group(str(path), mode="w")
    names = [f"case_{i}" for i in range(len(cases))]
    for name, case in zip(names, cases, strict=True):
        for kind, voxels, chunk in zip(
            ("image", "label"), case, (IMAGE_CHUNK, LABEL_CHUNK), strict=True
        ):
            if kind == "image":
                shifted = [np.roll(voxels, 40 * channel, axis=1) for channel in range(channels)]
                voxels = np.stack(shifted)
            array = group.create_array(
                f"cases/{name}/{kind}", shape=voxels.shape, dtype=voxels.dtype, chunks=chunk,
                shards=voxels.shape, compressors=make_compressors(voxels.itemsize),
            )  # fmt: skip
            array[:] = voxels
    return BenchStore(path, names, [foreground_rows(label) for _, label in cases], channels)


def foreground_rows(label: np.ndarray) -> np.ndarray:
    components, _ = ndimage.label(label == 2)
    liver, tumour = np.argwhere(label == 1)[::200], np.argwhere(label == 2)[::20]
    rows = np.concatenate(
        [
            np.c_[np.ones(len(liver)), np.zeros(len(liver)), liver],
            np.c_[np.full(len(tumour), 2), components[tuple(tumour.T)], tumour],
        ]
    ).astype(np.int16)
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


# --- clocks -------------------------------------------------------------------------------------------------------


def time_readers(
    folder: Path, store: BenchStore, cases: list[Case], patch: Index3
) -> dict[str, float]:
    """The best of several rounds, for each way to read one random image patch."""
    rng = np.random.default_rng(1)
    starts = [
        tuple(int(rng.integers(0, n - p + 1)) for n, p in zip(SLAB, patch, strict=True))
        for _ in range(40)
    ]
    name = f"cases/{store.case_ids[0]}/image"
    plain = np.memmap(folder / "plain", np.int16, "w+", shape=(1, *SLAB))
    plain[0] = cases[0][0]
    ours = StoreReader(store.path).open_array(store.case_ids[0], "image")
    by_zarr = zarr.open_array(str(store.path), path=name, mode="r")
    specification = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{store.path}/{name}"},
    }
    context = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}}
    by_tensorstore = tensorstore.open(
        specification, context=tensorstore.Context(context), read=True
    ).result()
    out = np.empty((1, *patch), np.int16)

    def box(i: int) -> tuple[slice, ...]:
        start = starts[i % len(starts)]
        inside = [slice(a, a + n) for a, n in zip(start, patch, strict=True)]
        return slice(0, 1), *inside

    ways: dict[str, Callable[[int], object]] = {
        "ours": lambda i: ours.read_box((0, *starts[i % len(starts)]), out),
        "zarr-python": lambda i: out.__setitem__(..., by_zarr[box(i)]),
        "tensorstore": lambda i: out.__setitem__(..., by_tensorstore[box(i)].read().result()),
        "uncompressed memmap (the limit)": lambda i: out.__setitem__(..., plain[box(i)]),
    }
    return {name: min(cpu_ms(way, 40) for _ in range(3)) for name, way in ways.items()}


def time_ours(store: BenchStore, patch: Index3, count: int) -> tuple[float, float]:
    """(loader, augmentation) with the nnU-Net preset, batches of 2."""
    settings = DataConfig(patch_size=patch)
    source = PatchSource(store, store.case_ids, settings, seed=0, global_batch_size=2)
    transform = DeviceTransform(PRESETS["nnunet"], patch)
    loading_s, augmenting_s = [], []
    with PatchLoader(source, ([n, n + 1] for n in range(0, count + 20, 2)), workers=0) as loader:
        before = time.process_time()
        for batch in loader:
            loaded = time.process_time()
            transform(batch)
            loading_s.append(loaded - before)
            before = time.process_time()
            augmenting_s.append(before - loaded)
    return float(np.mean(loading_s[10:])) * 500, float(np.mean(augmenting_s[10:])) * 500


class AsDataset(torch.utils.data.Dataset):
    """Our source behind torch's process loader."""

    def __init__(self, store: BenchStore, patch: Index3, count: int) -> None:
        self.source = PatchSource(
            store, store.case_ids, DataConfig(patch_size=patch, augmentation="none"), 0, 2
        )
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        patch = self.source.read_sample(index)
        return torch.from_numpy(patch.image_CDHW[0]), torch.from_numpy(patch.label_DHW)


def time_threads_against_processes(store: BenchStore, patch: Index3, count: int) -> Contest:
    """CPU of reading (all processes) beside a main thread that is busy in Python, as one that launches kernels."""

    def spent_s() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def run(samples: Iterator) -> float:
        started = spent_s()
        for _ in samples:
            until = time.thread_time() + BUSY_S
            while time.thread_time() < until:
                pass
        return ((spent_s() - started) / count - BUSY_S) * 1e3

    source = PatchSource(
        store, store.case_ids, DataConfig(patch_size=patch, augmentation="none"), 0, 2
    )
    with PatchLoader(source, ([n] for n in range(count)), workers=1) as loader:
        by_thread = run(iter(loader))
    loader_of_torch = torch.utils.data.DataLoader(
        AsDataset(store, patch, count), batch_size=1, num_workers=1, prefetch_factor=4
    )
    by_process = run(iter(loader_of_torch))
    return Contest(
        "read beside a main thread busy in Python",
        "torch DataLoader, one process",
        by_thread,
        by_process,
    )


# --- cases that were not read before ------------------------------------------------------------------------------


class StoreOnDisk(BenchStore):
    """Foreground samples as a store has them, in an array of each case."""

    def foreground(self, case_id: str) -> np.ndarray:
        return np.asarray(zarr.open_array(str(self.path), path=f"cases/{case_id}/foreground")[...])


def time_unknown_cases(store: BenchStore, patch: Index3, rounds: int) -> Iterator[Contest]:
    """The first sample of a case, with and without the loading index, and a later one."""
    on_disk = StoreOnDisk(store.path, store.case_ids, store.foregrounds, "content")
    group = zarr.open_group(str(store.path))
    for case_id, rows in zip(store.case_ids, store.foregrounds, strict=True):
        group.create_array(f"cases/{case_id}/foreground", data=rows)
    without, _ = time_first_samples(on_disk, patch, rounds)
    with (store.path / INDEX_FILE).open("wb") as file:
        write_index(on_disk, file)
    unknown, known = time_first_samples(on_disk, patch, rounds)
    yield Contest("first sample of a case, with the index", "without the index", unknown, without)
    yield Contest("first sample of a case, with the index", "a later sample", unknown, known)


def time_first_samples(store: BenchStore, patch: Index3, rounds: int) -> tuple[float, float]:
    """CPU ms of the first sample of each case, and of the same sample again."""
    settings = DataConfig(patch_size=patch, augmentation="none")
    first_s, again_s, count = 0.0, 0.0, len(store.case_ids)
    for _ in range(rounds):
        source = PatchSource(store, store.case_ids, settings, seed=0, global_batch_size=2)
        marks = [time.process_time()]
        for _ in range(2):
            for index in range(count):
                source.read_sample(index)
            marks.append(time.process_time())
        source.close()
        first_s += marks[1] - marks[0]
        again_s += marks[2] - marks[1]
    return first_s * 1e3 / rounds / count, again_s * 1e3 / rounds / count


if __name__ == "__main__":
    guard_output_streams()
    main()
