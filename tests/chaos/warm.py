"""Programs that start warm: forked from a process that has imported everything, instead of importing for seconds.

`python -m MODULE ...` and the ranks that torchrun starts run as they would, in sessions and with files of their own;
what a cold start does besides (the interpreter's own start, imports) is left out. An eighth of the processor time.
"""

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

IMPORTED = (
    "torch.distributed.run", "liverseg_dist.commands.train", "liverseg_dist.commands.evaluate",
    "liverseg_dist.commands.convert", "torch.utils.tensorboard",
)  # fmt: skip
_CLONE_NEWNET, _CAPBSET_DROP, _CAPABILITY_VERSION = 0x40000000, 24, 0x20080522
_CAPABILITIES = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root's right to pass over permissions."""


class Forked:
    """As much of `subprocess.Popen` as torchrun and the campaign use."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = True,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for number, stream in ((1, stdout), (2, stderr)):
                    if stream is not None:
                        os.dup2(stream.fileno(), number)
                code = _run(args, env, prepare)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 0.0)
            time.sleep(0.02)
        return code


def get_warm() -> None:
    """From here on this process's children start warm, and their children."""
    for name in IMPORTED:
        importlib.import_module(name)
    subprocess_handler.Popen = Forked  # type: ignore[misc,assignment]
    context = multiprocessing.get_context  # a fork server would be one more cold start
    multiprocessing.get_context = lambda method=None: context(
        "fork" if method == "forkserver" else method
    )


def network_of_its_own() -> None:
    """For `prepare`: a new network namespace with a loopback, and root bound by permissions, as `Stage` has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits of each
    libc.capget(header, sets)
    for capability in _CAPABILITIES:
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
        for number in range(3):
            sets[number] &= ~(1 << capability)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _run(args: Sequence[str], env: Mapping[str, str], prepare: Callable[[], None]) -> int:
    """`args`: PYTHON ... -m MODULE ARGUMENT ..."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(
        3, 4096
    )  # exec would have closed them: a dead parent's connections must not live on here
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    prepare()
    at = args.index("-m")
    sys.argv = [args[at + 1], *args[at + 2 :]]
    try:
        runpy.run_module(args[at + 1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
