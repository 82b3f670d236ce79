"""MR phantoms: the signal equations, the tissues, the noise and the bias field."""

import math

import numpy as np
import pytest
from scipy import stats

from liverseg_dist.phantom.anatomy import draw_patient
from liverseg_dist.phantom.canvas import Tissue
from liverseg_dist.phantom.mr_scanner import MrScanner, add_rician_noise
from liverseg_dist.phantom.mr_signal import (
    FLOW_VOID,
    SEQUENCES,
    MrRenderer,
    compute_spin_echo,
    compute_spoiled_gradient_echo,
)
from liverseg_dist.phantom.mr_tissues import MR_TISSUES, T2_PRIME_MS, draw_patient_tissues
from liverseg_dist.volume import Grid

PUBLISHED_MS = {"liver": (809, 34), "spleen": (1328, 61), "kidney_cortex": (1142, 76),
                "kidney_medulla": (1545, 81), "pancreas": (725, 43), "muscle": (898, 29),
                "fat": (382, 68), "marrow": (586, 49)}  # fmt: skip
"""T1 and T2 at 3 T of de Bazelaire et al. 2004."""


def signal_of(sequence: str, tissue: str) -> float:
    return SEQUENCES[sequence].compute_signal(MR_TISSUES[tissue])


def test_tissues_have_the_published_relaxation_times() -> None:
    for name, times in PUBLISHED_MS.items():
        assert (MR_TISSUES[name].t1_ms, MR_TISSUES[name].t2_ms) == times
    for name, tissue in MR_TISSUES.items():
        assert tissue.t2_ms < tissue.t1_ms, name
        # Hydrogen in soft tissue is as dense as in water, to 10 percent.
        if name not in ("lung", "cortical_bone", "gas", "stool"):
            assert 0.9 < tissue.proton_density < 1.1, name


def test_gradient_echo_of_the_liver_equals_a_computation_by_hand() -> None:
    # TR 160 ms, TE 2.3 ms, 75 degrees; T1 809 ms, T2* = 1 / (1 / 34 + 1 / 50) = 20.238 ms;
    # E1 = exp(-0.197775) = 0.820554; density 0.102 * 1.05 / 0.1119 = 0.957105.
    # 0.957105 * 0.965926 * 0.179446 / (1 - 0.258819 * 0.820554) * exp(-0.113647) = 0.188016
    assert pytest.approx(20.238, abs=1e-3) == 1 / (1 / 34 + 1 / T2_PRIME_MS)
    assert signal_of("gre", "liver") == pytest.approx(0.188016, abs=2e-5)


def test_spin_echo_of_the_spleen_equals_a_computation_by_hand() -> None:
    # TR 3500 ms, TE 90 ms; T1 1328 ms, T2 61 ms; density 0.103 * 1.04 / 0.1119 = 0.957283.
    # 1 - 2 exp(-2.601657) + exp(-2.635542) = 0.923373; exp(-1.475410) = 0.228685
    assert signal_of("tse", "spleen") == pytest.approx(0.957283 * 0.923373 * 0.228685, abs=2e-5)


def test_signals_have_their_limits() -> None:
    # Complete relaxation and no decay: the proton density, times the share that is excited.
    assert compute_spin_echo(0.8, 900, 50, 1e7, 1e-9) == pytest.approx(0.8)
    assert compute_spoiled_gradient_echo(0.8, 900, 20, 1e7, 1e-9, 90) == pytest.approx(0.8)
    assert compute_spoiled_gradient_echo(0.8, 900, 20, 1e7, 1e-9, 30) == pytest.approx(0.4)
    # No time to relax, or a late echo: no signal.
    assert compute_spoiled_gradient_echo(0.8, 900, 20, 1e-6, 1, 90) == pytest.approx(0, abs=1e-6)
    assert compute_spin_echo(0.8, 900, 50, 3000, 2500) == pytest.approx(0, abs=1e-6)
    # The largest signal is at the Ernst angle.
    angles = np.arange(1, 90)
    signals = [compute_spoiled_gradient_echo(1, 800, 20, 160, 2, angle) for angle in angles]
    ernst_deg = math.degrees(math.acos(math.exp(-160 / 800)))
    assert angles[int(np.argmax(signals))] == pytest.approx(ernst_deg, abs=1)


def test_weighting_is_that_of_abdominal_mr() -> None:
    assert signal_of("gre", "fat") > signal_of("gre", "liver") > signal_of("gre", "spleen")
    assert signal_of("gre", "liver") > signal_of("gre", "hcc") > signal_of("gre", "metastasis")
    assert (
        signal_of("gre", "metastasis") > signal_of("gre", "haemangioma") > signal_of("gre", "cyst")
    )
    assert (
        signal_of("tse", "cyst") > signal_of("tse", "haemangioma") > signal_of("tse", "metastasis")
    )
    assert signal_of("tse", "hcc") > 2 * signal_of("tse", "liver")
    assert signal_of("pd", "liver") > 0.9 * signal_of("pd", "spleen")
    # A flow void, although blood has a long T2.
    blood = MR_TISSUES["blood"]
    still = compute_spin_echo(blood.proton_density, blood.t1_ms, blood.t2_ms, 3500, 90)
    assert signal_of("tse", "blood") == pytest.approx(FLOW_VOID * still)


def test_every_tissue_of_every_patient_can_be_rendered() -> None:
    renderer = MrRenderer.for_patient(SEQUENCES["gre"], MR_TISSUES)
    texture = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    seen = set()
    for seed in range(12):
        patient = draw_patient(np.random.default_rng(seed), 4, (12.0, 40.0), seed % 2 == 1)
        for stroke in (*patient.organs, *patient.inside_liver):
            assert (np.asarray(renderer.render_tissue(stroke.tissue, texture)) >= 0).all()
            seen.add(stroke.tissue.kind)
        seen |= {tumour.kind for tumour in patient.tumours}
    assert seen <= set(MR_TISSUES)
    assert {"gut_wall", "gas", "cyst", "fatty_liver", "metastasis", "hcc", "urine"} <= seen


def test_unevenness_and_spots_follow_the_texture() -> None:
    renderer = MrRenderer({"muscle": 0.2, "fat": 0.4}, {"muscle": "fat", "fat": ""})
    texture = np.array([0.0, 1.0, -3.0], np.float32)
    plain = renderer.render_tissue(Tissue(60.0, kind="muscle"), texture)
    assert float(plain) == pytest.approx(0.2)
    uneven = renderer.render_tissue(Tissue(60.0, grain=5.0, kind="muscle"), texture)
    np.testing.assert_allclose(uneven, [0.2, 0.21, 0.17], rtol=1e-5)
    # Fat in muscle where the texture field is below -2.
    tissue = Tissue(60.0, grain=0.0, spot=-90.0, rare=-2.0, kind="muscle")
    np.testing.assert_allclose(renderer.render_tissue(tissue, texture), [0.2, 0.2, 0.4], rtol=1e-5)


def test_patients_differ_in_t1_only() -> None:
    one, two = (draw_patient_tissues(np.random.default_rng(seed)) for seed in (0, 1))
    assert one["liver"].t1_ms != two["liver"].t1_ms
    for name, tissue in MR_TISSUES.items():
        assert abs(one[name].t1_ms - tissue.t1_ms) <= 2 * tissue.t1_sd_ms + 1e-9
        assert one[name].t2_ms == tissue.t2_ms
    assert draw_patient_tissues(np.random.default_rng(0)) == one


@pytest.mark.parametrize("signal", [0.0, 0.5, 2.0, 10.0])
def test_noise_is_rician(signal: float) -> None:
    flat = np.full((20, 30, 30), signal, np.float32)
    noisy = add_rician_noise(flat, 0.7, np.random.default_rng(1)).ravel()
    expected = stats.rice(signal / 0.7, scale=0.7)
    assert stats.kstest(noisy, expected.cdf).pvalue > 0.01
    assert noisy.mean() == pytest.approx(expected.mean(), rel=0.02)
    # Gaussian noise of the same standard deviation is not accepted without signal.
    if signal == 0:
        assert stats.kstest(noisy, stats.norm(0, 0.7).cdf).pvalue < 1e-6


def test_bias_field_is_smooth_and_gain_differs() -> None:
    grid = Grid((30, 80, 80), np.diag([5.0, 5.0, 6.0, 1.0]))
    signals = {name: SEQUENCES["gre"].compute_signal(tissue) for name, tissue in MR_TISSUES.items()}
    gains = []
    for seed in range(8):
        scanner = MrScanner.draw_random(np.random.default_rng(seed), signals, hard=False)
        gains.append(scanner.gain)
        log_bias = scanner.log_bias.evaluate_planes(grid, slice(0, 30))
        slopes = np.gradient(log_bias, 6.0, 5.0, 5.0)
        # At most 1 percent per mm, and a visible difference across the body.
        assert max(np.abs(slope).max() for slope in slopes) < 0.01
        assert np.ptp(log_bias) > 0.05
        assert np.abs(log_bias).max() < 0.8
    assert max(gains) > 2 * min(gains)


def test_measured_values_are_signal_times_gain_and_bias() -> None:
    grid = Grid((6, 40, 40), np.diag([5.0, 5.0, 6.0, 1.0]))
    signals = dict.fromkeys(MR_TISSUES, 0.2)
    scanner = MrScanner.draw_random(np.random.default_rng(3), signals, hard=False)
    flat = np.full((2, 40, 40), 0.2, np.float32)
    stored = scanner.measure_planes(flat, np.random.default_rng(0), grid, slice(2, 4))
    assert stored.dtype == np.int16
    expected = 0.2 * scanner.gain * np.exp(scanner.log_bias.evaluate_planes(grid, slice(2, 4)))
    assert np.median(stored / expected) == pytest.approx(1, abs=0.01)
    assert np.std(stored / expected) == pytest.approx(scanner.noise / 0.2, rel=0.15)
