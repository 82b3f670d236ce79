"""A scan of any orientation and spacing gives a mask on its own voxels."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from liverseg_dist.config import InferenceConfig, IntensityConfig, Settings, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation import CalibrationCounter
from liverseg_dist.inference import SlidingWindowPredictor, segment_scan, segment_to_grid
from liverseg_dist.inference.calibration_counts import CalibrationCollector
from liverseg_dist.inference.case_inputs import AIR_HU, resample_image_to_grid
from liverseg_dist.inference.segment_scan import prepare_for_network, select_structure_probability
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.volume import Float3, Grid, Volume
from tests.inference.models import Random, Threshold

ORIENTATIONS = [
    "".join(codes[i][s] for i, s in zip(order, signs, strict=True))
    for codes in [["RL", "AP", "IS"]]
    for order in permutations(range(3))
    for signs in product((0, 1), repeat=3)
]
INTENSITY = IntensityConfig(lower_hu=-100, upper_hu=300, mean=0.0, std=1.0)
PATCH = (16, 32, 32)


def settings_for(spacing_mm: Float3, *overrides: str) -> Settings:
    settings = load_settings([], ["convert.cleaning.noise=none", *overrides])
    data = settings.data.model_copy(
        update={"spacing_mm": spacing_mm, "intensity": INTENSITY, "patch_size": PATCH}
    )
    return settings.model_copy(update={"data": data})


def make_threshold_predictor(settings: Settings) -> SlidingWindowPredictor:
    """Liver above 60 HU, tumour above 160 HU (voxels are whole HU)."""
    model = Threshold(liver=160.5 / 400, tumour=260.5 / 400)
    return SlidingWindowPredictor(
        model, PATCH, OutputChannels(), config=settings.inference, device=torch.device("cpu")
    )


def make_phantom(
    spacing_mm: Float3 = (2.0, 1.0, 1.0),
    shape: tuple[int, int, int] = (22, 40, 36),
    oblique: bool = False,
) -> Volume:
    """RAS: a bright ball that contains a brighter one.

    Both are off centre, so that every axis and direction differs.
    """
    z, y, x = (np.arange(n) * s for n, s in zip(shape, spacing_mm, strict=True))
    distance = np.sqrt((z[:, None, None] - 18) ** 2 + (y[:, None] - 22) ** 2 + (x - 14) ** 2)
    inner = np.sqrt((z[:, None, None] - 22) ** 2 + (y[:, None] - 18) ** 2 + (x - 15) ** 2)
    hu = np.interp(distance, [9, 15], [100.0, 20.0]) + np.interp(inner, [3, 6], [150.0, 0.0])
    affine = np.diag([*reversed(spacing_mm), 1.0])
    if oblique:
        c, s = np.cos(0.35), np.sin(0.35)
        affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    affine[:3, 3] = (-33, 21, 400)
    return Volume(hu.astype(np.int16), Grid(shape, affine))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same_mask_in_the_world(orientation: str) -> None:
    settings = settings_for((2.0, 1.0, 1.0))
    original = make_phantom()
    expected = np.where(original.voxels > 160, 2, np.where(original.voxels > 60, 1, 0))
    assert set(np.unique(expected)) == {0, 1, 2}
    view = original.reoriented(orientation)
    # Contiguous, as the voxels of a file of that orientation.
    scan = Volume(np.ascontiguousarray(view.voxels), view.grid)
    mask = segment_scan(scan, make_threshold_predictor(settings), settings)
    assert mask.shape == scan.shape
    assert mask.flags.c_contiguous
    back = Volume(mask, scan.grid).reoriented("RAS")
    assert back.grid.matches(original.grid, 1e-6)
    assert np.array_equal(back.voxels, expected)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize(
    "spacing_mm", [(2.0, 1.0, 1.0), (1.0, 0.7, 0.7), (5.0, 0.8, 0.8), (0.6, 2.0, 1.4)]
)
def test_the_mask_has_the_scans_grid_for_any_spacing(spacing_mm: Float3, oblique: bool) -> None:
    shape = tuple(
        round(n * s / t) for n, s, t in zip((22, 40, 36), (2.0, 1.0, 1.0), spacing_mm, strict=True)
    )
    scan = make_phantom(spacing_mm, shape, oblique).reoriented("LPI")  # type: ignore[arg-type]
    settings = settings_for((1.5, 0.9, 0.9))
    mask = segment_scan(scan, make_threshold_predictor(settings), settings)
    assert mask.shape == scan.shape
    for label, hu in ((1, 60), (2, 160)):
        predicted, expected = mask >= label, scan.voxels > hu
        dice = 2 * (predicted & expected).sum() / (predicted.sum() + expected.sum())
        assert dice > (0.97 if label == 1 else 0.85), (label, dice)


@pytest.mark.parametrize("shape", [(3, 40, 36), (1, 40, 36), (22, 5, 4)])
def test_scans_smaller_than_a_window(shape: tuple[int, int, int]) -> None:
    settings = settings_for((2.0, 1.0, 1.0))
    scan = make_phantom().cropped((8, 15, 12), shape)
    mask = segment_scan(scan, make_threshold_predictor(settings), settings)
    assert mask.shape == shape
    assert np.array_equal(mask, np.where(scan.voxels > 160, 2, np.where(scan.voxels > 60, 1, 0)))


def test_body_crop_leaves_background_outside() -> None:
    settings = settings_for((2.0, 1.0, 1.0), "convert.cleaning.body_margin_mm=2")
    scan = make_phantom()
    air = np.full(scan.shape, -1000, np.int16)
    air[:, 4:36, 2:30] = scan.voxels[:, 4:36, 2:30]
    scan = Volume(air, scan.grid)
    cropped = prepare_for_network([scan], settings)
    assert cropped.grid.shape < scan.shape
    mask = segment_to_grid(cropped, scan.grid, make_threshold_predictor(settings)).mask_zyx
    assert np.array_equal(mask, np.where(air > 160, 2, np.where(air > 60, 1, 0)))


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_on_the_scans_grid_agree_with_the_mask(regions: bool) -> None:
    settings = settings_for((2.0, 1.0, 1.0))
    scan = make_phantom().reoriented("PIR")
    model = Random(2 if regions else 3)
    predictor = SlidingWindowPredictor(
        model, PATCH, OutputChannels(regions=regions), InferenceConfig(), torch.device("cpu")
    )
    result = segment_to_grid(
        prepare_for_network([scan], settings), scan.grid, predictor, keep_probabilities=True
    )
    liver, tumour = result.probability_zyx["liver"], result.probability_zyx["tumour"]
    assert liver.shape == tumour.shape == scan.shape
    if regions:
        expected = np.where(liver < 0.5, 0, np.where(tumour < 0.5, 1, 2))
    else:
        assert (tumour <= liver + 1e-6).all()
        expected = np.stack([1 - liver, liver - tumour, tumour]).argmax(0)
    # Not equal everywhere: 1 - liver is rounded differently from the background's probability.
    assert (result.mask_zyx != expected).mean() < 1e-3


def test_structure_probability() -> None:
    foreground = torch.rand(2, 2, 2, 2)
    for regions in (False, True):
        outputs = OutputChannels(regions=regions)
        predictor = SlidingWindowPredictor(
            Random(2), PATCH, outputs, InferenceConfig(), torch.device("cpu")
        )
        tumour = select_structure_probability(foreground, "tumour", predictor)
        assert torch.equal(tumour, foreground[1])
        expected = foreground[0] if regions else foreground[0] + foreground[1]
        assert torch.equal(select_structure_probability(foreground, "liver", predictor), expected)
        with pytest.raises(UserError, match="spleen"):
            select_structure_probability(foreground, "spleen", predictor)


@pytest.mark.parametrize("regions", [False, True])
def test_calibration_counts_the_probabilities_on_the_scans_own_voxels(regions: bool) -> None:
    """In two pieces, each counted in the slices nearest to it, like two slabs of a tall scan."""
    settings = settings_for((2.5, 1.3, 1.3))
    model = Random(2) if regions else Threshold(160.5 / 400, 260.5 / 400, steepness=8)
    predictor = SlidingWindowPredictor(
        model, PATCH, OutputChannels(regions=regions), settings.inference, torch.device("cpu")
    )
    scan = make_phantom().reoriented("LPI")
    truth = Volume(
        np.where(scan.voxels > 160, 2, np.where(scan.voxels > 60, 1, 0)).astype(np.uint8), scan.grid
    )
    truth.voxels[0] = 255
    image = prepare_for_network([scan], settings)
    calibrator = CalibrationCollector(truth, predictor)
    n_slices = truth.reoriented(image.grid.orientation).shape[0]
    first_half = np.arange(n_slices // 2)
    for slices in (first_half, np.arange(len(first_half), n_slices)):
        callback = calibrator.select_piece(image.grid.orientation, slices)
        found = segment_to_grid(
            image,
            scan.grid,
            predictor,
            keep_probabilities=True,
            on_probabilities=callback,
        )
    is_known = truth.voxels != 255
    for structure, counts in calibrator.collect_counts().items():
        expected = CalibrationCounter()
        expected.add(
            found.probability_zyx[structure][is_known],
            LITS_SCHEME.mask_of(truth.voxels, structure)[is_known],
        )
        assert counts == expected.counts()
    assert sum(calibrator.collect_counts()["liver"]["positives"]) > 100
    assert sum(calibrator.collect_counts()["tumour"]["voxels"]) > 100


def test_a_stored_slab_is_resampled_to_the_scans_voxels() -> None:
    scan = make_phantom()
    slab = Volume(scan.voxels[4:16, 3:33, 2:30], scan.grid.cropped((4, 3, 2), (12, 30, 28)))
    resampled = resample_image_to_grid(slab, scan.reoriented("PIR").grid)
    back = Volume(resampled, scan.reoriented("PIR").grid).reoriented("RAS").voxels
    inside = back != AIR_HU
    assert inside.sum() == np.prod(slab.shape)
    assert np.array_equal(back[inside], scan.voxels[inside])
