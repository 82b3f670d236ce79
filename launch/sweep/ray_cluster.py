"""Starts, joins and leaves Ray.

No usage statistics are sent, Ray listens on loopback only, every user has a temporary folder of
their own, and no process or file is left at the end.
"""

import contextlib
import getpass
import importlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# Ray reads these variables when it is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# The sweep prints its own lines, which are more specific than Ray's.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from liverseg_dist.errors import LiversegError, RunFailed, StopRequested, UserError

from .process_guard import guard_processes

OBJECT_STORE_BYTES = 100 << 20
"""Small, because only scores pass through Ray."""
HOW_TO_CONTINUE = "all results are kept, run the same line again to continue"
CHECK_INTERVAL_S = 5.0
SHUTDOWN_TIMEOUT_S = 60.0
"""Time for Ray to return from the block once there is a reason to end, and again to shut down."""
MAX_FOLDER_LENGTH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
"""The path of a Unix socket has at most 107 characters."""
Check = Callable[[], str]
"""Returns the reason to stop using Ray, or an empty text."""


class _Stop(BaseException):
    """A signal, by name. Not an Exception: Tune would count it as a failure of a trial."""


@contextlib.contextmanager
def ray_session(
    address: str | None,
    cpus: int,
    dashboard: bool,
    find_standstill: Check | None = None,
    report_error: Callable[[LiversegError], None] = print,
) -> Iterator[str]:
    """Use a new local Ray, or an existing cluster, during the block.

    No Ray process of this session is left at the end.

    Args:
        address: host:port of an existing cluster; None: start a local Ray.
        cpus: CPUs of a local Ray.
        dashboard: Whether to start the dashboard of a local Ray.
        find_standstill: Called every few seconds; returns why the sweep makes no progress.
        report_error: Prints the error when Ray does not return from the block, or does not shut
            down, in time. The process ends after it.

    Yields:
        The address of the dashboard, or an empty text.

    Raises:
        StopRequested: SIGTERM or Ctrl-C within the block.
        RunFailed: All nodes are lost, or `find_standstill` returned a reason.
    """
    with guard_processes() as report_clean_exit:
        session, stop = "", _StopOnSignal()

        def exit_now() -> None:
            error = stop.error or RunFailed(f"Ray does not shut down; {HOW_TO_CONTINUE}")
            report_clean_exit()
            report_error(error)
            if session:
                shutil.rmtree(session, ignore_errors=True)
            # The process guard ends the processes of Ray that are left.
            os._exit(error.exit_code)

        checks = [_find_lost_nodes]
        if find_standstill is not None:
            checks.append(find_standstill)
        try:
            with _signal_handler(stop):
                context = _join_ray(address) if address else _start_ray(cpus, dashboard)
                session = "" if address else str(context.address_info.get("session_dir") or "")
                # Again, because Ray has set its own handler of SIGTERM.
                with _signal_handler(stop), _run_checks(stop, checks, exit_now):
                    yield str(context.dashboard_url or "")
        except BaseException:
            # An exception of the handler inside Ray's compiled code arrives as a SystemError.
            if stop.error:
                raise stop.error from None
            raise
        finally:
            # A second signal must not interrupt the clean-up.
            with _signal_handler(signal.SIG_IGN), _time_limit(SHUTDOWN_TIMEOUT_S, exit_now):
                ray.shutdown()
                if session:
                    shutil.rmtree(session, ignore_errors=True)


def temp_folder(inside: str = "") -> Path:
    """Ray's temporary folder of this user, created if missing.

    Ray puts Unix sockets into it (or into its folder `inside`), so its path must be short: it is in
    /tmp if TMPDIR is too long.

    Raises:
        UserError: The folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"ray-{getpass.getuser()}"
    if len(str(folder / inside)) > MAX_FOLDER_LENGTH:
        # Safe in /tmp: the mode is 0700, and the owner is checked below.
        folder = Path("/tmp") / folder.name  # nosec B108
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder / inside


def write_token(file: Path) -> None:
    """Write a token for Ray to a new file that only this user can read.

    Raises:
        FileExistsError: The file exists.
    """
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))


def token_environment(token: Path) -> dict[str, str]:
    """The environment of a Ray that requires this token, and of the processes that join it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def ensure_user_token() -> Path:
    """The file with this user's token for Ray, created if missing; only this user can read it."""
    file = temp_folder() / "token"
    if not file.exists():
        # Written under another name first: a second sweep must not read half a token.
        partial = file.with_name(f"token.{os.getpid()}")
        partial.unlink(missing_ok=True)
        write_token(partial)
        with contextlib.suppress(FileExistsError):  # another sweep of this user was faster
            os.link(partial, file)
        partial.unlink()
    return file


def find_token_file() -> str:
    """The file of the token that the Ray of this process requires; empty without one."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    return os.environ.get("RAY_AUTH_TOKEN_PATH", "")


def has_live_nodes() -> bool:
    """Whether any node of the joined cluster is alive."""
    return any(node["Alive"] for node in ray.nodes())


def is_dashboard_installed() -> bool:
    """Whether `ray[default]` is installed; `ray[tune]` alone has no dashboard."""
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError:
        return False
    return True


def _start_ray(cpus: int, dashboard: bool) -> Any:
    """Start a local Ray. Raises `RunFailed`."""
    try:
        return ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard and is_dashboard_installed(),
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temp_folder()),
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # a node that starts too slowly raises a bare Exception
        raise RunFailed(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None


def _join_ray(address: str) -> Any:
    """Join an existing cluster. Raises `UserError`."""
    try:
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None


def _find_lost_nodes() -> str:
    """A check: Tune waits for resources without end when the last node is gone."""
    return "" if has_live_nodes() else "no node of the Ray cluster answers any more"


@contextlib.contextmanager
def _run_checks(
    stop: "_StopOnSignal", checks: Sequence[Check], exit_now: Callable[[], None]
) -> Iterator[None]:
    """Run checks during the block, each in its own thread, as a query of Ray may never return.

    Args:
        stop: Gets the reason of a check; a signal then ends the wait of the main thread.
        checks: The checks.
        exit_now: Called when the main thread does not return from Ray in time.
    """
    main_thread = threading.main_thread().ident or 0
    done, decision = threading.Event(), threading.Lock()

    def repeat_check(check: Check) -> None:
        reason = ""
        while not reason:
            if done.wait(CHECK_INTERVAL_S):
                return
            # Ray itself ends a driver whose control process is gone, so errors do not matter here.
            with contextlib.suppress(Exception):
                reason = check()
        with decision:  # no signal after the end of the block, and no second one
            if stop.reason or stop.signal_name or done.is_set():
                return
            stop.reason = reason
            signal.pthread_kill(main_thread, signal.SIGUSR2)
        if not done.wait(SHUTDOWN_TIMEOUT_S):
            exit_now()

    for check in checks:
        threading.Thread(target=repeat_check, args=(check,), daemon=True).start()
    try:
        yield
    finally:
        with decision:
            done.set()


@contextlib.contextmanager
def _time_limit(seconds: float, on_timeout: Callable[[], None]) -> Iterator[None]:
    """Call a function if the block takes longer."""
    timer = threading.Timer(seconds, on_timeout)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _signal_handler(handler: object) -> Iterator[None]:
    """Handle the signals that ask to stop during the block."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]
    # Under nohup a closed terminal must not end the sweep.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    earlier = {}
    for number in numbers:
        earlier[number] = signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in earlier.items():
            signal.signal(number, old)


class _StopOnSignal:
    """A signal handler that ends the block, and keeps the reason."""

    def __init__(self) -> None:
        self.signal_name = ""
        self.reason = ""
        """Why Ray is not used any further."""

    @property
    def error(self) -> LiversegError | None:
        """The error for the reason, if there is one."""
        if self.reason:
            return RunFailed(f"{self.reason}; {HOW_TO_CONTINUE}")
        if self.signal_name:
            return StopRequested(
                f"stopped by {self.signal_name}; run the same line again to continue"
            )
        return None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        raise _Stop(self.signal_name)
