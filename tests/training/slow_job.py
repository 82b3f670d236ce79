"""`slow_job.py FOLDER train ...`: the command line with a slow validation and a batch that hangs.

SLOW_CASE_S: seconds that each case of a validation takes longer. HANGING_BATCH: number of the batch
that the loader never finishes. Each slow place creates a file in FOLDER when it is reached.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.commands.main import main, run_and_exit
from liverseg_dist.data.loading import PatchLoader
from liverseg_dist.inference import SlidingWindowPredictor

FOLDER = Path(sys.argv[1])
CASE_S = float(os.environ.get("SLOW_CASE_S", "0"))
HANGING_BATCH = int(os.environ.get("HANGING_BATCH", "-1"))
predict_labels = SlidingWindowPredictor.predict_labels
load_batch = PatchLoader._load_batch
batches = 0


def predict_slowly(self: SlidingWindowPredictor, *arguments: Any, **named: Any) -> Any:
    with (FOLDER / "cases").open("a") as file:
        file.write("x")
    time.sleep(CASE_S)
    return predict_labels(self, *arguments, **named)


def load_or_hang(self: PatchLoader, indices: Sequence[int], job: Any = None) -> Any:
    global batches
    batches += 1
    if batches == HANGING_BATCH:
        (FOLDER / "hanging").touch()
        time.sleep(600)
    return load_batch(self, indices, job)


SlidingWindowPredictor.predict_labels = predict_slowly  # type: ignore[method-assign]
PatchLoader._load_batch = load_or_hang  # type: ignore[method-assign]
sys.argv[1:] = sys.argv[2:]
if __name__ == "__main__":
    run_and_exit(main)
