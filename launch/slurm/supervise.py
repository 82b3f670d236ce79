"""What a batch file runs on its first node: start the ranks, keep the log, and see to it that the job goes on.

  python -m launch.slurm.supervise --run runs/first -- srun --label --kill-on-bad-exit=1 python -m launch.slurm.rank ...

Stopped on request (exit code 75: time limit, preemption, `scancel --signal=USR2`), ended by a signal before it could
save, or cut off by a lost node or network, the job goes back into the queue and continues from its newest checkpoint;
after `--restarts` starts in a row that did not get further it gives up. A failure ends the log with the rank that
failed first, its node and its traceback, and becomes the job's exit code. A cancelled job stays cancelled.
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
from .failure_report import FailureReport, Kind, LogReader, ranks_by_node
from .job_records import (
    JobFolder,
    JobState,
    controller_says,
    expand_hostnames,
    newest_step,
    progress_mark,
    run_status,
)

Answer = TypeVar("Answer")
RESTARTS = 5
LOCAL_AGAIN = 144
"""submitit's local executor starts a job again that ends with this code."""
CONTROLLER_PATIENCE_S = 600.0
"""A controller that is being restarted is asked again for this long."""
END_PATIENCE_S = 120.0
"""After a requeue SLURM ends this process; it waits for that at most this long."""


@dataclass(frozen=True)
class Job:
    """This job as its environment describes it."""

    job_id: str
    """Of an array ARRAY_TASK: the number alone may mean the whole array."""
    name: str
    start: int
    """0 for the first."""
    nodes: tuple[str, ...]
    tasks_per_node: str
    local: bool

    @classmethod
    def from_environment(cls) -> "Job":
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            local = env.get("SUBMITIT_LOCAL_JOB_ID", "local")
            return cls(
                local,
                env.get("LIVERSEG_JOB_NAME", "liverseg"),
                -1,
                (os.uname().nodename,),
                "1",
                True,
            )
        array = env.get("SLURM_ARRAY_JOB_ID")
        job_id = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
        nodes = tuple(expand_hostnames(env["SLURM_JOB_NODELIST"]))
        tasks = env.get("SLURM_TASKS_PER_NODE", "1")
        return cls(
            job_id,
            env.get("SLURM_JOB_NAME", ""),
            int(env.get("SLURM_RESTART_COUNT", "0")),
            nodes,
            tasks,
            False,
        )


@dataclass(frozen=True)
class Folders:
    run: Path | None = None
    """The run, whose status.json and checkpoints tell how far it got."""
    record: Path | None = None
    """Where jobs/ is kept; default: `run`."""
    progress: Path | None = None
    """Where work shows; default: `run`."""


class Supervisor:
    """One start of a job."""

    def __init__(self, job: Job, folders: Folders, restarts: int, ranks_per_task: int = 1) -> None:
        self.job, self.run, self.restarts, self.ranks_per_task = (
            job,
            folders.run,
            restarts,
            ranks_per_task,
        )
        self.progress = folders.progress or folders.run
        record = folders.record or folders.run
        self.folder = JobFolder(record) if record else None
        self.asked = ""
        self._child: subprocess.Popen[str] | None = None
        self._unwritten = 0

    def main(self, command: Sequence[str]) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._forward)
        state = self._begin()
        if state.idle > self.restarts:
            return self._give_up(state)
        before, reader, begun = self._stopped_at(), LogReader(self.ranks_per_task), time.monotonic()
        returncode = self._watch(command, reader)
        after = self._stopped_at()
        verdict = reader.verdict(
            returncode, saved_and_stopped=after is not None and after != before
        )
        for line in verdict.evidence:
            self._write(line + "\n")
        lasted = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - begun))
        self._say(f"after {lasted}: {verdict.story}{self._step('; saved up to step {}')}")
        return self._end(verdict, state)

    def _begin(self) -> JobState:
        """Say where we are, and count restarts that brought nothing."""
        job, mark = self.job, progress_mark(self.progress) if self.progress else 0
        old = self.folder.state(job.job_id) if self.folder else None
        start = (old.starts if old else 0) if job.local else job.start
        if start == 0:
            idle = 0
        elif old is not None:
            idle = 0 if mark > old.mark else old.idle + 1
        else:
            idle = start  # without a folder to remember in, every restart counts
        state = JobState(job.job_id, job.name, start + 1, "running", list(job.nodes), mark, idle)
        self._record(state)
        placed = ranks_by_node(job.nodes, job.tasks_per_node)
        where = ", ".join(
            f"{node} (ranks {ranks})" if "-" in ranks else f"{node}"
            for node, ranks in placed.items()
        )
        self._say(f"{job.name}, start {start + 1} on {where}{self._step('; goes on from step {}')}")
        if idle:
            self._say(f"{idle} of at most {self.restarts} restarts in a row brought no progress")
        return state

    def _watch(self, command: Sequence[str], reader: LogReader) -> int:
        try:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                bufsize=1,
            )
        except OSError as error:
            self._say(f"{command[0]} cannot be started: {error.strerror}")
            return 127
        self._child = child
        assert child.stdout is not None
        for line in child.stdout:
            reader.feed(line)
            self._write(line)
        return child.wait()

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Pass a request to stop on to the ranks. srun is told by USR2 alone: TERM makes it drop the ranks at once."""
        self.asked = signal.Signals(number).name
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM if self.job.local else signal.SIGUSR2)

    def _end(self, verdict: FailureReport, state: JobState) -> int:
        if verdict.kind is Kind.DONE:
            return self._close(state, "done", "", 0)
        if verdict.kind is Kind.FAILED:
            again = self._batch_file()
            self._say(
                f"not requeued, exit code {verdict.exit_code}; when the cause is mended, {again} continues"
            )
            return self._close(state, "failed", verdict.story, verdict.exit_code or EXIT_FAILED)
        if self.job.local:
            return self._again_locally(verdict, state)
        ended_by = self._ended_by_slurm()
        if ended_by:
            self._say(f"{ended_by}; if SLURM starts the job again, it continues")
            return self._close(state, "ended", ended_by, verdict.exit_code)
        idle = (
            state.idle
            if self.progress and progress_mark(self.progress) > state.mark
            else state.idle + 1
        )
        if idle > self.restarts:
            return self._give_up(replace(state, idle=idle))
        return self._requeue(verdict, state)

    def _batch_file(self) -> str:
        """How to submit this again."""
        if self.folder is not None:
            for file in (self.folder.run / f"{self.job.name}.sbatch", self.folder.batch_file):
                if file.exists():
                    return f"sbatch {file}"
        return "the same job, submitted again,"

    def _ended_by_slurm(self) -> str:
        """Why the job must not be requeued from here: it was cancelled, or SLURM is ending this start itself."""
        said = self._controller(lambda: controller_says(self.job.job_id))
        if not said or said.get("Reason") == "TimeLimit" or said.get("JobState") == "RUNNING":
            return ""
        return f"SLURM has ended this start ({said.get('JobState', '?')}: cancelled, preempted or a node lost)"

    def _requeue(self, verdict: FailureReport, state: JobState) -> int:
        self._close(state, "requeued", verdict.story, 0)
        self._say("back into the queue; it continues when SLURM starts it again")
        if not self._controller(self._ask_to_requeue):
            return verdict.exit_code
        time.sleep(END_PATIENCE_S)
        return EXIT_RESUMABLE

    def _ask_to_requeue(self) -> bool:
        done = subprocess.run(
            ["scontrol", "requeue", self.job.job_id], capture_output=True, text=True
        )
        if done.returncode == 0:
            return True
        if "disabled" in done.stderr:
            self._say(
                "requeueing is off for this job (--no-requeue, or JobRequeue=0): submit it again to continue"
            )
            return False
        raise OSError(done.stderr.strip())

    def _controller(self, ask: Callable[[], Answer]) -> Answer | None:
        """The controller's answer; None when it stays silent for longer than a restart takes."""
        end = time.monotonic() + CONTROLLER_PATIENCE_S
        pause_s = 1.0
        while True:
            try:
                return ask()
            except (OSError, subprocess.SubprocessError) as error:
                if time.monotonic() > end:
                    self._say(
                        f"slurmctld has been silent for {CONTROLLER_PATIENCE_S:.0f} s: {error}"
                    )
                    return None
                time.sleep(pause_s)
                pause_s = min(30.0, 2 * pause_s)

    def _again_locally(self, verdict: FailureReport, state: JobState) -> int:
        if self.asked == "SIGTERM":  # `launch cancel`, or the machine goes down
            self._say("stopped; submit it again to continue")
            return self._close(state, "cancelled", verdict.story, EXIT_RESUMABLE)
        self._close(state, "requeued", verdict.story, 0)
        self._say("starts again at once")
        return LOCAL_AGAIN

    def _give_up(self, state: JobState) -> int:
        said = f"gives up: {state.idle} restarts in a row without progress{self._step(' beyond step {}')}"
        self._say(f"{said}; see above for what ended each of them")
        return self._close(state, "failed", said, EXIT_FAILED)

    def _close(self, state: JobState, ending: str, message: str, exit_code: int) -> int:
        self._record(replace(state, state=ending, message=message))
        return exit_code

    def _record(self, state: JobState) -> None:
        if self.folder is None:
            return
        try:
            self.folder.write_state(state)
        except OSError as error:
            self._say(
                f"{self.folder.path} cannot be written ({error.strerror}); going on without a record"
            )

    def _stopped_at(self) -> int | None:
        """When the run's folder was last told that the run stopped on request."""
        if self.run is None or run_status(self.run).get("state") != "stopped":
            return None
        return (self.run / "status.json").stat().st_mtime_ns

    def _step(self, text: str) -> str:
        step = newest_step(self.run) if self.run else 0
        return text.format(step) if step else ""

    def _say(self, text: str) -> None:
        self._write(f"liverseg job {self.job.job_id}: {text}\n")

    def _write(self, text: str) -> None:
        """To the log. A full disk costs lines of the log, not the run."""
        try:
            if self._unwritten:
                _write_all(
                    f"liverseg job {self.job.job_id}: {self._unwritten} lines could not be written here\n"
                )
                self._unwritten = 0
            _write_all(text)
        except OSError:
            self._unwritten += 1


def _write_all(text: str) -> None:
    """Straight to the file: Python's buffer would keep what a full disk refused, and fail again at exit."""
    rest = text.encode()
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.slurm.supervise",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        metavar="DIR",
        help="the run's folder: progress is measured, jobs/ kept",
    )
    parser.add_argument(
        "--record", type=path_argument, metavar="DIR", help="keep jobs/ here instead"
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
        default=RESTARTS,
        metavar="N",
        help=f"give up after N idle restarts ({RESTARTS})",
    )
    parser.add_argument(
        "--ranks-per-task",
        type=int,
        default=1,
        metavar="N",
        help="torchrun's ranks in an srun task (1)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- srun ...")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command; it follows --")
    restrict_umask()
    folders = Folders(args.run, args.record, args.progress)
    return Supervisor(Job.from_environment(), folders, args.restarts, args.ranks_per_task).main(
        command
    )


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
