"""Checkpoints: written by all ranks together in the background, made whole by one rename, checked before they are used.

torch.distributed.checkpoint writes the tensors as safetensors shards (nothing is ever pickled or unpickled) and reads
them back on any number of ranks. `checkpoints/step_N/` appears only when it is complete and on disk, with
`manifest.json` holding each file's SHA-256; what is not there whole is passed over when resuming.
"""

import json
import os
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, current_rank
from liverseg_dist.distributed.heartbeat import is_consequence
from liverseg_dist.errors import RunFailed
from liverseg_dist.files import file_sha256

# With one process that is what is meant.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)
SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"


class Checkpoints:
    """The `checkpoints/` folder of a run. Every method is called on every rank, in the same order."""

    def __init__(self, folder: Path, keep_last: int, timeout_s: float = 1800.0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        # A thread begins on GPU 0: without its rank's own, each rank of a node would take memory there.
        on_gpu = torch.cuda.is_initialized()
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=begin)
        self._pending: Future[None] | None = None
        # A group of its own: the training's collectives go on while the writer's are under way.
        timeout = timedelta(seconds=timeout_s)
        self._group = (
            dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        )
        if current_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".step_*.tmp"):  # of a run that was killed while writing
                shutil.rmtree(leftover, ignore_errors=True)
        barrier()

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, wait: bool = False
    ) -> bool:
        """Copy the tensors aside and write them in the background; `wait`: return when they are safe on disk.

        A failed write (disk full) is told and leaves the earlier checkpoints as they were; returns False if it is
        known to have failed, which with `wait` means this very one.
        """
        fine = self.finish()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        aside = self.folder / f".step_{step}.tmp"
        self._pending = self._thread.submit(
            self._write, aside, step, copies, {"schema": SCHEMA, "step": step, **state}
        )
        return self.finish() if wait else fine

    def finish(self) -> bool:
        """Wait for a write under way. False if it failed, with a message from rank 0 unless a rank was lost."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            cause = _cause(error)
            if current_rank() == 0 and not is_consequence(
                cause
            ):  # of a lost rank, which ends the run and is told by its end
                reason = " ".join(str(cause).split())[:400]
                print(
                    f"warning: a checkpoint could not be written, the previous one stays: {reason}",
                    file=sys.stderr,
                )
            return False
        return True

    def close(self) -> None:
        self.finish()
        self._thread.shutdown()

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint (`step`, ...), or None. Damaged ones are named and passed over."""
        return broadcast_from_rank0(self._newest_valid() if current_rank() == 0 else None)

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Read the checkpoint of `step` into `tensors`, in place."""
        reader = HuggingFaceStorageReader(str(self.folder / f"step_{step}"))
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # no Exception
            raise RunFailed(
                f"{self.folder / f'step_{step}'} cannot be loaded: {_cause(error)}"
            ) from error

    def _write(
        self, aside: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        try:
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
            if current_rank() == 0:  # dcp.save returns here once every rank has written
                self._make_whole(aside, self.folder / f"step_{step}", state)
                self._prune()
        except BaseException:
            if current_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _make_whole(self, aside: Path, final: Path, state: dict[str, Any]) -> None:
        (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
        sums = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(
            json.dumps({"schema": SCHEMA, "sha256": sums}, indent=1), encoding="utf-8"
        )
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _fsync(self.folder)

    def _prune(self) -> None:
        for step in self._steps()[: -self.keep_last]:
            shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def _newest_valid(self) -> dict[str, Any] | None:
        for step in reversed(self._steps()):
            folder = self.folder / f"step_{step}"
            problem = validate_checkpoint(folder)
            if not problem:
                return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
            print(f"warning: {folder} is passed over: {problem}", file=sys.stderr)
        return None


def validate_checkpoint(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return f"schema {manifest['schema']} is unknown to this version"
        if STATE not in manifest["sha256"]:
            return f"{STATE} is missing from its manifest"
        for name, expected in manifest["sha256"].items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if file_sha256(path) != expected:
                return f"{name} does not match its checksum"
        if json.loads((folder / STATE).read_text(encoding="utf-8"))["step"] != int(
            folder.name.removeprefix("step_")
        ):
            return f"{STATE} is of another step"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"unreadable: {error}"
    return ""


def _cause(error: BaseException) -> BaseException:
    """What the first rank met, out of what torch packs around it."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
