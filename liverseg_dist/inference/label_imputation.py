"""Label scans with a trained run during conversion (`convert.labels_from`)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.findings import Finding
from liverseg_dist.inference.load_run import build_predictor, fingerprint_runs, load_run
from liverseg_dist.inference.scan_checks import compare_with_training
from liverseg_dist.inference.segment_scan import segment_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Volume


@dataclass(frozen=True)
class RunLabeller:
    """A function that labels scans with a run.

    The object is small and can be pickled: each process loads the run when it labels its first
    scan. It computes with one thread, so the labels are bit-identical for any number of processes.

    Attributes:
        run: the run's folder.
        fingerprint: SHA-256 of everything that the labels depend on.
        device: torch device on which the run is applied.
        labels: scheme of the labels.
    """

    run: Path
    fingerprint: str
    device: str = "cpu"
    labels: LabelScheme = LITS_SCHEME

    @classmethod
    def from_run(cls, run: Path, device: str = "cpu") -> "RunLabeller":
        """Check a run and create its labeller.

        Raises:
            UserError: the folder holds no finished run.
        """
        # The check needs no accelerator, so the model is loaded on the CPU.
        loaded = load_run(run, torch.device("cpu"))
        content = json.dumps(fingerprint_runs([loaded]), sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return cls(run.resolve(), fingerprint, device, loaded.settings.data.label_scheme)

    def __call__(self, image: Volume | Sequence[Volume | None]) -> np.ndarray:
        """Class values (uint8, z, y, x) of a scan, on the voxels of its first channel.

        Args:
            image: the scan, or one volume for each channel of the run; None for an absent one.
        """
        threads = torch.get_num_threads()
        # Another number of threads changes the order of sums, and with it the last bits.
        # Conversion runs one process per core, so more threads would compete with the other
        # processes.
        torch.set_num_threads(1)
        try:
            predictor, settings = _load_predictor(self.run, self.device)
            return segment_scan(image, predictor, settings)
        finally:
            # The number of threads is a setting of the whole process.
            torch.set_num_threads(threads)

    def compare_scan(self, image: Volume) -> list[Finding]:
        """Warnings about a scan that differs from the scans the run was trained on."""
        _, settings = _load_predictor(self.run, self.device)
        return compare_with_training(image, settings)


# One entry: a labeller applies one run to many scans, and a model is large.
@lru_cache(maxsize=1)
def _load_predictor(run: Path, device: str) -> tuple[SlidingWindowPredictor, Settings]:
    loaded = load_run(run, torch.device(device))
    return build_predictor([loaded], torch.device(device)), loaded.settings
