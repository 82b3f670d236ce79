"""Main figures and pictures of an evaluation for TensorBoard, next to its training curves."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.metrics.lesions import DETECTION_TERMS
from liverseg_dist.evaluation.metrics.registry import METRICS
from liverseg_dist.evaluation.shown_cases import select_shown_cases
from liverseg_dist.labels import STRUCTURES
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
    for structure in STRUCTURES:
        for metric in METRICS:
            if metric.on_tensorboard:
                tag = f"evaluation/{structure}/{metric.summary_key}"
                values[tag] = summary[structure][metric.summary_key]
    for threshold, found in summary["tumour"]["detection"].items():
        for name in ("precision", "recall"):
            tag = f"evaluation/lesions/{name}_{DETECTION_TERMS[threshold]}"
            values[tag] = found[name]
    rmse = summary["burden"]["rmse"]
    values["evaluation/burden_rmse_pct"] = None if rmse is None else 100 * rmse
    for structure, bins in summary["calibration"].items():
        values[f"evaluation/{structure}/calibration_error"] = bins["ece"]
    return {name: value for name, value in values.items() if value is not None}
