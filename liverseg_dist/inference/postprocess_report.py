"""Describe the post-processing of a run, for the report and the terminal."""

import json
from pathlib import Path

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.load_run import POSTPROCESS
from liverseg_dist.inference.postprocess_operations import select_active_operations
from liverseg_dist.labels import LabelScheme


def describe_postprocessing(config: InferenceConfig, labels: LabelScheme, run: Path) -> str:
    """The operations that change the masks, with their settings.

    Args:
        config: Settings of the prediction.
        labels: Labels of the run.
        run: The run's folder; `liverseg postprocess` saves its choice there.

    Returns:
        For example `largest_component=true, min_tumour_ml=0.3 (postprocess.yaml of the run)`, or
        `none`.
    """
    active = []
    for name, value in (select_active_operations(config, labels) or {}).items():
        active.append(f"{name}={json.dumps(value)}")
    description = ", ".join(active) or "none"
    if (run / POSTPROCESS).is_file():
        description += f" ({POSTPROCESS} of the run, chosen by liverseg postprocess)"
    return description
