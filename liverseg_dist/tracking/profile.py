"""A profiler trace of some steps, on request."""

import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


class StepProfile:
    """Call `before(step)` and `after(step)` around each step (from 1); `steps`: (first, last) or None for never."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, *, cuda: bool) -> None:
        self.folder, self.steps = folder, steps
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._running: profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        if self.steps and self._running is None and self.steps[0] <= step <= self.steps[1]:
            self._first = step  # later than asked for when a run goes on in the middle
            self._running = profile(
                activities=self._activities, profile_memory=True, with_stack=False
            )
            self._running.start()

    def after(self, step: int) -> None:
        if self._running is not None and self.steps and step >= self.steps[1]:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what was seen so far."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        file = self.folder / f"steps_{self._first}_{step}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            print(f"warning: {file} cannot be written: {error}; the run goes on", file=sys.stderr)
