"""What is fuzzed: each target makes one damaged input, and checks what our reader makes of it."""

from pathlib import Path
from random import Random
from typing import Protocol

from tests.fuzz.targets.results import JournalTarget, LedgerTarget
from tests.fuzz.targets.runs import CheckpointTarget, WeightsTarget
from tests.fuzz.targets.scans import NiftiTarget, ScoreTarget
from tests.fuzz.targets.stores import StoreTarget
from tests.fuzz.targets.texts import ConfigTarget, IndexTarget, TablesTarget


class Target(Protocol):
    """`Target(folder)` prepares what is whole, below `folder`."""

    name: str

    def __init__(self, folder: Path) -> None: ...

    def make(self, case: Path, chance: Random) -> None:
        """Write one damaged input into the empty folder `case`."""

    def check(self, case: Path) -> None:
        """Read it. Returns when it was accepted, and an independent reader agrees (`judge.Wrong` if not)."""


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        NiftiTarget, IndexTarget, ConfigTarget, TablesTarget, StoreTarget, WeightsTarget, CheckpointTarget, ScoreTarget,
        LedgerTarget, JournalTarget,
    )
}  # fmt: skip
