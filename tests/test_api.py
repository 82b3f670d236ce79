"""The Python interface: the snippet of the README runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import liverseg_dist
from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.errors import UserError
from tests.inference.small_run import SmallRun, shared_small_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


def scan_of(run: SmallRun) -> Path:
    return sorted((run.source / "imagesTr").glob("*.nii.gz"))[0]


def readme_snippet() -> str:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use from Python")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_snippet_of_the_readme_runs(small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "store.zarr").symlink_to(small_run.store)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(small_run.run)
    (tmp_path / "SCAN.nii.gz").symlink_to(scan_of(small_run))
    done = subprocess.run(
        [sys.executable, "-c", readme_snippet()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 1, 64, 128, 128]) torch.Size([2, 64, 128, 128])" in done.stdout
    assert (
        main(
            [
                "predict",
                str(small_run.run),
                str(scan_of(small_run)),
                "--out",
                str(tmp_path / "masks"),
            ]
        )
        == 0
    )
    expected = read_nifti(tmp_path / "masks" / scan_of(small_run).name, "label")
    assert np.array_equal(read_nifti(tmp_path / "mask.nii.gz", "label").voxels, expected.voxels)


def test_batches_are_a_function_of_their_number(small_run: SmallRun) -> None:
    store = liverseg_dist.open_store(small_run.store)
    first, second = (
        liverseg_dist.iterate_batches(store, 2, (16, 32, 32), augmentation="light", workers=workers)
        for workers in (0, 2)
    )
    for _ in range(3):
        one, other = next(first), next(second)
        assert one.indices == other.indices
        assert np.array_equal(one.image_BCDHW.numpy(), other.image_BCDHW.numpy())
    first.close()
    second.close()


def test_cases_come_with_their_labels(small_run: SmallRun) -> None:
    store = liverseg_dist.open_store(small_run.store)
    cases = list(liverseg_dist.iterate_cases(store, "train"))
    assert [case.case_id for case in cases] == list(store.ids("train", 0))
    for case in cases:
        assert case.image_zyx.dtype == np.int16
        assert case.label_zyx is not None
        assert case.label_zyx.shape == case.image_zyx.shape
        assert set(np.unique(case.label_zyx)) <= {0, 1, 2, 255}


def test_an_array_needs_a_geometry(small_run: SmallRun) -> None:
    model = liverseg_dist.load_model(small_run.run)
    image_zyx = np.zeros((8, 16, 16), np.int16)
    with pytest.raises(UserError, match="either spacing_mm"):
        liverseg_dist.predict(model, image_zyx)
    with pytest.raises(UserError, match="three axes"):
        liverseg_dist.predict(model, image_zyx[0], spacing_mm=(5, 1, 1))
    mask_zyx = liverseg_dist.predict(model, image_zyx, spacing_mm=(5.0, 8.0, 8.0))
    assert (mask_zyx.shape, mask_zyx.dtype) == (image_zyx.shape, np.uint8)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, liverseg_dist; assert 'torch' not in sys.modules; assert 'predict' in dir(liverseg_dist)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        liverseg_dist.nothing  # noqa: B018
