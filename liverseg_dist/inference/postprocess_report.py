"""Post-processing in words, for the report and the terminal."""

import json
from pathlib import Path

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.load_run import POSTPROCESS
from liverseg_dist.inference.postprocess_search import NO_POSTPROCESSING, OPERATIONS


def describe_postprocessing(config: InferenceConfig, run: Path) -> str:
    """The operations that change the masks, with their settings.

    Args:
        config: Settings of the prediction.
        run: The run's folder; `liverseg postprocess` saves its choice there.

    Returns:
        For example `largest_component=true, min_tumour_ml=0.3 (postprocess.yaml of the run)`, or `none`.
    """
    active = []
    for name in OPERATIONS:
        value = getattr(config, name)
        if value != getattr(NO_POSTPROCESSING, name):
            active.append(f"{name}={json.dumps(value)}")
    chosen = (
        f" ({POSTPROCESS} of the run, chosen by liverseg postprocess)"
        if (run / POSTPROCESS).is_file()
        else ""
    )
    return (", ".join(active) or "none") + chosen
