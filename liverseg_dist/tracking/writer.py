"""Where a run's figures go: TensorBoard events and `metrics.jsonl`, or nowhere (ranks above 0). Chosen once."""

import json
import os
from collections.abc import Mapping
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
    """TensorBoard plus one JSON line per call of `scalars`. Figures past `resume_step` are dropped: they come again."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._events = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
        self._lines_path = folder / "metrics.jsonl"
        _keep_until(self._lines_path, resume_step)
        self._lines = self._lines_path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()

    def picture(self, step: int, name: str, rgb_YXC: np.ndarray) -> None:
        self._events.add_image(name, rgb_YXC, step, dataformats="HWC")

    def text(self, name: str, markdown: str) -> None:
        self._events.add_text(name, markdown)

    def close(self) -> None:
        self._events.close()
        self._lines.close()


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
