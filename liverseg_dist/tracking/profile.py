"""A profiler trace of a range of training steps."""

import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


class StepProfile:
    """Records a trace of some steps; call `before(step)` and `after(step)` around each step."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, *, cuda: bool) -> None:
        """Prepare a trace.

        Args:
            folder: Folder of the trace files.
            steps: First and last step (counted from 1) of the trace; None: no trace.
            cuda: Also record kernels on the GPU.
        """
        self.folder, self.steps = folder, steps
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._running: profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        if self.steps and self._running is None and self.steps[0] <= step <= self.steps[1]:
            # A resumed run may start after the first step of the range.
            self._first = step
            self._running = profile(
                activities=self._activities, profile_memory=True, with_stack=False
            )
            self._running.start()

    def after(self, step: int) -> None:
        if self._running is not None and self.steps and step >= self.steps[1]:
            self.close(step)

    def close(self, step: int) -> None:
        """Write the trace up to this step, if one is being recorded."""
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
