"""What is fuzzed: each target makes one damaged input, and checks what our reader makes of it."""

import importlib
from pathlib import Path
from random import Random
from typing import Protocol

PLACES = {
    "nifti": "scans.NiftiTarget",
    "dicom": "dicom.DicomTarget",
    "index": "texts.IndexTarget",
    "config": "texts.ConfigTarget",
    "tables": "texts.TablesTarget",
    "csv": "names.CsvTarget",
    "names": "names.NamesTarget",
    "store": "stores.StoreTarget",
    "weights": "runs.WeightsTarget",
    "checkpoint": "runs.CheckpointTarget",
    "score": "scans.ScoreTarget",
    "ledger": "results.LedgerTarget",
    "journal": "results.JournalTarget",
    "streams": "streams.StreamsTarget",
}
"""Imported one by one: a worker's room is measured from what it needs itself."""


PROCESSES = ("streams",)
"""Targets whose inputs start real commands, some seconds each; tests/commands/test_streams.py has a few of them."""


class Target(Protocol):
    name: str

    def make(self, case: Path, chance: Random) -> None:
        """Write one damaged input into the empty folder `case`."""

    def check(self, case: Path) -> None:
        """Read it. Returns when it was accepted, and an independent reader agrees (`judge.Wrong` if not)."""


def target(name: str, folder: Path) -> Target:
    """The target, with all that is whole prepared below `folder`."""
    module, _, kind = PLACES[name].partition(".")
    made: Target = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(folder)
    return made
