"""Where a run's figures go: TensorBoard events and `metrics.jsonl`, or nowhere (ranks above 0). Chosen once."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from liverseg_dist.files import write_text
from liverseg_dist.tracking.tags import board_tag

TRY_AGAIN_S = 60.0
"""Before TensorBoard's file is tried again after a failure."""


class Writer(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None: ...
    def text(self, name: str, markdown: str) -> None: ...
    def hparams(
        self, step: int, settings: Mapping[str, str | float], results: Mapping[str, float]
    ) -> None: ...
    def close(self) -> None: ...


class NullWriter:
    """Takes everything, keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        pass

    def text(self, name: str, markdown: str) -> None:
        pass

    def hparams(
        self, step: int, settings: Mapping[str, str | float], results: Mapping[str, float]
    ) -> None:
        pass

    def close(self) -> None:
        pass


class RunWriter:
    """TensorBoard (tags: see `tags`) plus one JSON line per call of `scalars`.

    Figures past `resume_step` are dropped: they come again.

    A disk that takes no more ends no run: what cannot be written is told once and missed, until there is room again.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._folder = folder
        self._events: SummaryWriter | None = SummaryWriter(
            str(folder), purge_step=resume_step + 1 if resume_step else None
        )
        self._lines_path = folder / "metrics.jsonl"
        _keep_until(self._lines_path, resume_step)
        self._lines = self._lines_path.open("a", encoding="utf-8")
        self._told = False
        self._next_try_s = 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def add(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(board_tag(name), value, step)

        self._on_board(add)
        try:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()  # what does not fit stays in the buffer and goes with the next line
        except OSError as error:
            self._tell(error)

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        self._on_board(lambda board: board.add_image(name, rgb_YXC, step, dataformats="HWC"))

    def text(self, name: str, markdown: str) -> None:
        self._on_board(lambda board: board.add_text(name, markdown))

    def hparams(
        self, step: int, settings: Mapping[str, str | float], results: Mapping[str, float]
    ) -> None:
        """This run's row on TensorBoard's HParams page."""
        self._on_board(
            lambda board: board.add_hparams(
                dict(settings), dict(results), run_name=".", global_step=step
            )
        )

    def close(self) -> None:
        self._on_board(lambda board: board.close())
        try:
            self._lines.close()
        except OSError as error:
            self._tell(error)

    def _on_board(self, add: Callable[[SummaryWriter], object]) -> None:
        """A board that failed once takes nothing any more: a new one is tried some time later."""
        try:
            if self._events is None and time.monotonic() >= self._next_try_s:
                self._next_try_s = time.monotonic() + TRY_AGAIN_S
                self._events = SummaryWriter(str(self._folder))
            if self._events is not None:
                add(self._events)
        except OSError as error:
            self._events, self._next_try_s = None, time.monotonic() + TRY_AGAIN_S
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            reason = error.strerror or str(error)
            print(
                f"warning: {self._folder}: figures cannot be written: {reason}; the run goes on",
                file=sys.stderr,
            )
        self._told = True


def tensorboard_command(run: Path) -> str:
    """The command that shows a run's curves under the run's name, beside those of the runs next to it."""
    # TensorBoard names a run by its folder below --logdir: with the run's own folder it would be called ".".
    return f"tensorboard --logdir {shlex.quote(str(run.resolve().parent))}"


def _keep_until(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a half-written last line goes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
