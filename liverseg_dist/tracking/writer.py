"""Write the figures of a run: TensorBoard events and `metrics.jsonl`.

`RunWriter` is used on rank 0, `NullWriter` on all other ranks. The trainer chooses once and then
calls the same methods on every rank.
"""

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

RETRY_INTERVAL_S = 60.0
"""Pause before the next try to write TensorBoard events after a failure."""


class Writer(Protocol):
    """What a training or an evaluation writes its figures to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None: ...
    def text(self, name: str, markdown: str) -> None: ...
    def hparams(
        self, step: int, settings: Mapping[str, str | float], results: Mapping[str, float]
    ) -> None: ...
    def close(self) -> None: ...


class NullWriter:
    """Ignores all figures."""

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
    """TensorBoard events (tags: see `tags`) and one JSON line per call of `scalars`.

    A full disk does not stop a run: one warning is printed, and figures are lost until the disk has
    free space again.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        """Open the files of a run.

        Args:
            folder: Run folder.
            resume_step: Last step of the checkpoint that the run resumes from. Figures of later
                steps are removed: the run computes these steps again.
        """
        self._folder = folder
        self._events: SummaryWriter | None = SummaryWriter(
            str(folder), purge_step=resume_step + 1 if resume_step else None
        )
        self._lines_path = folder / "metrics.jsonl"
        _truncate_lines(self._lines_path, resume_step)
        self._lines = self._lines_path.open("a", encoding="utf-8")
        self._has_warned = False
        self._next_try_s = 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def add_all(events: SummaryWriter) -> None:
            for name, value in values.items():
                events.add_scalar(board_tag(name), value, step)

        self._write_events(add_all)
        try:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            # After a failure the buffer keeps the line: it is written with the next one.
            self._lines.flush()
        except OSError as error:
            self._warn_once(error)

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        self._write_events(lambda events: events.add_image(name, rgb_YXC, step, dataformats="HWC"))

    def text(self, name: str, markdown: str) -> None:
        self._write_events(lambda events: events.add_text(name, markdown))

    def hparams(
        self, step: int, settings: Mapping[str, str | float], results: Mapping[str, float]
    ) -> None:
        """Write this run's row of TensorBoard's HParams page."""
        self._write_events(
            lambda events: events.add_hparams(
                dict(settings), dict(results), run_name=".", global_step=step
            )
        )

    def close(self) -> None:
        """Close the files; a failure is a warning, since the run itself is complete."""
        self._write_events(lambda events: events.close())
        try:
            self._lines.close()
        except OSError as error:
            self._warn_once(error)

    def _write_events(self, add: Callable[[SummaryWriter], object]) -> None:
        """Add to the events; after a failure a new event file is opened later.

        A `SummaryWriter` that failed once accepts nothing more.
        """
        try:
            if self._events is None and time.monotonic() >= self._next_try_s:
                self._next_try_s = time.monotonic() + RETRY_INTERVAL_S
                self._events = SummaryWriter(str(self._folder))
            if self._events is not None:
                add(self._events)
        except OSError as error:
            self._events, self._next_try_s = None, time.monotonic() + RETRY_INTERVAL_S
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        reason = error.strerror or str(error)
        print(
            f"warning: {self._folder}: figures cannot be written: {reason}; the run goes on",
            file=sys.stderr,
        )


def tensorboard_command(run: Path) -> str:
    """The command that shows the curves of a run and of the runs next to it, by run name."""
    # TensorBoard names a run by its folder below --logdir; in its own folder a run would be ".".
    return f"tensorboard --logdir {shlex.quote(str(run.resolve().parent))}"


def _truncate_lines(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` and lines that are damaged."""
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
