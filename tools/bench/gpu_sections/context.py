"""What a section of `tools/bench/gpu` works with, and how it reports.

A section calls `Context.measure` for each figure. Every call appends one line to the file of
results, whatever happens: `measured`, or a reason why there is no figure. One case that fails (for
example for lack of memory) does not end the section.
"""

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from step_timing import free_device_memory

from liverseg_dist.errors import LiversegError

ROOT = Path(__file__).resolve().parents[3]
MEASURED, ABSENT, SKIPPED, FAILED = "measured", "absent", "skipped", "failed"
OUT_OF_MEMORY = "out of memory"
Figures = dict[str, Any]


class NotMeasured(Exception):
    """A case that cannot be measured here; the message says why."""


@dataclass
class Context:
    """One section of one run of the benchmark.

    Args:
        section: name of the section.
        device: where to measure.
        work: folder for data; the sections of a run share it.
        out: file of results; lines are appended.
        end: `time.monotonic()` at which the section is stopped.
    """

    section: str
    device: torch.device
    work: Path
    out: Path
    end: float
    failures: int = field(default=0, init=False)

    @property
    def is_small(self) -> bool:
        """Whether only the code is tested, with tiny sizes: the CPU mode."""
        return self.device.type == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def choose(self, full: Any, small: Any) -> Any:
        """Return the size for a GPU, or the tiny one."""
        return small if self.is_small else full

    def measure(
        self,
        case: str,
        system: str,
        function: Callable[[], Figures],
        *,
        packages: Sequence[str] = (),
        needs_s: float = 0.0,
        needs_cuda: bool = False,
    ) -> Figures:
        """Call `function` and record its figures, or why there are none.

        Args:
            case: what is measured, unique in the section together with `system`.
            system: what it is measured of; empty where nothing is compared.
            function: returns the figures; names end in their unit.
            packages: packages that must be importable.
            needs_s: seconds that the case takes at most; with less time left it is skipped.
            needs_cuda: whether the case makes no sense without a GPU.

        Returns:
            The figures; empty where there are none.
        """
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return self._record(case, system, ABSENT, reason=f"not installed: {missing[0]}")
        if needs_cuda and self.device.type != "cuda":
            return self._record(case, system, SKIPPED, reason="needs a GPU")
        if not self.is_small and self.seconds_left < needs_s:
            reason = f"{self.seconds_left:.0f} s are left, it may take {needs_s:g} s"
            return self._record(case, system, SKIPPED, reason=reason)
        started = time.monotonic()
        try:
            figures = function()
        except NotMeasured as error:
            return self._record(case, system, SKIPPED, reason=str(error))
        except torch.OutOfMemoryError as error:
            return self._record(case, system, OUT_OF_MEMORY, reason=first_line(error))
        except LiversegError as error:
            return self._fail(case, system, error)
        # `accuracy_systems` ends its program when one of its commands fails.
        except (Exception, SystemExit) as error:
            traceback.print_exc(file=sys.stderr)
            return self._fail(case, system, error)
        finally:
            free_device_memory(self.device)
        figures["took_s"] = round(time.monotonic() - started, 2)
        return self._record(case, system, MEASURED, **figures)

    def _fail(self, case: str, system: str, error: BaseException) -> Figures:
        self.failures += 1
        reason = f"{type(error).__name__}: {first_line(error)}"
        return self._record(case, system, FAILED, reason=reason)

    def _record(self, case: str, system: str, status: str, **figures: Any) -> Figures:
        line: Figures = {"section": self.section, "case": case}
        if system:
            line["system"] = system
        append_line(self.out, {**line, "status": status, **round_figures(figures)})
        return figures if status == MEASURED else {}


def append_line(path: Path, line: Figures) -> None:
    """Append a line in one write, so that a process that is killed leaves complete lines."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[Figures]:
    """Return the lines of a file of results; a line that is cut off is left out."""
    found: list[Figures] = []
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def round_figures(figures: Figures) -> Figures:
    """Round numbers to five significant digits, which is more than a benchmark is worth."""
    rounded = {}
    for name, value in figures.items():
        rounded[name] = float(f"{value:.5g}") if isinstance(value, float) else value
    return rounded


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
