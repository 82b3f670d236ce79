"""Where a run's figures go: TensorBoard events and `metrics.jsonl`, or nowhere (ranks above 0). Chosen once."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class Writer(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None: ...
    def text(self, name: str, markdown: str) -> None: ...
    def close(self) -> None: ...


class NullWriter:
    """Takes everything, keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        pass

    def text(self, name: str, markdown: str) -> None:
        pass

    def close(self) -> None:
        pass


class RunWriter:
    """TensorBoard plus one JSON line per call of `scalars`. Figures past `resume_step` are dropped: they come again.

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

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._unless_full():
            for name, value in values.items():
                self._board().add_scalar(name, value, step)
        with self._unless_full():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()  # what does not fit stays in the buffer and goes with the next line

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        with self._unless_full():
            self._board().add_image(name, rgb_YXC, step, dataformats="HWC")

    def text(self, name: str, markdown: str) -> None:
        with self._unless_full():
            self._board().add_text(name, markdown)

    def close(self) -> None:
        with self._unless_full():
            self._board().close()
        with self._unless_full():
            self._lines.close()

    def _board(self) -> SummaryWriter:
        """A new events file after one that failed, for such a one takes nothing any more."""
        if self._events is None:
            self._events = SummaryWriter(str(self._folder))
        return self._events

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._events = None
            if not self._told:
                reason = error.strerror or str(error)
                print(f"warning: {self._folder}: figures cannot be written: {reason}; the run goes on", file=sys.stderr)
            self._told = True


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
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
