"""Checkpoints: written by all ranks in the background, published by one rename, checked when read.

torch.distributed.checkpoint writes the tensors as safetensors shards (no pickle) and reads them on
any number of ranks. `checkpoints/step_N/` is created by a rename when all its files are on disk;
`manifest.json` in it has the SHA-256 of each file. Resuming skips incomplete or damaged
checkpoints.
"""

import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
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
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from liverseg_dist.distributed.collectives import barrier, broadcast_from_rank0, current_rank
from liverseg_dist.distributed.connection_errors import is_consequence
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.errors import RunFailed
from liverseg_dist.files import file_sha256
from liverseg_dist.logging_setup import ONCE

# With a single process this is intended.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)
SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_logger = logging.getLogger(__name__)


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Every method is a collective call: all ranks call it, in the same order.

    Args:
        folder: created if it does not exist.
        keep_last: number of newest checkpoints to keep.
        timeout_s: how long a write waits for a lost rank.
    """

    def __init__(self, folder: Path, keep_last: int, timeout_s: float = 1800.0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._pending: Future[None] | None = None
        # A separate process group: collective calls of the training and of the writer overlap.
        timeout = timedelta(seconds=timeout_s)
        self._group = (
            dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        )
        if current_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # A process that was killed while it wrote a checkpoint leaves such folders.
            for leftover in folder.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier()

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        wait: bool = False,
    ) -> bool:
        """Copy the tensors to the CPU and write them in the background.

        A failed write (for example a full disk) logs a warning and keeps the earlier checkpoints.

        Args:
            step: optimizer steps done.
            tensors: tensors of the training state; sharded ones as DTensors.
            state: the rest of the state, as JSON.
            wait: return only when the checkpoint is on disk.

        Returns:
            False if a write has failed: with `wait` this one, else the one before.
        """
        earlier_is_written = self.finish()
        # Training continues and changes the tensors while the copies are written.
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        staging = self.folder / f".step_{step}.tmp"
        full_state = {"schema": SCHEMA, "step": step, **state}
        self._pending = _start_thread(partial(self._write, staging, step, copies, full_state))
        return self.finish() if wait else earlier_is_written

    def finish(self) -> bool:
        """Wait for the write in progress. Returns False, with a warning, if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        try:
            pending.result()
        # CheckpointException is a BaseException, but not an Exception.
        except (Exception, CheckpointException) as error:
            cause = _first_cause(error)
            # A lost rank ends the run, which reports it.
            if not is_consequence(cause):
                reason = " ".join(str(cause).split())[:400]
                _logger.warning(
                    "a checkpoint could not be written, the previous one is kept: %s",
                    reason,
                    extra=ONCE,
                )
            return False
        return True

    def close(self, limit_s: float | None = None) -> None:
        """Wait for the write in progress.

        Args:
            limit_s: time after which the write is given up, for use after an error: the write
                waits for all ranks, and one of them may be lost. None: no limit.
        """
        if self._pending is not None and limit_s is not None:
            wait_for_futures([self._pending], limit_s)
            if not self._pending.done():
                return
        self.finish()

    def newest(self) -> dict[str, Any] | None:
        """Return the state (`step`, ...) of the newest intact checkpoint, or None.

        Damaged checkpoints are skipped with a warning.
        """
        return broadcast_from_rank0(self._newest_valid() if current_rank() == 0 else None)

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Read the checkpoint of `step` into `tensors`, in place.

        Rank 0 reads the tensors that are equal on all ranks and sends them to the others, and each
        rank reads its own part of sharded ones. If every rank read them itself, N ranks would open
        each of the N files several times.

        Raises:
            RunFailed: the checkpoint cannot be read.
        """
        folder = self.folder / f"step_{step}"
        replicated = {k: v for k, v in tensors.items() if not isinstance(v, DTensor)}
        sharded: dict[str, Tensor] = {k: v for k, v in tensors.items() if isinstance(v, DTensor)}
        if replicated:
            share_from_rank0(partial(_load_tensors, folder, replicated, is_collective=False))
            if dist.is_initialized():
                for name in sorted(replicated):
                    _broadcast_in_place(replicated[name])
        if sharded:
            _load_tensors(folder, sharded, is_collective=dist.is_initialized())

    def _write(
        self, staging: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Write a checkpoint into `staging`, then rename it. Runs on the writer's thread."""
        try:
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(staging), save_distributed=True),
                # The plan is the same for every checkpoint of a run. Without a cache rank 0 would
                # receive and compare the plans of all ranks each time, beside the training.
                planner=DefaultSavePlanner(enable_plan_caching=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
            # On rank 0 dcp.save returns when every rank has written its shards.
            if current_rank() == 0:
                self._publish(staging, self.folder / f"step_{step}", state)
                self._remove_old()
        except BaseException:
            if current_rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _publish(self, staging: Path, final: Path, state: dict[str, Any]) -> None:
        """Add state and manifest, sync all files to the disk, and rename the folder."""
        (staging / STATE).write_text(json.dumps(state), encoding="utf-8")
        sums = {path.name: file_sha256(path) for path in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(
            json.dumps({"schema": SCHEMA, "sha256": sums}, indent=1), encoding="utf-8"
        )
        # Before the rename, so that a published checkpoint is complete even after a power failure.
        for path in [*staging.iterdir(), staging]:
            _sync_to_disk(path)
        # A run that resumed from an older checkpoint writes the same step again.
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        _sync_to_disk(self.folder)

    def _remove_old(self) -> None:
        for step in self._list_steps()[: -self.keep_last]:
            shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)

    def _list_steps(self) -> list[int]:
        steps: list[int] = []
        for path in self.folder.glob("step_*"):
            number = path.name.removeprefix("step_")
            # isdecimal() alone also accepts digits of other scripts.
            if number.isascii() and number.isdecimal():
                steps.append(int(number))
        return sorted(steps)

    def _newest_valid(self) -> dict[str, Any] | None:
        for step in reversed(self._list_steps()):
            folder = self.folder / f"step_{step}"
            problem = validate_checkpoint(folder)
            if not problem:
                return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
            _logger.warning("%s is skipped: %s", folder, problem)
        return None


class _SharedMetadataReader(HuggingFaceStorageReader):
    """Reads the headers of all files on rank 0 only; the other ranks receive the result."""

    def read_metadata(self) -> Metadata:
        metadata: Metadata = share_from_rank0(self._read_on_rank0)
        return metadata

    def _read_on_rank0(self) -> Metadata:
        try:
            return super().read_metadata()
        # Raised on all ranks, so that none waits for rank 0.
        except Exception as error:
            raise RunFailed(f"{self.path}: {error}") from error


def _load_tensors(folder: Path, tensors: dict[str, Tensor], *, is_collective: bool) -> None:
    """Read a checkpoint into `tensors`, in place; on all ranks together if `is_collective`."""
    reader_type = _SharedMetadataReader if is_collective else HuggingFaceStorageReader
    try:
        dcp.load(tensors, storage_reader=reader_type(str(folder)), no_dist=not is_collective)
    except CheckpointException as error:
        raise RunFailed(
            f"{folder} cannot be loaded: {_first_cause(error)}; remove it to continue from an "
            "earlier checkpoint"
        ) from error


def _broadcast_in_place(tensor: Tensor) -> None:
    """Replace a tensor by that of rank 0. A collective call."""
    # A collective call needs contiguous memory; channels-last weights are not.
    data = tensor.detach()
    received = data.contiguous()
    dist.broadcast(received, src=0)
    if received.data_ptr() != data.data_ptr():
        data.copy_(received)


def validate_checkpoint(folder: Path) -> str:
    """Return what is wrong with a checkpoint folder; empty if it is intact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return f"this version cannot read schema {manifest['schema']}"
        if STATE not in manifest["sha256"]:
            return f"{STATE} is missing from its manifest"
        for name, expected in manifest["sha256"].items():
            # Only the last part: a damaged manifest must not name files outside the folder.
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if file_sha256(path) != expected:
                return f"{name} does not match its checksum"
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["step"] != int(folder.name.removeprefix("step_")):
            return f"{STATE} is of another step"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {error}"
    return ""


def _start_thread(action: Callable[[], None]) -> "Future[None]":
    """Run `action` on a thread.

    A daemon, unlike the threads of an executor: after an error the process must be able to exit
    although a write waits for a lost rank.
    """
    result: Future[None] = Future()
    # A new thread uses GPU 0 by default, so each rank of a node would allocate memory there.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            action()
        # The caller of `result()` raises it, of any type.
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)

    threading.Thread(target=run, name="liverseg-checkpoint", daemon=True).start()
    return result


def _first_cause(error: BaseException) -> BaseException:
    """Return the original error of the first rank that failed, which torch wraps."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
