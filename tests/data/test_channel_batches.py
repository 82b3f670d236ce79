"""Augmentation, sampling and dropout for any number of channels and any labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from liverseg_dist.config import DataConfig
from liverseg_dist.config.train import AugmentationPreset
from liverseg_dist.data.augment import (
    PRESETS,
    DeviceTransform,
    build_preset,
    describe_augmentation,
    draw_augmentation,
)
from liverseg_dist.data.augment.lesion_transforms import (
    copy_lesions,
    copyable_values,
    enhancing_values,
)
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.data.loading import PatchLoader, PatchSource, fill_in_data_settings
from liverseg_dist.data.loading.sampling import ForegroundIndex
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from tests.data.scheme_store import CT, MR, make_scheme, write_scheme_store
from tests.data.test_augment import RawBatch, raw_batch

PATCH = (12, 20, 24)
PRESET_NAMES = tuple(PRESETS)


def several_channels(batch: RawBatch, channels: int) -> RawBatch:
    """The same voxels in every channel."""
    count = len(batch.image_BCDHW)
    return RawBatch(
        batch.image_BCDHW.expand(-1, channels, -1, -1, -1),
        batch.label_BDHW,
        batch.intensity_BC4.expand(-1, channels, -1),
        torch.ones((count, channels), dtype=torch.bool),
        batch.augment_seed_B,
    )


@pytest.mark.parametrize("name", PRESET_NAMES)
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_move_together_with_the_label(name: AugmentationPreset, channels: int) -> None:
    """With the intensity transforms off, equal channels stay equal, and equal to one channel."""
    off = PRESETS["none"]
    preset = replace(off, spatial=PRESETS[name].spatial, mirror=PRESETS[name].mirror)
    batch = raw_batch(12)
    one, one_label = DeviceTransform(preset, PATCH)(batch)
    many, many_label = DeviceTransform(replace(preset, channels=channels), PATCH)(
        several_channels(batch, channels)
    )
    assert many.shape == (12, channels, *PATCH)
    assert torch.equal(many_label, one_label)
    for channel in range(channels):
        torch.testing.assert_close(many[:, channel], one[:, 0], rtol=0, atol=1e-5)


def test_intensities_are_drawn_for_each_channel_with_nnunets_probabilities() -> None:
    preset = replace(PRESETS["nnunet"], channels=4)
    draws = [draw_augmentation(preset, (64, 128, 128), seed).parameters for seed in range(3000)]
    # (probability of a sample, of a channel of a drawn sample) as in nnU-Net.
    expected = {"blur": (0.2, 0.5), "low_resolution": (0.25, 0.5), "gamma": (0.3, 1.0)}
    for name, (p_sample, p_channel) in expected.items():
        rows = [draw[name] for draw in draws if name in draw]
        assert all(len(row) == 4 for row in rows)
        visible = p_sample * (1 - (1 - p_channel) ** 4)
        assert stats.binomtest(len(rows), 3000, visible).pvalue > 0.001, name
        for channel in range(4):
            hits = sum(row[channel] is not None for row in rows)
            assert stats.binomtest(hits, 3000, p_sample * p_channel).pvalue > 0.001, name
    gammas = np.array([draw["gamma"] for draw in draws if "gamma" in draw])
    assert abs(np.corrcoef(gammas.T)[0, 1]) < 0.1, "channels are independent"
    noises = [draw["noise"] for draw in draws if "noise" in draw]
    assert all(len(set(row)) == 1 for row in noises), "one strength for all channels"


def test_noise_differs_between_channels_and_the_first_is_that_of_one_channel() -> None:
    preset = replace(PRESETS["none"], noise=replace(PRESETS["none"].noise, probability=1.0))
    batch = raw_batch(2, PATCH)
    one = DeviceTransform(preset, PATCH)(batch)[0]
    two = DeviceTransform(replace(preset, channels=2), PATCH)(several_channels(batch, 2))[0]
    plain = DeviceTransform(PRESETS["none"], PATCH)(batch)[0]
    assert torch.equal(two[:, 0], one[:, 0])
    noise = (two - plain).flatten(2).numpy()
    assert abs(np.corrcoef(noise[0, 0], noise[0, 1])[0, 1]) < 0.1


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_absent_channels_are_exactly_zero(name: AugmentationPreset) -> None:
    preset = replace(PRESETS[name], channels=3)
    batch = several_channels(raw_batch(16), 3)
    image = batch.image_BCDHW.clone()
    image[:, 1] = 0
    intensity = batch.intensity_BC4.clone()
    intensity[:, 1] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    present = batch.present_BC.clone()
    present[:, 1] = False
    absent = replace(batch, image_BCDHW=image, intensity_BC4=intensity, present_BC=present)
    result = DeviceTransform(preset, PATCH)(absent)[0]
    assert (result[:, 1] == 0).all()
    whole = DeviceTransform(preset, PATCH)(batch)[0]
    assert torch.equal(result[:, [0, 2]], whole[:, [0, 2]]), "other channels do not change"


@pytest.mark.parametrize("probability", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("present", [(True,) * 2, (True, False, True, True)])
def test_modality_dropout_never_drops_all(probability: float, present: tuple[bool, ...]) -> None:
    data = DataConfig(augmentation="none", channels=tuple(make_channels(len(present))))
    preset = build_preset(data, probability)
    channels = [c for c, is_present in enumerate(present) if is_present]
    dropped_counts, kept_alone = np.zeros(len(present)), np.zeros(len(present))
    for seed in range(2000):
        draw = draw_augmentation(preset, PATCH, seed).parameters.get("modality_dropout")
        if draw is None:
            continue
        dropped = preset.modality_dropout.find_dropped(draw, list(present))
        assert set(dropped) < set(channels)
        dropped_counts[dropped] += 1
        if len(dropped) == len(channels) - 1:
            kept_alone[list(set(channels) - set(dropped))] += 1
    # All channels would be dropped with probability p^n; then each is kept equally often.
    share = probability - probability ** len(channels) / len(channels)
    for channel in channels:
        assert stats.binomtest(int(dropped_counts[channel]), 2000, share).pvalue > 0.001
    assert stats.chisquare(kept_alone[channels]).pvalue > 0.001


def make_channels(count: int) -> list:
    return [CT.model_copy(update={"name": f"channel {number}"}) for number in range(count)]


def test_modality_dropout_changes_nothing_else() -> None:
    data = DataConfig(augmentation="strong", channels=tuple(make_channels(2)))
    batch = several_channels(raw_batch(24), 2)
    without = DeviceTransform(build_preset(data), PATCH)(batch)
    dropping = DeviceTransform(build_preset(data, 0.5), PATCH)(batch)
    assert torch.equal(dropping[1], without[1])
    is_zero = (dropping[0] == 0).flatten(2).all(2)
    assert 6 < int(is_zero.any(1).sum()) < 24
    assert not is_zero.all(1).any()
    assert torch.equal(dropping[0][~is_zero], without[0][~is_zero])


def test_one_channel_is_never_dropped() -> None:
    preset = build_preset(DataConfig(augmentation="none"), 1.0)
    batch = raw_batch(4, PATCH)
    assert torch.equal(
        DeviceTransform(preset, PATCH)(batch)[0], DeviceTransform(PRESETS["none"], PATCH)(batch)[0]
    )


# --- labels -------------------------------------------------------------------------------------


def test_lesions_and_their_containers_follow_from_the_scheme() -> None:
    scheme = make_scheme(5, lesions=2)
    assert enhancing_values(scheme) == ((1,), (4,), (5,))
    assert copyable_values(scheme) == (((4,), (1,)), ((5,), (1,)))
    without = make_scheme(16, lesions=0)
    assert enhancing_values(without) == copyable_values(without) == ()
    preset = build_preset(DataConfig(augmentation="strong", labels=without.to_json()))
    for seed in range(60):
        draw = draw_augmentation(preset, PATCH, seed)
        assert not {"enhancement", "lesion_copy"} & set(draw.parameters)


def test_each_lesion_is_copied_with_its_own_label_into_its_own_organ() -> None:
    pairs = (((3,), (1,)), ((4, 5), (2,)))
    label = torch.zeros((3, 4, 12), dtype=torch.uint8)
    label[0, 1], label[0, 2] = 1, 2
    label[0, 1, 2], label[0, 2, 2:4] = 3, torch.tensor([4, 5], dtype=torch.uint8)
    images = [torch.arange(144.0).view(3, 4, 12), torch.ones(3, 4, 12)]
    copied, result = copy_lesions(images, label, pairs, (), (0, 0, 5))
    expected = label.clone()
    expected[0, 1, 7], expected[0, 2, 7:9] = 3, torch.tensor([4, 5], dtype=torch.uint8)
    assert torch.equal(result, expected)
    assert len(copied) == 2
    # Moved up by one line, the lesions of organ 2 meet organ 1, in which they do not lie.
    assert torch.equal(copy_lesions(images, label, pairs[1:], (), (0, -1, 0))[1], label)


@pytest.mark.parametrize("classes", [1, 5, 16])
def test_each_class_of_a_case_is_equally_likely_as_a_centre(tmp_path: Path, classes: int) -> None:
    labels = make_scheme(classes, lesions=1 if classes > 1 else 0)
    store = CaseStore.open(write_scheme_store(tmp_path / "s.zarr", labels, cases=2))
    index = ForegroundIndex(store.foreground("case_0"))
    drawn = [index.draw_centre(CounterRandom(0, n)) for n in range(1600)]
    counts = np.bincount([centre.label for centre in drawn if centre], minlength=classes + 1)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 0.001 if classes > 1 else counts[1] == 1600
    label = store.label("case_0")
    assert all(label[centre.voxel_zyx] == centre.label for centre in drawn if centre)


def test_only_annotated_classes_are_centres(tmp_path: Path) -> None:
    labels = make_scheme(5, lesions=2)
    path = write_scheme_store(tmp_path / "s.zarr", labels, annotated={0: ("organ 2", "organ 3")})
    index = ForegroundIndex(CaseStore.open(path).foreground("case_0"))
    drawn = [index.draw_centre(CounterRandom(0, n)) for n in range(200)]
    assert {centre.label for centre in drawn if centre} == {2, 3}


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_batches_carry_channels_and_annotations(tmp_path: Path, channels: int) -> None:
    labels = make_scheme(5, lesions=2)
    kinds = [CT, MR, MR.model_copy(update={"name": "T2"}), CT.model_copy(update={"name": "late"})]
    absent = {1: (channels - 1,)} if channels > 1 else {}
    path = write_scheme_store(
        tmp_path / "s.zarr", labels, kinds[:channels], {0: ("organ 1",)}, absent
    )
    store = CaseStore.open(path)
    plain = DataConfig(patch_size=(16, 24, 24), augmentation="none")
    data = fill_in_data_settings(plain, store)
    source = PatchSource(store, store.case_ids, data, 0, 4)
    with PatchLoader(source, [[0, 1, 2, 3]], workers=1) as loader:
        (batch,) = list(loader)
    assert batch.image_BCDHW.shape == (4, channels, 16, 24, 24)
    image_BCDHW, _ = DeviceTransform(build_preset(data), data.patch_size)(batch)
    for i, case_id in enumerate(batch.case_ids):
        meta = store.meta(case_id)
        assert batch.present_BC[i].tolist() == list(meta.present)
        assert batch.annotated[i] == meta.annotated
        start = source.plan_sample(batch.indices[i]).patch_start
        box = tuple(slice(a, a + n) for a, n in zip(start, data.patch_size, strict=True))
        for channel in range(channels):
            stored = store.image(case_id)[channel][box].astype(np.float64)
            known = meta.intensities[channel]
            unit = (np.clip(stored, known.lower_hu, known.upper_hu) - known.lower_hu) / (
                known.upper_hu - known.lower_hu
            )
            expected = (unit - known.mean) / known.std * meta.present[channel]
            np.testing.assert_allclose(image_BCDHW[i, channel].numpy(), expected, atol=1e-4)


def test_a_store_of_other_channels_is_refused(tmp_path: Path) -> None:
    path = write_scheme_store(tmp_path / "s.zarr", make_scheme(1, 0), (CT, MR))
    store = CaseStore.open(path)
    source = PatchSource(store, store.case_ids, DataConfig(patch_size=(16, 24, 24)), 0, 2)
    with pytest.raises(UserError, match="images have 2 channels, the run reads 1"):
        source.read_sample(0)


def test_descriptions_name_the_channel() -> None:
    preset = replace(PRESETS["strong"], channels=2)
    notes: list[str] = []
    for seed in range(40):
        notes += describe_augmentation(preset, draw_augmentation(preset, PATCH, seed))
    assert any(note.startswith("channel 1: gamma") for note in notes)
    assert any(note.startswith("channel 0: enhancement") for note in notes)
