"""The predictor for any number of channels and classes, against a plain full-volume reference."""

import hashlib

import numpy as np
import pytest
import torch
from scipy import ndimage

from liverseg_dist.config import InferenceConfig, IntensityConfig
from liverseg_dist.data.intensity import normalise_intensity
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.inference.label_codes import THRESHOLDS, LabelCodes
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.model.outputs import OutputChannels, paint_regions
from tests.inference.models import Random

CPU = torch.device("cpu")
PATCH = (8, 16, 12)
SHAPE = (13, 20, 15)
INTENSITIES = (
    IntensityConfig(lower_hu=-100, upper_hu=200, mean=0.4, std=0.2),
    IntensityConfig(lower_hu=0, upper_hu=900, mean=0.3, std=0.1),
    IntensityConfig(lower_hu=10, upper_hu=500, mean=0.5, std=0.3),
    IntensityConfig(lower_hu=-5, upper_hu=5, mean=0.5, std=0.3),
)
LESIONS = LabelScheme(
    (
        (0, "background"),
        (1, "liver tissue"),
        (2, "tumour"),
        (3, "cyst"),
        (4, "kidney tissue"),
        (5, "mass"),
    ),
    (
        Structure("liver", (1, 2, 3)),
        Structure("tumour", (2,), "lesion", "liver"),
        Structure("cyst", (3,), "lesion", "liver"),
        Structure("kidney", (4, 5)),
        Structure("mass", (5,), "lesion", "kidney"),
    ),
)


def make_scheme(classes: int) -> LabelScheme:
    """Organs that exclude each other."""
    values = [(0, "background"), *((n, f"organ {n}") for n in range(1, classes + 1))]
    organs = tuple(Structure(f"organ {n}", (n,)) for n in range(1, classes + 1))
    return LabelScheme(tuple(values), organs)


def make_image(channels: int) -> np.ndarray:
    rng = np.random.default_rng(channels)
    return rng.integers(-200, 1000, (channels, *SHAPE)).astype(np.int16)


def predict_reference(
    image: np.ndarray,
    model: torch.nn.Module,
    outputs: OutputChannels,
    present: tuple[bool, ...],
    mirror: bool,
) -> np.ndarray:
    """Float64 probabilities: normalise everything, pad, and average window by window."""
    grid = WindowGrid.from_shape(SHAPE, PATCH, 0.5, "gaussian")
    padding = [
        (m, p - m - n) for m, p, n in zip(grid.margin, grid.padded_shape, SHAPE, strict=True)
    ]
    channels = []
    for voxels, one, has_channel in zip(image, INTENSITIES, present, strict=False):
        padded = np.pad(voxels.astype(np.float32), padding, constant_values=one.lower_hu)
        values = normalise_intensity(
            torch.from_numpy(padded), one.lower_hu, one.upper_hu, one.mean, one.std
        )
        channels.append(values if has_channel else torch.zeros_like(values))
    network_input = torch.stack(channels)
    weights = grid.weights[0][:, None, None] * grid.weights[1][:, None] * grid.weights[2]
    total = np.zeros((outputs.count, *grid.padded_shape))
    share = np.zeros(grid.padded_shape)
    flips: list[tuple[int, ...]] = [()]
    if mirror:
        flips = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
    for z in grid.starts[0]:
        for y in grid.starts[1]:
            for x in grid.starts[2]:
                box = (slice(z, z + PATCH[0]), slice(y, y + PATCH[1]), slice(x, x + PATCH[2]))
                window = network_input[(slice(None), *box)][None]
                copies = []
                for axes in flips:
                    with torch.no_grad():
                        logits = model(window.flip(axes)).flip(axes)[0].double()
                    is_region = outputs.regions
                    copies.append(logits.sigmoid() if is_region else logits.softmax(0))
                total[(slice(None), *box)] += torch.stack(copies).mean(0).numpy() * weights
                share[box] += weights
    inner = tuple(slice(m, m + n) for m, n in zip(grid.margin, SHAPE, strict=True))
    return (total / share)[(slice(None), *inner)]


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("classes", [1, 5, 16])
@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_and_labels_equal_the_reference(
    channels: int, classes: int, regions: bool
) -> None:
    outputs = OutputChannels(make_scheme(classes), regions)
    model = Random(outputs.count, seed=classes, inputs=channels)
    image = make_image(channels)
    present = (True,) * channels
    expected = predict_reference(image, model, outputs, present, mirror=False)
    predictor = SlidingWindowPredictor(model, PATCH, outputs, InferenceConfig(), CPU)
    found = predictor.predict_probabilities(image, INTENSITIES[:channels])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    labels = predictor.predict_labels(image, INTENSITIES[:channels])
    if regions:
        inside = torch.from_numpy(found >= 0.5)[None]
        assert np.array_equal(labels, paint_regions(inside, outputs.labels)[0].numpy())
    else:
        assert np.array_equal(labels, found.argmax(0))
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_an_absent_channel_is_zero_after_normalisation(threads: int) -> None:
    outputs = OutputChannels(make_scheme(5))
    model = Random(outputs.count, inputs=2)
    image = make_image(2)
    config = InferenceConfig(mirror=True)
    expected = predict_reference(image, model, outputs, (True, False), mirror=True)
    predictor = SlidingWindowPredictor(model, PATCH, outputs, config, CPU, threads)
    found = predictor.predict_probabilities(image, INTENSITIES[:2], (True, False))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    image[1] = 77  # whatever an absent channel holds is not read
    assert np.array_equal(found, predictor.predict_probabilities(
        image, (INTENSITIES[0], None), (True, False)
    ))  # fmt: skip
    both = predictor.predict_probabilities(image, INTENSITIES[:2])
    assert np.abs(both - found).max() > 0.01


def test_several_channels_of_equal_content_equal_one_image_in_memory_order() -> None:
    """Channels are independent of the array's layout: a view gives the same bytes."""
    outputs = OutputChannels(make_scheme(2))
    predictor = SlidingWindowPredictor(Random(3, inputs=2), PATCH, outputs, InferenceConfig(), CPU)
    image = make_image(2)
    view = np.moveaxis(np.ascontiguousarray(np.moveaxis(image, 0, -1)), -1, 0)
    first = predictor.predict_probabilities(image, INTENSITIES[:2])
    assert np.array_equal(first, predictor.predict_probabilities(view, INTENSITIES[:2]))


def test_another_number_of_channels_is_an_error() -> None:
    predictor = SlidingWindowPredictor(Random(), PATCH, OutputChannels(), InferenceConfig(), CPU)
    with pytest.raises(ValueError, match="2 channels, 1 normalisations"):
        predictor.predict_labels(make_image(2), INTENSITIES[0])


@pytest.mark.parametrize("regions", [False, True])
def test_codes_of_two_organs_give_the_labels_for_every_threshold(regions: bool) -> None:
    outputs = OutputChannels(LESIONS, regions)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(outputs.foreground_count, 6, 20, 20, generator=generator)
    if not regions:
        values = values / (values.sum(0) + torch.rand(6, 20, 20, generator=generator))
    encoder = LabelCodes(outputs)
    codes = encoder.encode(values)
    for thresholds in (
        {},
        {"tumour": 0.3},
        {"tumour": 0.2, "cyst": 0.4},
        {"cyst": 0.2, "mass": 0.3},
        dict.fromkeys(("tumour", "cyst", "mass"), THRESHOLDS[0]),
    ):
        config = InferenceConfig(lesion_threshold=thresholds)
        predictor = SlidingWindowPredictor(Random(outputs.count), PATCH, outputs, config, CPU)
        expected = predictor.assign_labels(values)
        assert np.array_equal(encoder.decode(codes, thresholds), expected), thresholds
        assert set(np.unique(expected)) <= set(range(6))


def test_a_threshold_makes_lesions_inside_their_organ_only() -> None:
    outputs = OutputChannels(LESIONS)
    #            liver tumour cyst kidney mass
    voxels = [
        (0.30, 0.25, 0.05, 0.00, 0.00),  # liver with its lesions 0.6, tumour above 0.2
        (0.10, 0.25, 0.05, 0.00, 0.00),  # liver 0.4: background is 0.6
        (0.00, 0.25, 0.00, 0.60, 0.10),  # in the kidney
        (0.10, 0.15, 0.60, 0.00, 0.00),  # cyst without a threshold stays
        (0.05, 0.50, 0.05, 0.30, 0.00),  # tumour as before
    ]
    values = torch.tensor(voxels).T.reshape(5, 1, 1, 5)
    config = InferenceConfig(lesion_threshold={"tumour": 0.2})
    predictor = SlidingWindowPredictor(Random(6), PATCH, outputs, config, CPU)
    assert predictor.assign_labels(values).ravel().tolist() == [2, 0, 4, 3, 2]


GOLDEN = {
    "plain": ("d2859e1ff5b0facf", "a336bbc6024e79ca"),
    "mirror": ("ef291b11a375e95a", "bfc0f08644eb7c8e"),
    "logits": ("786fba16d9e650f4", "f053894c7960a3fc"),
    "threshold": ("eba24f577767bfe4", "c32bd989aca7ed27"),
    "post": ("5e54ae1d9660f4aa", "6444d08da9f0d04e"),
}
"""Masks of the last version that knew the labels of LiTS only: SHA-256 for classes and regions."""
SETTINGS = {
    "plain": {},
    "mirror": {"mirror": True},
    "logits": {"average": "logits"},
    "threshold": {"lesion_threshold": 0.3},
    "post": {
        "largest_component": True,
        "fill_holes": True,
        "reach_mm": 2.0,
        "cut_mm": 1.0,
        "min_volume_ml": 0.01,
    },
}


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_masks_of_task03_have_the_bytes_of_earlier_versions(name: str, regions: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(5)
    image = np.clip(rng.normal(60, 80, (21, 40, 30)), -1000, 400).astype(np.int16)
    intensity = IntensityConfig(lower_hu=-20, upper_hu=200, mean=0.5, std=0.2)
    config = InferenceConfig(**SETTINGS[name])  # type: ignore[arg-type]
    outputs = OutputChannels(LITS_SCHEME, regions)
    predictor = SlidingWindowPredictor(Random(2 if regions else 3), PATCH, outputs, config, CPU)
    labels = predictor.predict_labels(image, intensity)
    assert np.array_equal(labels, predictor.predict_labels(image[None], [intensity]))
    torch.set_num_threads(threads)
    # Compact blobs, so that post-processing has components to work on.
    field = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal(image.shape), 1.5)
    labels[field < 0] = 0
    postprocess_mask(labels, (2.0, 1.0, 1.0), config)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == GOLDEN[name][regions]
