"""The streaming predictor against accumulation of the whole scan, and against MONAI."""

import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from liverseg_dist.config import InferenceConfig, IntensityConfig, load_settings
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.inference.windows import WindowGrid, WindowWeights, compute_window_weights
from liverseg_dist.model import build_model, foreground_probabilities_, log_odds
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from tests.inference.models import Random, Threshold

CPU = torch.device("cpu")
PATCH = (8, 16, 12)
INTENSITY = IntensityConfig(lower_hu=-100, upper_hu=200, mean=0.4, std=0.2)


def make_scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_predictor(**settings: object) -> SlidingWindowPredictor:
    return SlidingWindowPredictor(
        Random(), PATCH, OutputChannels(), config=InferenceConfig(**settings), device=CPU
    )  # type: ignore[arg-type]


def accumulate_whole_scan(
    image: np.ndarray, model: torch.nn.Module, config: InferenceConfig, regions: bool = False
) -> np.ndarray:
    """The expected result: float64 sums over the whole scan, window by window."""
    grid = WindowGrid.from_shape(image.shape, PATCH, config.overlap, config.window_weights)
    padded = np.full(grid.padded_shape, image.min(), dtype=np.float32)
    inner = tuple(slice(m, m + n) for m, n in zip(grid.margin, image.shape, strict=True))
    padded[inner] = image
    weights = grid.weights[0][:, None, None] * grid.weights[1][:, None] * grid.weights[2]
    total, share = np.zeros((2 if regions else 3, *grid.padded_shape)), np.zeros(grid.padded_shape)
    activate = torch.sigmoid if regions else partial(torch.softmax, dim=0)
    flips = [axes for n in range(4) for axes in product((False, True), repeat=3) if sum(axes) == n]
    for start in product(*grid.starts):
        box = tuple(slice(s, s + n) for s, n in zip(start, PATCH, strict=True))
        results = []
        for flip in flips if config.mirror else flips[:1]:
            axes = [axis + 2 for axis, wanted in enumerate(flip) if wanted]
            with torch.no_grad():
                logits = (
                    model(torch.from_numpy(padded[box])[None, None].flip(axes))
                    .flip(axes)[0]
                    .double()
                )
            results.append((logits if config.average == "logits" else activate(logits)).numpy())
        total[(slice(None), *box)] += np.mean(results, axis=0) * weights
        share[box] += weights
    mean = (total / share)[(slice(None), *inner)]
    return activate(torch.from_numpy(mean)).numpy() if config.average == "logits" else mean


SHAPES = [(8, 16, 12), (21, 40, 30), (3, 40, 12), (30, 7, 5), (1, 1, 1), (9, 17, 13)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"overlap": 0.0}, {"overlap": 0.8}, {"window_weights": "constant"}, {"average": "logits"}],
)
def test_streaming_equals_full_accumulation(shape: tuple[int, int, int], settings: dict) -> None:
    image = make_scan(shape)
    expected = accumulate_whole_scan(image, Random(), InferenceConfig(**settings))
    np.testing.assert_allclose(
        make_predictor(**settings).predict_probabilities(image), expected, atol=2e-6
    )


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_mirrored_copies_are_averaged(average: str) -> None:
    image = make_scan((13, 20, 15))
    expected = accumulate_whole_scan(image, Random(), InferenceConfig(mirror=True, average=average))
    np.testing.assert_allclose(
        make_predictor(mirror=True, average=average).predict_probabilities(image),
        expected,
        atol=2e-6,
    )
    assert np.abs(expected - accumulate_whole_scan(image, Random(), InferenceConfig())).max() > 0.05


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_regions_are_independent_probabilities(average: Any) -> None:
    image = make_scan((13, 20, 15))
    config = InferenceConfig(average=average)
    result = SlidingWindowPredictor(
        Random(2), PATCH, OutputChannels(regions=True), config=config, device=CPU
    ).predict_probabilities(image)
    np.testing.assert_allclose(
        result, accumulate_whole_scan(image, Random(2), config, regions=True), atol=2e-6
    )
    assert np.abs(result.sum(0) - 1).max() > 0.1


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_equals_monai_for_equal_windows(weights: WindowWeights, average: Any) -> None:
    model = Random()
    image = make_scan((24, 48, 36))  # multiples of half a patch: equal windows
    predicted = make_predictor(window_weights=weights, average=average).predict_probabilities(image)
    z, y, x = (torch.from_numpy(compute_window_weights(n, weights)) for n in PATCH)
    expected = sliding_window_inference(
        torch.from_numpy(image)[None, None],
        roi_size=PATCH,
        sw_batch_size=2,
        predictor=model if average == "logits" else lambda batch: model(batch).softmax(1),
        overlap=0.5,
        roi_weight_map=z[:, None, None] * y[:, None] * x,
    )
    if average == "logits":
        expected = expected.softmax(1)
    np.testing.assert_allclose(predicted, expected[0].detach().numpy(), atol=5e-6)


@pytest.mark.parametrize("settings", [{}, {"mirror": True}])
def test_result_is_bit_identical_in_every_run(settings: dict) -> None:
    image = make_scan((21, 40, 30))
    once = make_predictor(**settings).predict_probabilities(image)
    assert np.array_equal(once, make_predictor(**settings).predict_probabilities(image))
    for batch_size in (3, 16):  # a convolution of another batch size sums in another order
        other = make_predictor(batch_size=batch_size, **settings).predict_probabilities(image)
        np.testing.assert_allclose(once, other, atol=5e-6)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_result_is_bit_identical_for_blocks_and_whole_windows(
    average: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process adds block by block; threads and other ranks give whole windows."""
    monkeypatch.setattr(
        "liverseg_dist.inference.window_averaging.BLOCK_VOXELS", 400
    )  # two slices, and no multiple of 8
    image = make_scan((21, 40, 31))
    config = InferenceConfig(average=average)
    for regions in (False, True):
        model = Random(2 if regions else 3)
        by_block, by_window = (
            SlidingWindowPredictor(
                model, PATCH, OutputChannels(regions=regions), config, CPU, n
            ).predict_probabilities(image)
            for n in (1, 2)
        )
        assert np.array_equal(by_block, by_window)


@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
@pytest.mark.parametrize("regions", [False, True])
def test_foreground_equals_softmax_and_sigmoid(scale: float, regions: bool) -> None:
    logits = (
        torch.randn((2, 2 if regions else 3, 4, 5, 6), generator=torch.Generator().manual_seed(0))
        * scale
    )
    expected = logits.double().sigmoid() if regions else logits.double().softmax(1)[:, 1:]
    probabilities = foreground_probabilities_(log_odds(logits, regions), regions)
    assert torch.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert foreground_probabilities_(torch.full((1, 2, 1, 1, 1), torch.nan), regions).isnan().all()


@pytest.mark.parametrize("mirror", [False, True])
def test_order_of_the_sum_does_not_depend_on_the_batch_size(mirror: bool) -> None:
    """The network gives the same bits per window in any batch, so the results are identical."""
    image = make_scan((21, 40, 30))
    results = [
        SlidingWindowPredictor(
            Threshold(0.0, 1.0, 1.0),
            PATCH,
            OutputChannels(),
            InferenceConfig(mirror=mirror, batch_size=batch_size),
            CPU,
        ).predict_probabilities(image)
        for batch_size in (1, 3, 8, 100)
    ]
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
def test_result_is_bit_identical_for_any_number_of_threads(architecture: str) -> None:
    """Ranks on one machine share its cores: more ranks have fewer threads each."""
    settings = load_settings([], ["model.preset=tiny", f"model.architecture={architecture}"])
    model = build_model(resolve_topology(settings.model, (16, 32, 32), (2.5, 0.8, 0.8)))
    image = make_scan((24, 50, 40))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = [
        SlidingWindowPredictor(
            model, (16, 32, 32), OutputChannels(), InferenceConfig(batch_size=batch), CPU, threads
        ).predict_probabilities(image)
        for threads, batch in ((1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (3, 2))
    ]
    torch.set_num_threads(before)
    assert all(np.array_equal(results[0], other) for other in results[1:4])
    assert np.array_equal(results[4], results[5])


def test_an_error_in_a_window_stops_the_scan() -> None:
    class Fails(Random):
        def forward(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
            if float(image_BCDHW.max()) > 50:
                raise RuntimeError("window failed")
            return super().forward(image_BCDHW)

    image = make_scan((8, 60, 60))
    image[4, 30, 30] = 99
    for threads in (1, 3):
        with pytest.raises(RuntimeError, match="window failed"):
            SlidingWindowPredictor(
                Fails(), PATCH, OutputChannels(), InferenceConfig(), CPU, threads
            ).predict_labels(image)


def test_slabs_come_in_order_without_gaps() -> None:
    image = make_scan((50, 16, 12))
    last = 0
    for first, slab in make_predictor(overlap=0.5).stream_probabilities(image):
        assert first == last
        assert slab.shape[1] <= PATCH[0]
        last = first + slab.shape[1]
    assert last == 50


def test_hu_is_normalised_and_padded_as_in_training() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (5, 20, 15)).astype(np.int16)
    unit = (np.clip(hu, -100, 200) + 100) / 300
    # Its lowest value is that of lower_hu, hence the same padding.
    prepared = ((unit - 0.4) / 0.2).astype(np.float32)
    assert prepared.min() == np.float32(-0.4 / 0.2)
    predicted = make_predictor().predict_probabilities(hu, INTENSITY)
    np.testing.assert_allclose(
        predicted, make_predictor().predict_probabilities(prepared), atol=5e-6
    )
    flipped = make_predictor().predict_probabilities(
        hu[::-1], INTENSITY
    )  # a view with negative strides
    np.testing.assert_array_equal(
        flipped, make_predictor().predict_probabilities(hu[::-1].copy(), INTENSITY)
    )


def test_several_models_are_averaged() -> None:
    image = make_scan((9, 17, 13))
    models = [Random(seed=seed) for seed in range(3)]
    single = [
        SlidingWindowPredictor(
            model, PATCH, OutputChannels(), InferenceConfig(), CPU
        ).predict_probabilities(image)
        for model in models
    ]
    averaged = SlidingWindowPredictor(
        models, PATCH, OutputChannels(), InferenceConfig(), CPU
    ).predict_probabilities(image)
    np.testing.assert_allclose(averaged, np.mean(single, axis=0), atol=2e-6)


def test_bf16_runs_the_model_in_bf16_and_sums_in_fp32() -> None:
    image = make_scan((9, 17, 13))
    exact, approximate = (
        make_predictor().predict_probabilities(image),
        make_predictor(precision="bf16").predict_probabilities(image),
    )
    assert approximate.dtype == np.float32
    assert 0 < np.abs(exact - approximate).max() < 0.1
    assert np.abs(approximate.sum(0) - 1).max() < 1e-5


def test_segment_is_the_most_likely_class() -> None:
    image = make_scan((13, 20, 15))
    labels = make_predictor().predict_labels(image)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, make_predictor().predict_probabilities(image).argmax(0))


PEAK = """
import resource, sys
import numpy as np, torch
from liverseg_dist.config import InferenceConfig, IntensityConfig, load_settings
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.model import build_model
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from tests.inference.models import Threshold
torch.set_num_threads(1)
predictor = SlidingWindowPredictor(
    Threshold(0., 1.), (16, 64, 64), OutputChannels(), InferenceConfig(), torch.device("cpu")
)
row = np.random.default_rng(0).integers(-200, 200, (1, 160, 160)).astype(np.int16)
# A view of one slice: the image itself needs no memory.
image = np.broadcast_to(row, (int(sys.argv[1]), 160, 160))
intensity = IntensityConfig(lower_hu=-100, upper_hu=200, mean=0.4, std=0.2)
for _, slab in predictor.stream_probabilities(image, intensity):
    assert torch.isfinite(slab).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_slices() -> None:
    root = Path(__file__).resolve().parents[2]
    peaks_mib = [
        float(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(slices)],
                capture_output=True,
                text=True,
                check=True,
                cwd=root,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            ).stdout
        )
        for slices in (48, 480)
    ]
    full_sums_mib = (
        3 * 4 * 160 * 160 * (480 - 48) / 2**20
    )  # what accumulating the whole scan would add
    assert full_sums_mib > 120
    assert peaks_mib[1] - peaks_mib[0] < 12, peaks_mib
