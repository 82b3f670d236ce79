"""A small data set, its store and a run, made by the real commands in seconds.

The network is trained just enough to find the liver, so that masks are blobs and not noise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from liverseg_dist.commands.main import main
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.intensity import normalise_intensity
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.labels import TUMOUR
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology

PATCH = (32, 32, 32)


@dataclass(frozen=True)
class SmallRun:
    source: Path
    """Task03 folder of phantoms, in several orientations."""
    store: Path
    run: Path


_shared_runs: list[SmallRun] = []


def shared_small_run(factory: pytest.TempPathFactory) -> SmallRun:
    """One run for the whole test session; tests must not change it."""
    if not _shared_runs:
        _shared_runs.append(make_small_run(factory.mktemp("small")))
    return _shared_runs[0]


def make_small_run(folder: Path, cases: int = 5) -> SmallRun:
    source, store = folder / "source", folder / "store.zarr"
    assert (
        main(["phantom", str(source), "--cases", str(cases), "--seed", "3", "--size", "small"]) == 0
    )
    settings = [
        "convert.cleaning.spacing_mm=[5,8,8]",
        "convert.splits.test_fraction=0.4",
        "convert.splits.folds=2",
    ]
    assert main(["convert", str(source), str(store), "convert.workers=1", *settings]) == 0
    train_small_run(folder / "run", store)
    return SmallRun(source, store, folder / "run")


def train_small_run(run: Path, store_path: Path, steps: int = 40, seed: int = 0) -> None:
    """Write a run folder as training does: `config.yaml`, `model.safetensors`."""
    store = CaseStore.open(store_path)
    settings = settings_for(store)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_model(settings.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    rng = np.random.default_rng(seed)
    intensity = settings.data.intensities[0]
    assert intensity is not None
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        case_id = store.case_ids[rng.integers(len(store.case_ids))]
        hu = torch.from_numpy(store.image(case_id)[0])
        image = normalise_intensity(
            hu, intensity.lower_hu, intensity.upper_hu, intensity.mean, intensity.std
        )
        label = torch.from_numpy(store.label(case_id)).long()
        centre = store.foreground(case_id)[:, 2:]
        centre = centre[rng.integers(len(centre))]
        corner = [
            int(np.clip(c - p // 2, 0, n - p))
            for c, n, p in zip(centre, image.shape, PATCH, strict=True)
        ]
        box = tuple(slice(s, s + p) for s, p in zip(corner, PATCH, strict=True))
        logits = model(image[box][None, None])
        weight = torch.tensor([1.0, 3.0, 60.0])
        F.cross_entropy(logits, label[box][None], weight, ignore_index=255).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    with torch.no_grad():
        # Without this shift the network finds no tumour.
        model.heads[0].bias[TUMOUR] += 0.3
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(settings.to_yaml())
    save_file(model.state_dict(), run / "model.safetensors")


def settings_for(store: CaseStore) -> Settings:
    """Settings as training resolves them for this store."""
    settings = load_settings(
        [],
        [
            "model.features=[4,8]",
            "model.strides=[[1,1,1],[4,4,4]]",
            "model.kernels=[[3,3,3],[3,3,3]]",
            "model.blocks_per_level=1",
            "model.deep_supervision=false",
            f"data.patch_size={list(PATCH)}",
            f"data.store={store.path}",
            "data.fold=0",
            "inference.overlap=0.1",
        ],
    )
    data = settings.data.model_copy(
        update={"spacing_mm": store.spacing_mm, "intensity": store.intensity}
    )
    model = resolve_topology(settings.model, data.patch_size, store.spacing_mm)
    return settings.model_copy(update={"data": data, "model": model, "convert": store.convert})
