"""Runs on the first node of a job: starts the ranks, keeps the log, and requeues the job.

  python -m launch.slurm.supervise --run runs/first -- \\
      srun --label --kill-on-bad-exit=1 python -m launch.slurm.rank ...

The job is requeued, and continues from its newest checkpoint, after a stop on request (exit code
75: time limit, preemption, `scancel --signal=USR2`), after a signal that ended it before it could
save, and after the loss of a node or the network. After more than `--restarts` restarts in a row
without progress it is not requeued. After a failure the log ends with the rank that failed first,
its node and its traceback, and the job ends with the exit code of this rank. A cancelled job is not
requeued.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE
from liverseg_dist.files import restrict_umask
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.paths import path_argument

from .. import PACKAGE, name_programs
from .current_job import CurrentJob
from .failure_report import FailureReport, LogReader, Outcome, list_ranks_by_node
from .job_records import (
    JobRecords,
    JobState,
    find_newest_step,
    measure_progress,
    query_job,
    read_run_status,
)
from .sbatch import DEFAULT_RESTARTS

Answer = TypeVar("Answer")
EXIT_CANNOT_START = 127
"""A shell's exit code for a command that cannot be started."""
EXIT_LOCAL_RESTART = 144
"""submitit's local executor starts a job again that ends with this code."""
CONTROLLER_TIMEOUT_S = 600.0
"""How long a controller that does not answer is queried again; it may be restarting."""
REQUEUE_TIMEOUT_S = 120.0
"""SLURM ends this process after a requeue; it waits for that at most this long."""


@dataclass(frozen=True)
class SupervisedFolders:
    """The folders that the supervisor reads and writes."""

    run: Path | None = None
    """The run; its status.json and checkpoints show the steps."""
    record: Path | None = None
    """The folder that has jobs/; default: `run`."""
    progress: Path | None = None
    """The folder whose content measures progress; default: `run`."""


class Supervisor:
    """Supervises one start of a job."""

    def __init__(
        self,
        job: CurrentJob,
        folders: SupervisedFolders,
        restarts: int,
        ranks_per_task: int = 1,
    ) -> None:
        """Prepare the supervision.

        Args:
            job: The job of this process.
            folders: Its folders.
            restarts: Requeue at most this often in a row without progress.
            ranks_per_task: Ranks of each srun task (more than one under torchrun).
        """
        self.job = job
        self.run_dir = folders.run
        self.restarts = restarts
        self.ranks_per_task = ranks_per_task
        self.progress = folders.progress or folders.run
        record = folders.record or folders.run
        self.records = JobRecords(record) if record else None
        self.received_signal = ""
        self._child: subprocess.Popen[str] | None = None
        self._unwritten_lines = 0

    def run(self, command: Sequence[str]) -> int:
        """Run the command to its end; returns the exit code of the job."""
        # Before the ranks start, so that no request is lost.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._forward_signal)
        state = self._start()
        if state.idle > self.restarts:
            return self._give_up(state)
        reader = LogReader(self.ranks_per_task)
        stopped_before, begun = self._read_stop_time(), time.monotonic()
        returncode = self._run_command(command, reader)
        stopped = self._read_stop_time()
        report = reader.build_report(
            returncode, saved_and_stopped=stopped is not None and stopped != stopped_before
        )
        for line in report.evidence:
            self._write(line + "\n")
        duration = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - begun))
        step = self._format_step("; saved up to step {}")
        self._log(f"after {duration}: {report.summary}{step}")
        return self._handle_exit(report, state)

    def _start(self) -> JobState:
        """Log this start, and count the restarts without progress."""
        job = self.job
        progress = measure_progress(self.progress) if self.progress else 0
        last = self.records.read_state(job.job_id) if self.records else None
        start = job.start
        if job.is_local:
            start = last.starts if last else 0
        if start == 0:
            idle = 0
        elif last is not None:
            idle = 0 if progress > last.mark else last.idle + 1
        else:
            idle = start  # without a record of the last start, every restart counts
        state = JobState(
            job.job_id, job.name, start + 1, "running", list(job.nodes), progress, idle
        )
        self._write_state(state)
        places = []
        for node, ranks in list_ranks_by_node(job.nodes, job.tasks_per_node).items():
            places.append(f"{node} (ranks {ranks})" if "-" in ranks else node)
        step = self._format_step("; continues from step {}")
        self._log(f"{job.name}, start {start + 1} on {', '.join(places)}{step}")
        if idle:
            self._log(f"{idle} of at most {self.restarts} restarts in a row made no progress")
        return state

    def _run_command(self, command: Sequence[str], reader: LogReader) -> int:
        """Run srun, copy its output to the log, and return its return code."""
        try:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # A rank may print bytes that are not UTF-8.
                errors="replace",
                # Line by line: the log must show the newest line of a running job.
                bufsize=1,
            )
        except OSError as error:
            self._log(f"{command[0]} cannot be started: {error.strerror}")
            return EXIT_CANNOT_START
        self._child = child
        assert child.stdout is not None
        for line in child.stdout:
            reader.read_line(line)
            self._write(line)
        return child.wait()

    def _forward_signal(self, number: int, _frame: FrameType | None) -> None:
        """Forward a request to stop to the ranks."""
        self.received_signal = signal.Signals(number).name
        if self._child is not None and self._child.poll() is None:
            # srun gets USR2 only: after TERM it leaves the ranks at once.
            self._child.send_signal(signal.SIGTERM if self.job.is_local else signal.SIGUSR2)

    def _handle_exit(self, report: FailureReport, state: JobState) -> int:
        """Requeue the job, or end it; returns the exit code."""
        if report.outcome is Outcome.DONE:
            return self._finalize(state, "done", "", 0)
        if report.outcome is Outcome.FAILED:
            self._log(
                f"not requeued, exit code {report.exit_code}; "
                f"fix the cause, then {self._describe_resubmission()} continues"
            )
            return self._finalize(state, "failed", report.summary, report.exit_code or EXIT_FAILED)
        if self.job.is_local:
            return self._restart_locally(report, state)
        ended_by = self._find_end_by_slurm()
        if ended_by:
            self._log(f"{ended_by}; if SLURM starts the job again, it continues")
            return self._finalize(state, "ended", ended_by, report.exit_code)
        idle = state.idle + 1
        if self.progress and measure_progress(self.progress) > state.mark:
            idle = state.idle
        # A job that never saves would be requeued for ever.
        if idle > self.restarts:
            return self._give_up(replace(state, idle=idle))
        return self._requeue(report, state)

    def _describe_resubmission(self) -> str:
        """The command that submits this job again."""
        if self.records is not None:
            own_file = self.records.run / f"{self.job.name}.sbatch"
            for file in (own_file, self.records.batch_file):
                if file.exists():
                    return f"sbatch {file}"
        return "the same job, submitted again,"

    def _find_end_by_slurm(self) -> str:
        """Why the job must not be requeued from here; empty if it must be.

        It was cancelled, or SLURM itself is ending this start.
        """
        job = self._query_controller(lambda: query_job(self.job.job_id))
        if not job or job.get("Reason") == "TimeLimit" or job.get("JobState") == "RUNNING":
            return ""
        state = job.get("JobState", "?")
        return f"SLURM has ended this start ({state}: cancelled, preempted or a node lost)"

    def _requeue(self, report: FailureReport, state: JobState) -> int:
        """Return the job to the queue of SLURM."""
        self._finalize(state, "requeued", report.summary, 0)
        self._log("requeued; it continues when SLURM starts it again")
        # The state is written before: SLURM may end this process at once.
        if not self._query_controller(self._request_requeue):
            return report.exit_code
        time.sleep(REQUEUE_TIMEOUT_S)
        return EXIT_RESUMABLE

    def _request_requeue(self) -> bool:
        """Whether SLURM requeues the job. Raises `OSError` if the controller does not answer."""
        done = subprocess.run(
            ["scontrol", "requeue", self.job.job_id], capture_output=True, text=True
        )
        if done.returncode == 0:
            return True
        # Another attempt would have the same result.
        if "disabled" in done.stderr:
            self._log(
                "requeueing is disabled for this job (--no-requeue, or JobRequeue=0): "
                "submit it again to continue"
            )
            return False
        raise OSError(done.stderr.strip())

    def _query_controller(self, query: Callable[[], Answer]) -> Answer | None:
        """Repeat a query until it succeeds.

        Returns:
            The answer; None if there is none for longer than the controller needs to restart.
        """
        end = time.monotonic() + CONTROLLER_TIMEOUT_S
        pause_s = 1.0
        while True:
            try:
                return query()
            except (OSError, subprocess.SubprocessError) as error:
                if time.monotonic() > end:
                    self._log(
                        f"slurmctld has not answered for {CONTROLLER_TIMEOUT_S:.0f} s: {error}"
                    )
                    return None
                time.sleep(pause_s)
                pause_s = min(30.0, 2 * pause_s)

    def _restart_locally(self, report: FailureReport, state: JobState) -> int:
        """Start the job again on this machine, except after a request to end it."""
        # SIGTERM comes from `launch cancel`, or when the machine shuts down.
        if self.received_signal == "SIGTERM":
            self._log("stopped; submit it again to continue")
            return self._finalize(state, "cancelled", report.summary, EXIT_RESUMABLE)
        self._finalize(state, "requeued", report.summary, 0)
        self._log("restarts at once")
        return EXIT_LOCAL_RESTART

    def _give_up(self, state: JobState) -> int:
        """End a job whose restarts make no progress."""
        step = self._format_step(" beyond step {}")
        message = f"not requeued: {state.idle} restarts in a row without progress{step}"
        self._log(f"{message}; the log above has the reason of each end")
        return self._finalize(state, "failed", message, EXIT_FAILED)

    def _finalize(self, state: JobState, ending: str, message: str, exit_code: int) -> int:
        """Write the last state of this start; returns the exit code."""
        self._write_state(replace(state, state=ending, message=message))
        return exit_code

    def _write_state(self, state: JobState) -> None:
        if self.records is None:
            return
        try:
            self.records.write_state(state)
        except OSError as error:
            self._log(
                f"{self.records.path} cannot be written ({error.strerror}); "
                "the job continues without a record"
            )

    def _read_stop_time(self) -> int | None:
        """When the run last reported a stop on request, in ns; None if its state is another."""
        if self.run_dir is None or read_run_status(self.run_dir).get("state") != "stopped":
            return None
        # The time distinguishes this stop from that of an earlier start.
        return (self.run_dir / "status.json").stat().st_mtime_ns

    def _format_step(self, text: str) -> str:
        """The text with the step of the newest checkpoint; empty without one."""
        step = find_newest_step(self.run_dir) if self.run_dir else 0
        return text.format(step) if step else ""

    def _log(self, text: str) -> None:
        self._write(f"liverseg job {self.job.job_id}: {text}\n")

    def _write(self, text: str) -> None:
        """Write to the log. A full disk costs lines of the log, but does not end the run."""
        try:
            if self._unwritten_lines:
                _write_unbuffered(
                    f"liverseg job {self.job.job_id}: "
                    f"{self._unwritten_lines} lines could not be written here\n"
                )
                self._unwritten_lines = 0
            _write_unbuffered(text)
        except OSError:
            self._unwritten_lines += 1


def _write_unbuffered(text: str) -> None:
    """Write to stdout without Python's buffer.

    The buffer would keep what a full disk refused, and fail again when the process exits.
    """
    rest = text.encode()
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.slurm.supervise",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        metavar="DIR",
        help="the folder of the run: measures progress and has jobs/",
    )
    parser.add_argument(
        "--record", type=path_argument, metavar="DIR", help="write jobs/ here instead"
    )
    parser.add_argument(
        "--progress",
        type=path_argument,
        metavar="DIR",
        help="measure progress here instead, e.g. in a store",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help=f"stop requeueing after N restarts without progress ({DEFAULT_RESTARTS})",
    )
    parser.add_argument(
        "--ranks-per-task",
        type=int,
        default=1,
        metavar="N",
        help="ranks of torchrun in an srun task (1)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- srun ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the supervisor; returns the exit code of the job."""
    parser = build_parser()
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command; it follows --")
    restrict_umask()
    folders = SupervisedFolders(args.run, args.record, args.progress)
    job = CurrentJob.from_environment()
    return Supervisor(job, folders, args.restarts, args.ranks_per_task).run(command)


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
