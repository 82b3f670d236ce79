"""The trained denoiser: training without clean images, and its weights inside the settings."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from liverseg_dist.commands.main import main
from liverseg_dist.config import CleaningConfig, ConvertConfig, load_settings
from liverseg_dist.data.io.nifti import write_image
from liverseg_dist.data.preprocessing.denoise import reduce_noise
from liverseg_dist.data.preprocessing.denoiser_training import (
    DenoiserTraining,
    draw_patch,
    mask_blind_spots,
    train_denoiser,
)
from liverseg_dist.data.preprocessing.denoising_autoencoder import (
    CHANNELS,
    DILATIONS,
    RANGE_HU,
    SLICES,
    Denoiser,
    apply_denoiser,
    load_denoiser,
    predict_noise,
)
from liverseg_dist.data.preprocessing.pipeline import prepare_scan
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume

WIDTHS = (SLICES, *(CHANNELS,) * (len(DILATIONS) - 1), 1)
CPU = torch.device("cpu")


def organs(shape: tuple[int, int, int] = (10, 112, 112)) -> tuple[np.ndarray, np.ndarray]:
    """(clean, noisy): organs of constant HU in air, noise that is correlated in plane as a CT's."""
    rng = np.random.default_rng(0)
    z, y, x = np.indices(shape)
    clean = np.where(((y - 56) / 52) ** 2 + ((x - 56) / 52) ** 2 < 1, 50.0, -1000.0)
    for _ in range(12):
        centre, size = rng.uniform((0, 25, 25), (10, 85, 85)), rng.uniform(5, 15)
        clean[
            ((z - centre[0]) * 3) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < size**2
        ] = rng.uniform(-20, 180)
    noise = ndimage.gaussian_filter(rng.normal(size=shape), (0, 0.55, 0.55))
    return clean.astype(np.int16), np.rint(clean + 20 * noise / noise.std()).astype(np.int16)


def some_denoiser(seed: int = 0) -> Denoiser:
    rng = np.random.default_rng(seed)
    return Denoiser(
        tuple(
            rng.normal(0, 0.1, (b, a, 3, 3)).astype(np.float16)
            for a, b in itertools.pairwise(WIDTHS)
        ),
        tuple(rng.normal(0, 0.1, b).astype(np.float16) for b in WIDTHS[1:]),
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
    path.write_bytes(some_denoiser().to_bytes())
    return path


# --- learning ---------------------------------------------------------------------------------------------------------


def test_training_needs_noisy_slices_only() -> None:
    clean, noisy = organs()
    denoiser = train_denoiser([noisy], DenoiserTraining(steps=200, batch_size=4), CPU)
    cleaned = apply_denoiser(noisy, denoiser)
    soft = clean > -200
    gain = peak_signal_noise_ratio(
        clean[soft], cleaned[soft], data_range=200
    ) - peak_signal_noise_ratio(clean[soft], noisy[soft], data_range=200)
    assert gain > 1.5  # dB, after a few seconds
    assert abs(float(cleaned[soft].mean()) - float(noisy[soft].mean())) < 3  # HU stay HU


def test_equal_seeds_give_equal_files() -> None:
    _, noisy = organs()
    files = [
        train_denoiser([noisy], DenoiserTraining(steps=3, batch_size=2, seed=seed), CPU).to_bytes()
        for seed in (1, 1, 2)
    ]
    assert files[0] == files[1] != files[2]
    assert len({Denoiser.from_bytes(files[0]).to_bytes() for _ in range(20)}) == 1


def test_predicted_pixels_are_hidden_with_their_neighbours() -> None:
    training = DenoiserTraining(block_radius=2, hidden_share=0.01)
    stacks = np.arange(2 * SLICES * 40 * 40, dtype=np.float32).reshape(
        2, SLICES, 40, 40
    )  # every pixel its own value
    masked, is_predicted = mask_blind_spots(stacks, np.random.default_rng(0), training)
    middle = SLICES // 2
    changed = masked[:, middle] != stacks[:, middle]
    block = np.stack([ndimage.binary_dilation(a, np.ones((5, 5))) for a in is_predicted])
    inner = np.s_[:, 2:-2, 2:-2]  # at the border blocks go round, which does no harm
    assert is_predicted.any()
    assert changed[block].all()
    assert not (changed & ~block)[inner].any()
    np.testing.assert_array_equal(np.delete(masked, middle, 1), np.delete(stacks, middle, 1))


def test_patches_show_soft_tissue_and_small_scans_work() -> None:
    _, noisy = organs()
    rng = np.random.default_rng(0)
    centres = [draw_patch([noisy], rng)[SLICES // 2, 40, 40] for _ in range(50)]
    assert np.mean(np.array(centres) > -1.9) > 0.9  # -1.9: what air comes to
    assert draw_patch([np.full((1, 5, 6), -1000, np.int16)], rng).shape == (SLICES, 80, 80)


# --- applying ---------------------------------------------------------------------------------------------------------


def test_the_network_equals_torch_layers() -> None:
    denoiser = some_denoiser()
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
        layer = nn.Conv2d(
            a, b, 3, dilation=DILATIONS[n], padding=DILATIONS[n], padding_mode="replicate"
        )
        layer.weight.data = torch.from_numpy(denoiser.weights[n].astype(np.float32))
        layer.bias.data = torch.from_numpy(denoiser.biases[n].astype(np.float32))
        layers += [layer, nn.LeakyReLU(0.1)]
    reference = nn.Sequential(*layers[:-1])
    stack = torch.from_numpy(
        np.random.default_rng(0).normal(size=(2, SLICES, 20, 24)).astype(np.float32)
    )
    pairs = [(layer.weight, layer.bias) for layer in layers[::2]]
    torch.testing.assert_close(predict_noise(stack, pairs), reference(stack)[:, 0])  # type: ignore[arg-type]


def test_only_soft_tissue_changes_by_the_given_share() -> None:
    _, noisy = organs((5, 40, 40))
    noisy[2, 20, 20] = 1500
    before = noisy.copy()
    noisy.setflags(write=False)
    whole, half = (
        apply_denoiser(noisy, some_denoiser()),
        apply_denoiser(noisy, some_denoiser(), share=0.5),
    )
    np.testing.assert_array_equal(noisy, before)
    outside = (noisy <= RANGE_HU[0]) | (noisy >= RANGE_HU[1])
    np.testing.assert_array_equal(whole[outside], noisy[outside])
    assert (whole != noisy).any()
    np.testing.assert_allclose(
        half - noisy.astype(float), (whole - noisy.astype(float)) / 2, atol=0.76
    )
    np.testing.assert_array_equal(apply_denoiser(noisy, some_denoiser(), share=0.0), noisy)


# --- weights that travel ----------------------------------------------------------------------------------------------


def test_a_denoiser_file_is_kept_in_the_settings(file: Path, tmp_path: Path) -> None:
    cleaning = CleaningConfig(noise="autoencoder", denoiser=str(file))
    assert str(file) not in cleaning.model_dump_json()  # its content, not its place
    again = CleaningConfig.model_validate_json(cleaning.model_dump_json())
    assert again == cleaning
    found = load_denoiser(again.denoiser)
    for loaded, saved in zip(found.weights, some_denoiser().weights, strict=True):
        np.testing.assert_array_equal(loaded, saved)
    settings = load_settings(
        overrides=["convert.cleaning.noise=autoencoder", f"convert.cleaning.denoiser={file}"]
    )
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    assert load_settings([tmp_path / "c.yaml"]) == settings


def test_prepare_scan_applies_the_denoiser(file: Path) -> None:
    _, noisy = organs((4, 32, 32))
    noisy = np.maximum(
        noisy, np.int16(-1024)
    )  # what lies below is padding, another step's business
    cleaning = CleaningConfig(noise="autoencoder", denoiser=str(file), noise_strength=0.8)
    volume = Volume(noisy, Grid(noisy.shape, np.eye(4)))
    reference = apply_denoiser(noisy, some_denoiser(), 0.8)
    np.testing.assert_array_equal(reduce_noise(noisy, cleaning)[0], reference)
    result = prepare_scan(volume, ConvertConfig(cleaning=cleaning), (1, 1, 1))
    np.testing.assert_array_equal(result.voxels, reference)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convert.cleaning.noise=autoencoder"], "needs denoiser=FILE"),
        (["convert.cleaning.denoiser=/no/such/file"], "cannot be read"),
        (["convert.cleaning.denoiser=/dev/zero"], "larger than"),
        (
            ["convert.cleaning.noise=autoencoder", "convert.cleaning.noise_strength=2", "DENOISER"],
            "at most 1",
        ),
    ],
)
def test_wrong_settings_give_one_line(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(
            overrides=[
                o.replace("DENOISER", f"convert.cleaning.denoiser={file}") for o in overrides
            ]
        )


def with_one(change: np.ndarray) -> bytes:
    good = some_denoiser()
    tensors = {f"{n}.weight": w for n, w in enumerate(good.weights)} | {
        f"{n}.bias": b for n, b in enumerate(good.biases)
    }
    return save({**tensors, "0.bias": change})


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", bytes(1000), b"\x80\x04cos\nsystem\n", with_one(np.zeros(3, np.float16)),
     with_one(np.full(CHANNELS, np.nan, np.float16)), save({"x": np.zeros(3, np.float16)})],
    ids=["empty", "text", "zeros", "pickle", "shape", "nan", "other"],
)  # fmt: skip
def test_other_content_than_a_denoiser_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"convert\.cleaning\.denoiser"):
        Denoiser.from_bytes(content)


def test_damaged_settings_are_refused() -> None:
    for setting in (None, "denoiser.safetensors", "data:application/octet-stream;base64,!!!"):
        with pytest.raises(UserError, match="denoiser"):
            load_denoiser(setting)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, noisy = organs((6, 90, 90))
    write_image(tmp_path / "scan.nii.gz", noisy, Grid(noisy.shape, np.eye(4)))
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    out = tmp_path / "denoiser.safetensors"
    files = [str(tmp_path / "scan.nii.gz"), str(tmp_path / "broken.nii.gz")]
    assert main(["denoiser", *files, "--out", str(out), "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "from 1 scans; noise of soft tissue" in printed
    Denoiser.from_bytes(out.read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "broken.nii.gz",
        "denoiser.safetensors",
        "scan.nii.gz",
    ]
    assert main(["denoiser", files[1], "--out", str(out)]) == 2
    assert main(["denoiser", files[0], "--out", str(tmp_path / "none" / "x")]) == 2
    assert main(["denoiser", files[0], "--out", str(out), "--steps", "0"]) == 2
