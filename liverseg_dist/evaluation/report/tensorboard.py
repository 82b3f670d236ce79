"""Main figures and pictures of an evaluation for TensorBoard, next to its training curves."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.case_scores import (
    burdens_of_summary,
    lesions_of_summary,
    structures_of_summary,
)
from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.metrics.lesions import DETECTION_TERMS
from liverseg_dist.evaluation.metrics.registry import METRICS
from liverseg_dist.evaluation.shown_cases import select_shown_cases
from liverseg_dist.tracking.writer import RunWriter

BOARD = "tensorboard"


def write_tensorboard(
    folder: Path,
    summary: dict[str, Any],
    cases: Sequence[dict[str, Any]],
    pictures: Path,
    step: int,
) -> Path:
    """Replace `folder/tensorboard`: scalars, and the three planes of each case that the report
    shows.

    Args:
        folder: Folder of the evaluation.
        summary: From `summary.aggregate_scores`.
        cases: Scored cases.
        pictures: Folder of `overlays.save_pictures`.
        step: Training step of the weights.

    Returns:
        The folder of the events.
    """
    board = folder / BOARD
    shutil.rmtree(board, ignore_errors=True)
    board.mkdir(parents=True)
    writer = RunWriter(board)
    try:
        writer.scalars(step, collect_headline_figures(summary))
        for rank, case in select_shown_cases(cases):
            file = pictures / f"{encode_file_name(case['case_id'])}.png"
            if file.is_file():
                with Image.open(file) as picture:
                    writer.picture(
                        step,
                        f"evaluation/{rank}/{case['case_id']}",
                        np.asarray(picture.convert("RGB")),
                    )
    finally:
        writer.close()
    return board


def collect_headline_figures(summary: dict[str, Any]) -> dict[str, float]:
    """The main figures that are defined, by TensorBoard tag.

    `detected` lesions have an IoU above 0.5 with their match, `touched` ones any overlap.
    """
    values: dict[str, float | None] = {}
    for structure in structures_of_summary(summary):
        for metric in METRICS:
            if metric.on_tensorboard:
                tag = f"evaluation/{structure}/{metric.summary_key}"
                values[tag] = summary[structure][metric.summary_key]
    lesion_structures = lesions_of_summary(summary)
    for structure in lesion_structures:
        # With one lesion structure the tags are those of earlier versions.
        group = "lesions" if len(lesion_structures) == 1 else f"lesions/{structure}"
        for threshold, found in summary[structure]["detection"].items():
            for name in ("precision", "recall"):
                values[f"evaluation/{group}/{name}_{DETECTION_TERMS[threshold]}"] = found[name]
    burdens = burdens_of_summary(summary)
    for structure, burden in burdens.items():
        rmse = burden["rmse"]
        tag = "burden_rmse_pct" if len(burdens) == 1 else f"{structure}/burden_rmse_pct"
        values[f"evaluation/{tag}"] = None if rmse is None else 100 * rmse
    for structure, bins in summary["calibration"].items():
        values[f"evaluation/{structure}/calibration_error"] = bins["ece"]
    return {name: value for name, value in values.items() if value is not None}
