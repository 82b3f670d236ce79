"""`liverseg preview` on a store that `liverseg convert` wrote from phantom CTs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liverseg_dist.commands.main import main
from liverseg_dist.config import DataConfig, IntensityConfig
from liverseg_dist.data.augment import PRESETS, DeviceTransform
from liverseg_dist.data.conversion.thumbnail import render_thumbnail
from liverseg_dist.data.loading import PatchLoader, PatchSource, fill_in_data_settings
from liverseg_dist.data.preview import (
    TILE_PX,
    PreviewRow,
    find_most_informative_slice,
    render_preview,
)
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.pages import LEGEND


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    assert (
        main(["phantom", str(folder / "source"), "--cases", "3", "--seed", "3", "--size", "small"])
        == 0
    )
    assert (
        main(["convert", str(folder / "source"), str(folder / "store.zarr"), "convert.workers=1"])
        == 0
    )
    return folder / "store.zarr"


def test_preview_draws_the_samples(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder/picture.png"
    command = [
        "preview",
        str(store),
        "--out",
        str(out),
        "--samples",
        "3",
        "data.patch_size=[16,32,32]",
        "data.fold=all",
    ]
    assert main(command) == 0
    assert "3 samples of" in capsys.readouterr().out
    picture = np.asarray(Image.open(out))
    assert picture.shape[0] > 3 * TILE_PX
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]


def test_loader_reads_converted_store(store: Path) -> None:
    cases = CaseStore.open(store)
    plain = DataConfig(patch_size=(16, 32, 32), augmentation="none")
    settings = fill_in_data_settings(plain, cases)
    source = PatchSource(cases, cases.case_ids, settings, 0, 2)
    transform = DeviceTransform(PRESETS["none"], settings.patch_size)
    with PatchLoader(source, [[0, 1], [2, 3]], workers=1) as loader:
        for batch in loader:
            image_BCDHW, label_BDHW = transform(batch)
            for i, index in enumerate(batch.indices):
                plan = source.plan_sample(index)
                box = tuple(
                    slice(a, a + n)
                    for a, n in zip(plan.patch_start, settings.patch_size, strict=True)
                )
                np.testing.assert_array_equal(label_BDHW[i].numpy(), cases.label(plan.case_id)[box])
                hu = cases.image(plan.case_id)[0][box].astype(np.float64)
                known = cases.intensity
                assert isinstance(known, IntensityConfig)
                v = (np.clip(hu, known.lower_hu, known.upper_hu) - known.lower_hu) / (
                    known.upper_hu - known.lower_hu
                )
                np.testing.assert_allclose(
                    image_BCDHW[i, 0].numpy(), (v - known.mean) / known.std, atol=1e-4
                )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "p.jpg"], "p.jpg: the picture is a PNG"),
        (["--out", "p.png", "--samples", "0"], "--samples must be at least 1"),
        (["--out", "p.png", "data.fold=9"], "no fold 9"),
        (["--out", "p.png", "data.augmentation=heavy"], "data.augmentation"),
    ],
)
def test_invalid_arguments_are_user_errors(
    store: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", str(store), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_most_informative_slice() -> None:
    label = np.zeros((5, 8, 8), np.uint8)
    assert find_most_informative_slice(label) == 2
    label[1] = 1
    assert find_most_informative_slice(label) == 1
    label[4, 2:4, 2:4] = 2
    assert find_most_informative_slice(label) == 4


def test_pictures_use_radiological_display() -> None:
    """In RAS arrays x runs to the right; in the picture the patient's right is on the left."""
    image, label = np.zeros((1, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8)
    image[0, -1, -1] = 1.0
    row = PreviewRow("", (), (image, label), (image, label), black=0.0, white=1.0)
    picture = np.asarray(render_preview([row]).convert("L")).astype(int)
    tile = picture[-TILE_PX - 6 : -6, 200 : 200 + TILE_PX]
    bright = np.argwhere(tile > 200)
    assert bright.max(axis=0).tolist() == [TILE_PX // 8 - 1, TILE_PX // 8 - 1]


def test_legend_colours_equal_audit_colours() -> None:
    """Liver, tumour and padding have the same colours in both pictures and in the legend."""
    image, label = np.zeros((1, 9, 9), np.float32), np.zeros((1, 9, 9), np.uint8)
    label[0, :3], label[0, 3:6], label[0, 6:] = 2, 1, 255
    row = PreviewRow("", (), (image, label), (image, label), black=0.0, white=1.0)
    picture = np.asarray(render_preview([row]))
    header = {tuple(pixel) for pixel in picture[:24, :200].reshape(-1, 3)}
    assert {colour for _, colour in LEGEND} <= header
    painted = {tuple(pixel) for pixel in picture[24:, 200 + TILE_PX :].reshape(-1, 3)}
    for _, colour in LEGEND:
        assert tuple(int(0.4 * channel) for channel in colour) in painted  # 40 % over black
    enlarged = np.kron(label, np.ones((1, 7, 7), np.uint8))[:, :60, :60].repeat(3, axis=0)
    hu = np.full((3, 60, 60), -160, np.int16)
    outlined = np.asarray(render_thumbnail(hu, enlarged, (1.0, 1.0, 1.0)))
    shown = {tuple(pixel) for pixel in outlined.reshape(-1, 3)}
    assert {colour for _, colour in LEGEND} <= shown
