"""Conversion with a trained run: unlabelled scans get a label, or a slab on their liver."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference.label_imputation import RunLabeller
from liverseg_dist.inference.load_run import build_predictor, load_run
from liverseg_dist.inference.segment_scan import segment_scan
from tests.data.sources import convert, run, tree
from tests.inference.small_run import SmallRun, shared_small_run

UNLABELLED = 1
"""Index of the phantom whose label is removed."""
COARSE = (
    "convert.cleaning.spacing_mm=[5,8,8]",
    "convert.splits.test_fraction=0",
    "convert.splits.folds=2",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


@pytest.fixture(scope="module")
def source(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms; one of them has no label."""
    folder = tmp_path_factory.mktemp("unlabelled") / "source"
    shutil.copytree(small.source, folder)
    label = read_dataset(folder).training[UNLABELLED].label
    assert label is not None
    label.unlink()
    return folder


@pytest.fixture(scope="module")
def unlabelled_id(source: Path) -> str:
    return read_dataset(source).training[UNLABELLED].case_id


@pytest.fixture(scope="module")
def imputed(small: SmallRun, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("imputed") / "s.zarr"
    assert convert(source, store, *COARSE, *impute_with(small.run))[0] == 0
    return store


def impute_with(run_folder: Path) -> tuple[str, str]:
    return "convert.cleaning.missing_label=impute", f"convert.labels_from={run_folder}"


def test_the_imputed_label_is_the_prediction_of_the_run(
    small: SmallRun, source: Path, unlabelled_id: str, imputed: Path
) -> None:
    store = CaseStore.open(imputed)
    device = torch.device("cpu")
    loaded = load_run(small.run, device)
    image = read_nifti(read_dataset(source).training[UNLABELLED].image)
    mask = segment_scan(image, build_predictor([loaded], device), loaded.settings)
    assert mask.any()
    np.testing.assert_array_equal(store.source_label(unlabelled_id), mask)
    assert store.meta(unlabelled_id).imputed
    assert store.meta(unlabelled_id).labelled
    assert store.audit[unlabelled_id]["status"] == "imputed"
    assert {"label_missing", "label_imputed"} <= {
        f["code"] for f in store.audit[unlabelled_id]["findings"]
    }
    assert not any(
        store.meta(case_id).imputed for case_id in store.case_ids if case_id != unlabelled_id
    )


def test_an_imputed_case_is_used_for_training_only(unlabelled_id: str, imputed: Path) -> None:
    store = CaseStore.open(imputed)
    for fold in (0, 1):
        assert unlabelled_id in store.ids("train", fold)
        assert unlabelled_id not in store.ids("validation", fold)
        assert len(store.ids("train", fold)) + len(store.ids("validation", fold)) == len(
            store.case_ids
        )
    assert store.ids("train", "all") == store.case_ids
    assert unlabelled_id not in store.ids("test")
    assert run("verify", imputed)[0] == 0
    assert "training only" in (imputed / "audit.html").read_text()


def test_other_cases_are_stored_as_without_imputation(
    source: Path, imputed: Path, tmp_path: Path
) -> None:
    assert convert(source, tmp_path / "s.zarr", *COARSE)[0] == 0
    without, store = CaseStore.open(tmp_path / "s.zarr"), CaseStore.open(imputed)
    assert without.intensity == store.intensity
    assert without.root["coverage"] == store.root["coverage"]
    assert without.root["splits"]["folds"] == store.root["splits"]["folds"]


def test_any_number_of_workers_writes_the_same_bytes(
    small: SmallRun, source: Path, imputed: Path, tmp_path: Path
) -> None:
    assert (
        convert(source, tmp_path / "s.zarr", "convert.workers=2", *COARSE, *impute_with(small.run))[
            0
        ]
        == 0
    )
    assert tree(tmp_path / "s.zarr") == tree(imputed)


def test_an_imputed_scan_is_not_trained_on_if_its_patient_is_in_validation(
    small: SmallRun, source: Path, unlabelled_id: str, tmp_path: Path
) -> None:
    other = next(
        case.case_id for case in read_dataset(source).training if case.case_id != unlabelled_id
    )
    (tmp_path / "p.csv").write_text(f"case,patient\n{unlabelled_id},one\n{other},one\n")
    options = (*COARSE, *impute_with(small.run), f"convert.splits.patients={tmp_path / 'p.csv'}")
    assert convert(source, tmp_path / "s.zarr", *options)[0] == 0
    store = CaseStore.open(tmp_path / "s.zarr")
    (fold,) = (n for n in (0, 1) if other in store.ids("validation", n))
    assert unlabelled_id not in store.ids("train", fold)
    assert unlabelled_id in store.ids("train", 1 - fold)


def test_the_slab_of_an_unlabelled_scan_is_on_the_predicted_liver(
    small: SmallRun, source: Path, unlabelled_id: str, tmp_path: Path
) -> None:
    unlabelled = (
        *COARSE[1:],
        "convert.cleaning.spacing_mm=[1,8,8]",
        "convert.cleaning.missing_label=unlabelled",
    )
    assert convert(source, tmp_path / "tiles.zarr", *unlabelled)[0] == 0
    assert (
        convert(source, tmp_path / "s.zarr", *unlabelled, f"convert.labels_from={small.run}")[0]
        == 0
    )
    tiles = [
        c
        for c in CaseStore.open(tmp_path / "tiles.zarr").case_ids
        if c.startswith(f"{unlabelled_id}_tile")
    ]
    assert len(tiles) > 1  # the position of the liver is unknown
    store = CaseStore.open(tmp_path / "s.zarr")
    assert not store.meta(unlabelled_id).labelled
    assert (store.label(unlabelled_id) == 255).all()
    grid, truth = (
        store.meta(unlabelled_id).grid,
        CaseStore.open(small.store).source_label(unlabelled_id),
    )
    positions = store.meta(unlabelled_id).source_grid.world_mm(np.argwhere(truth > 0))
    z = grid.index_of(positions)[:, 0]
    # The small run is not accurate, but it finds the liver.
    assert ((z > -0.5) & (z < 63.5)).mean() > 0.8
    assert "liver_found" in {f["code"] for f in store.audit[unlabelled_id]["findings"]}


def test_another_run_needs_another_store_or_force(
    small: SmallRun, source: Path, unlabelled_id: str, imputed: Path, tmp_path: Path
) -> None:
    """With --force only the unlabelled scan is converted again; this run finds no liver in it."""
    empty_run = tmp_path / "empty_run"
    shutil.copytree(small.run, empty_run)
    weights = load_file(empty_run / "model.safetensors")
    weights["heads.0.bias"] = torch.tensor([1e4, 0.0, 0.0])
    save_file(weights, empty_run / "model.safetensors")
    shutil.copytree(imputed, tmp_path / "s.zarr")
    options = (*COARSE, *impute_with(empty_run))
    assert convert(source, tmp_path / "s.zarr", *options)[0] == 2
    code, result = convert(source, tmp_path / "s.zarr", "--force", *options)
    assert (code, result["converted"], result["counts"]["excluded"]) == (0, 1, 1)
    codes = {f["code"] for f in result["audit"][unlabelled_id]["findings"]}
    assert {"label_empty", "label_not_imputed"} <= codes
    assert unlabelled_id not in CaseStore.open(tmp_path / "s.zarr").case_ids


def test_a_scan_of_the_test_set_is_not_labelled(
    small: SmallRun, source: Path, unlabelled_id: str, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    index = json.loads((folder / "dataset.json").read_text())
    entry = next(e for e in index["training"] if unlabelled_id in e["image"])
    index["training"].remove(entry)
    index["test"] = [*index.get("test", []), entry["image"]]
    index.pop("numTraining", None)
    index.pop("numTest", None)
    (folder / "dataset.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "s.zarr", *COARSE, *impute_with(small.run))[0] == 0
    store = CaseStore.open(tmp_path / "s.zarr")
    assert unlabelled_id not in store.case_ids
    assert store.audit[unlabelled_id]["status"] == "unlabelled"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("convert.cleaning.missing_label=impute",), "needs convert.labels_from"),
        (("convert.labels_from=somewhere",), "set one of them"),
        (
            ("convert.cleaning.missing_label=impute", "convert.labels_from=no/such/run"),
            "no such run folder",
        ),
    ],
)
def test_wrong_settings_give_one_error_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert convert(source, tmp_path / "s.zarr", *options)[0] == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


def test_the_fingerprint_depends_on_weights_and_settings(small: SmallRun, tmp_path: Path) -> None:
    shutil.copytree(small.run, tmp_path / "copy")
    assert (
        RunLabeller.from_run(tmp_path / "copy").fingerprint
        == RunLabeller.from_run(small.run).fingerprint
    )
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["heads.0.bias"] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    assert (
        RunLabeller.from_run(tmp_path / "copy").fingerprint
        != RunLabeller.from_run(small.run).fingerprint
    )
