"""Timeouts and ends of process groups: a failed rank must never wait for the others.

A regular end of a process group is a collective operation: NCCL's `destroy_process_group` waits for
the work of all ranks and can hang if one of them has failed. So after an error the groups are
aborted, which closes their connections at once, and every call here has a time limit. The calls
that may block run on daemon threads: a blocked one cannot keep the process alive.

`abort_process_groups` was run with gloo on torch 2.13; NCCL uses the same call (ncclCommAbort).
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

ABORT_LIMIT_S = 5.0
DESTROY_LIMIT_S = 30.0
NCCL_MARGIN_S = 60.0
"""NCCL's own watchdog ends the process without a reason for the user. It waits this much longer
than `HeartbeatMonitor`, which reports the reason."""
_logger = logging.getLogger(__name__)


def set_collective_timeout(timeout_s: float) -> None:
    """Set how long later collective calls wait for a rank, in all process groups of this process.

    No communication. Calls in progress keep their timeout. All ranks should call it at the same
    place of the program.

    Args:
        timeout_s: seconds for gloo; NCCL waits `NCCL_MARGIN_S` longer.
    """
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        for device, extra_s in (("cpu", 0.0), ("cuda", NCCL_MARGIN_S)):
            # A group has no backend for a device that it does not serve.
            with suppress(RuntimeError):
                backend = group._get_backend(torch.device(device))
                backend._set_default_timeout(timedelta(seconds=timeout_s + extra_s))


def abort_process_groups(limit_s: float = ABORT_LIMIT_S) -> None:
    """Close the connections of all process groups without waiting for other ranks.

    The other ranks get an error in the collective call that they are in.

    Args:
        limit_s: time after which the function returns although the abort has not ended.
    """
    if dist.is_initialized():
        _call_within(distributed_c10d._abort_process_group, limit_s, "aborting")


def destroy_process_groups(limit_s: float = DESTROY_LIMIT_S) -> None:
    """End all process groups after successful work. Does not raise, and returns within `limit_s`.

    With an open group some ranks abort at interpreter exit, and the job would count as failed
    although its work is done.
    """
    if dist.is_initialized():
        _call_within(dist.destroy_process_group, limit_s, "closing")


def exit_after(limit_s: float, exit_code: int) -> threading.Timer:
    """End this process after `limit_s` if it still runs then, without any clean-up.

    Used after the reason of a failure is printed: no teardown (a reader that hangs in a file
    system, a GPU that does not answer) may delay the end of the job.

    Returns:
        The timer; `cancel()` it if the process shall go on.
    """

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            # The main thread may hold the stream's lock, and the stream may be closed.
            flushing = threading.Thread(target=_flush_quietly, args=(stream,), daemon=True)
            flushing.start()
            flushing.join(timeout=1)
        os._exit(exit_code)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    return timer


def _flush_quietly(stream: object) -> None:
    with suppress(OSError, ValueError, AttributeError):
        stream.flush()  # type: ignore[attr-defined]


def _call_within(action: Callable[[], None], limit_s: float, what: str) -> None:
    """Run `action` on a daemon thread and wait for it, but not longer than `limit_s`."""
    # A new thread uses GPU 0 by default.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            action()
        # The work has ended or failed already: an error of the teardown must not hide that.
        except Exception as error:
            _logger.debug("%s the process groups: %s", what, error)

    thread = threading.Thread(target=run, name="liverseg-teardown", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        _logger.warning(
            "%s the connections to the other ranks takes longer than %.0f s; the process ends "
            "without waiting for it",
            what,
            limit_s,
        )
