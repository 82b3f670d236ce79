"""An evaluation's headline figures and pictures for TensorBoard, beside the curves of its training."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.shown_cases import select_shown_cases
from liverseg_dist.labels import STRUCTURES
from liverseg_dist.tracking.writer import RunWriter

BOARD = "tensorboard"
WORDS = {"iou_50": "detected", "iou_0": "touched"}
"""Word for the lesions above an IoU threshold."""
FIGURES = ("dice_per_case", "dice_global", "assd_mm", "hd95_mm", "nsd_1mm", "nsd_2mm")


def write_tensorboard(
    folder: Path,
    summary: dict[str, Any],
    cases: Sequence[dict[str, Any]],
    pictures: Path,
    step: int,
) -> Path:
    """Write `folder/tensorboard` anew: scalars, and the report's pictures (three planes of each case it shows).

    `step` is the training step of the weights. Returns the folder.
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
    """The defined ones of the main figures, by TensorBoard tag.

    `detected` lesions have an IoU above 0.5 with their match, `touched` ones any overlap (as in the report).
    """
    values = {f"evaluation/{s}/{name}": summary[s][name] for s in STRUCTURES for name in FIGURES}
    for threshold, found in summary["tumour"]["detection"].items():
        values |= {
            f"evaluation/lesions/{name}_{WORDS[threshold]}": found[name]
            for name in ("precision", "recall")
        }
    rmse = summary["burden"]["rmse"]
    values["evaluation/burden_rmse_pct"] = None if rmse is None else 100 * rmse
    values |= {
        f"evaluation/{name}/calibration_error": bins["ece"]
        for name, bins in summary["calibration"].items()
    }
    return {name: value for name, value in values.items() if value is not None}
