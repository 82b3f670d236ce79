"""CPU time of the metrics, compared with MONAI, scipy and DeepMind's surface-distance, on equal masks in one process.

  python tools/bench/metrics.py [--shape 64 512 512] [--repeats 3]

Masks are synthetic: a liver of about 3 l with tumours, and a prediction that differs from it like that of a good
model. Prints one JSON line per comparison and a table. `ratio` is peer / this project; times are CPU seconds of one
core (set OMP_NUM_THREADS=1), the minimum of the repeats. `same` is the largest difference between values that
should be equal.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import cc3d
import numpy as np
import torch
from scipy import ndimage

from liverseg_dist.evaluation import score_case
from liverseg_dist.evaluation.metrics.lesions import score_lesions
from liverseg_dist.evaluation.metrics.overlap import count_confusion, count_structures
from liverseg_dist.evaluation.metrics.surface import score_surface
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.volume import Float3

warnings.simplefilter("ignore")

import surface_distance  # noqa: E402  (both warn while they are imported)
from monai.metrics import (  # noqa: E402
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)

SPACING_MM: Float3 = (2.5, 0.75, 0.75)
Masks = tuple[np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(64, 512, 512), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="each is timed this often; the least counts"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    prediction, truth = make_masks(tuple(args.shape))
    rows = [
        compare(name, vs, ours, theirs, args.repeats)
        for name, vs, ours, theirs in contests(prediction, truth)
    ]
    case = "x".join(str(n) for n in args.shape)
    for row in rows:
        print(json.dumps({"bench": "metrics", "shape": case, **row}))
    print(
        f"\n{'metrics':34} {'against':28} {'own s':>8} {'peer s':>9} {'ratio':>7}  largest difference"
    )
    for row in rows:
        print(
            f"{row['case']:34} {row['vs']:28} {row['ours_s']:8.3f} {row['theirs_s']:9.3f} {row['ratio']:7.1f}"
            f"  {row['same']:.1e}"
        )


def make_masks(shape: tuple[int, int, int]) -> Masks:
    """Prediction and truth with labels 0, 1, 2 (uint8)."""
    rng = np.random.default_rng(1)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    coarse = rng.normal(size=(2, 10, 12, 12))
    waves = [
        ndimage.zoom(wave, [n / m for n, m in zip(shape, wave.shape, strict=True)], order=1)
        for wave in coarse
    ]
    radius = (
        np.sqrt(place[0] ** 2 + (place[1] / 0.5) ** 2 + ((place[2] + 0.15) / 0.55) ** 2)
        + 0.04 * waves[0]
    )
    truth = (radius < 0.95).astype(np.uint8)
    prediction = (radius + 0.015 * waves[1] < 0.95).astype(np.uint8)
    for _ in range(12):
        centre, size = rng.uniform([-0.6, -0.3, -0.5], [0.6, 0.3, 0.2]), rng.uniform(0.02, 0.1)
        for mask, shift in ((truth, 0.0), (prediction, rng.uniform(0, 0.3) * size)):
            mask[
                (
                    sum(((place[i] - centre[i] - shift) / (1, 0.4, 0.4)[i]) ** 2 for i in range(3))
                    < size**2
                )
            ] = 2
    return prediction, truth


def contests(
    prediction: np.ndarray, truth: np.ndarray
) -> list[tuple[str, str, Callable, Callable]]:
    """Return (case, peer, own function, function of the peer); both functions return values that should be equal."""
    masks = {"liver": (prediction > 0, truth > 0), "tumour": (prediction == 2, truth == 2)}
    batches = {name: (one_hot(pair[0]), one_hot(pair[1])) for name, pair in masks.items()}
    both_surfaces = lambda: [score_surface(*pair, SPACING_MM) for pair in masks.values()]  # noqa: E731
    return [
        (
            "HD95 + NSD, liver and tumour",
            "surface-distance",
            lambda: [s[key] for s in both_surfaces() for key in ("hd95_mm", "nsd_1mm", "nsd_2mm")],
            lambda: [value for pair in masks.values() for value in deepmind(pair)],
        ),
        (
            "all surface, liver and tumour",
            "MONAI HD, ASSD, NSD",
            lambda: [s["mssd_mm"] for s in both_surfaces()],
            lambda: [monai_surface(pair) for pair in batches.values()],
        ),
        (
            "Dice + Jaccard, liver and tumour",
            "MONAI",
            lambda: [
                v
                for c in count_structures(
                    count_confusion(prediction, truth, 3), LITS_SCHEME
                ).values()
                for v in (c.dice(), c.jaccard())
            ],
            lambda: [float(f(*pair)) for pair in batches.values() for f in (monai_dice, monai_iou)],
        ),
        (
            "lesion components",
            "scipy label",
            lambda: [
                int(cc3d.connected_components(mask, connectivity=6).max())
                for mask in masks["tumour"]
            ],
            lambda: [ndimage.label(mask)[1] for mask in masks["tumour"]],
        ),
        (
            "lesion detection + table",
            "LiTS rules on scipy",
            lambda: our_detection(masks["tumour"]),
            lambda: plain_detection(masks["tumour"]),
        ),
        (
            "the whole LiTS set of a case",
            "MONAI + scipy",
            lambda: whole_set(prediction, truth),
            lambda: monai_whole_set(masks, batches),
        ),
    ]


def compare(case: str, vs: str, ours: Callable, theirs: Callable, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    values = {}
    for _ in range(repeats):
        for name, work in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            values[name] = work()
            times[name].append(time.process_time() - start)
    ours_s, theirs_s = min(times["ours"]), min(times["theirs"])
    difference = float(
        np.abs(
            np.array(values["ours"], dtype=float) - np.array(values["theirs"], dtype=float)
        ).max()
    )
    return {
        "case": case,
        "vs": vs,
        "ratio": round(theirs_s / ours_s, 2),
        "ours_s": round(ours_s, 4),
        "theirs_s": round(theirs_s, 4),
        "same": difference,
    }


def one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))


def deepmind(pair: Masks) -> list[float]:
    distances = surface_distance.compute_surface_distances(pair[1], pair[0], SPACING_MM)
    nsd = [
        surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        for tolerance in (1, 2)
    ]
    return [surface_distance.compute_robust_hausdorff(distances, 95), *nsd]


def monai_dice(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return compute_dice(prediction, truth, include_background=False)


def monai_iou(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return compute_iou(prediction, truth, include_background=False)


def monai_surface(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Hausdorff, HD95, symmetric ASSD, NSD at 1 and 2 mm (surface elements); returns the Hausdorff distance."""
    compute_hausdorff_distance(*pair, spacing=SPACING_MM, percentile=95)
    compute_average_surface_distance(*pair, spacing=SPACING_MM, symmetric=True)
    for tolerance in (1.0, 2.0):
        compute_surface_dice(
            *pair, class_thresholds=[tolerance], spacing=SPACING_MM, use_subvoxels=True
        )
    return float(compute_hausdorff_distance(*pair, spacing=SPACING_MM))


def our_detection(pair: Masks) -> list[int]:
    found: Any = score_lesions(*pair, SPACING_MM)["detection"]
    return [found["iou_0"]["tp"], found["iou_0"]["fn"]]


def plain_detection(pair: Masks) -> list[int]:
    """TP and FN at any overlap, lesion by lesion, as scripts do it with scipy."""
    predicted, num_predicted = ndimage.label(pair[0])
    true, num_true = ndimage.label(pair[1])
    hit = sum(bool(predicted[true == number].any()) for number in range(1, num_true + 1))
    for number in range(1, num_predicted + 1):
        np.unique(true[predicted == number])
    return [hit, num_true - hit]


def whole_set(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    scores = score_case("bench", prediction, truth, SPACING_MM)
    return [scores[s][key] for s in ("liver", "tumour") for key in ("dice", "jaccard", "mssd_mm")]


def monai_whole_set(masks: dict[str, Masks], batches: dict[str, Any]) -> list[float]:
    values = []
    for pair in batches.values():
        values += [float(monai_dice(*pair)), float(monai_iou(*pair)), monai_surface(pair)]
    plain_detection(masks["tumour"])
    return values


if __name__ == "__main__":
    guard_output_streams()
    main()
