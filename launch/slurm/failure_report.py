"""How the ranks of a job ended, from the output of srun and of the ranks themselves.

The result is one of: done, stopped, interrupted, lost (a node or the network), or failed with the
rank that failed first. When one rank dies, the others fail with a broken connection a moment later,
often with the longer traceback; the report names the rank whose error is not such a consequence.
The module only handles text, so that logs of real jobs can test it.
"""

import re
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE

KEPT_LINES = 60
"""The last lines that are kept of each rank."""
EVIDENCE_LINES = 5
"""Lines shown of a rank that printed no error."""
LABEL = re.compile(r"^\s*(?P<rank>\d+): (?P<text>.*)$")
RANK_EXIT = re.compile(
    r"^liverseg rank (?P<rank>\d+) on (?P<node>\S+) "
    r"(was killed by (?P<signal>\w+)|ended with exit code (?P<code>\d+)); "
    r"peak memory (?P<gib>[\d.]+) GiB"
)
"""A line of launch.slurm.rank."""
TASK_EXIT = re.compile(
    r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<ending>.+)$"
)
NODE_FAILURE = re.compile(r"Node failure on (?P<node>[\w.,\[\]-]+)")
OWN_ERROR = re.compile(r"^(Traceback \(most recent call last\)|liverseg: )")
CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused)|closed by peer|Broken pipe|connectFullMesh failed|"
    r"DistNetworkError|remote process exit|Watchdog caught collective operation timeout|"
    r"Heartbeat monitor timed out|Timed out waiting \d+ms for (recv|send)|"
    r"client socket has (failed|timed out)|TCPStore.*(failed|timed out)"
)
"""Errors of a healthy rank after the loss of another rank, a node or the network."""
OUT_OF_MEMORY = re.compile(r"(slurmstepd|srun).*(oom[-_]kill|Out Of Memory)", re.IGNORECASE)
OVER_LIMIT = re.compile(
    r"slurmstepd-(?P<node>[^:\s]+): error: \S+ exceeded memory limit "
    r"\((?P<used>\d+) > (?P<limit>\d+)\)"
)
"""If SLURM itself enforces the memory limit, it kills every rank of the step; only this line names
the node that exceeded it."""
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
STOP_CODES = tuple(128 + number for number in STOP_SIGNALS)
KILLED = 128 + signal.SIGKILL


class Outcome(Enum):
    """The ways in which a job ends."""

    DONE = "done"
    STOPPED = "stopped"
    """Stopped on request, after saving."""
    INTERRUPTED = "interrupted"
    """Ended by a signal before it could save."""
    LOST = "lost"
    """A node or the network failed, no rank."""
    FAILED = "failed"


@dataclass(frozen=True)
class RankExit:
    """How one rank ended."""

    rank: int
    node: str
    code: int
    """The exit code, or 128 + the number of the signal, as in a shell."""
    peak_gib: float | None = None

    @property
    def description(self) -> str:
        """One line for the log."""
        where = f"rank {self.rank} on {self.node}"
        if self.code < 128:
            return f"{where} ended with exit code {self.code}"
        memory = "" if self.peak_gib is None else f" at {self.peak_gib:.2f} GiB"
        hint = ""
        if self.code == KILLED:
            hint = "; the most frequent cause is memory: request more (--mem)"
        return f"{where} was killed by {signal.Signals(self.code - 128).name}{memory}{hint}"


@dataclass(frozen=True)
class FailureReport:
    """The outcome of a job and its reason."""

    outcome: Outcome
    exit_code: int
    summary: str = "done"
    evidence: tuple[str, ...] = ()
    """The last lines of the rank in question, for the end of the log."""


@dataclass
class LogReader:
    """Reads the lines of srun's output and reports how the job ended."""

    ranks_per_task: int = 1
    """Under torchrun an srun task is a node with several ranks, and labels are node numbers."""
    rank_exits: dict[int, RankExit] = field(default_factory=dict)
    """By rank, in the order in which the ranks reported them."""
    task_exits: dict[int, RankExit] = field(default_factory=dict)
    """What srun reported, by task (as the first rank of each). A report of the rank itself has
    precedence, because srun reports per node, late and out of order."""
    kept_lines: dict[int, deque[str]] = field(default_factory=dict)
    """The last lines, by label."""
    lost_nodes: list[str] = field(default_factory=list)
    srun_errors: list[str] = field(default_factory=list)
    """Other errors of srun, such as a step that could not be created."""
    out_of_memory: bool = False
    over_limit: re.Match[str] | None = None

    def read_line(self, line: str) -> None:
        """Read the next line of the output."""
        line = line.rstrip("\n")
        self.out_of_memory = self.out_of_memory or bool(OUT_OF_MEMORY.search(line))
        self.over_limit = self.over_limit or OVER_LIMIT.search(line)
        if match := TASK_EXIT.match(line):
            code = parse_exit_code(match["ending"])
            for task in expand_index_ranges(match["tasks"]):
                first_rank = task * self.ranks_per_task
                self.task_exits.setdefault(task, RankExit(first_rank, match["node"], code))
        elif match := NODE_FAILURE.search(line):
            self.lost_nodes.append(match["node"])
        elif line.startswith("srun: error: "):
            self.srun_errors.append(line.removeprefix("srun: error: "))
        else:
            self._read_rank_line(line)

    def _read_rank_line(self, line: str) -> None:
        """Keep a line of a rank, or the report of its end."""
        # Without --label (one task) all lines are those of rank 0.
        match = LABEL.match(line)
        label, text = (int(match["rank"]), match["text"]) if match else (0, line)
        ended = RANK_EXIT.match(text)
        if ended is None:
            self.kept_lines.setdefault(label, deque(maxlen=KEPT_LINES)).append(text)
            return
        code = 128 + signal.Signals[ended["signal"]] if ended["signal"] else int(ended["code"])
        rank = int(ended["rank"])
        self.rank_exits.setdefault(rank, RankExit(rank, ended["node"], code, float(ended["gib"])))

    def build_report(self, returncode: int, saved_and_stopped: bool = False) -> FailureReport:
        """How the job ended.

        Args:
            returncode: The return code of srun.
            saved_and_stopped: Whether the folder of the run reports a stop on request. Under
                torchrun the exit codes of the ranks do not reach srun.
        """
        if returncode == 0:
            return FailureReport(Outcome.DONE, 0)
        if saved_and_stopped or self._has_resumable_exit(returncode):
            return FailureReport(
                Outcome.STOPPED, EXIT_RESUMABLE, "stopped on request, all is saved"
            )
        # Before the ranks are examined: SLURM has killed all of them for one node.
        if self.over_limit:
            summary = self._describe_over_limit(self.over_limit)
            return FailureReport(Outcome.FAILED, KILLED, summary)
        if first := self._find_first_failure():
            is_memory = self.out_of_memory and first.code == KILLED
            cause = "out of memory according to SLURM: " if is_memory else ""
            summary = f"first failure: {cause}{first.description}"
            return FailureReport(Outcome.FAILED, first.code, summary, self._evidence_of(first.rank))
        if self.lost_nodes:
            summary = f"node {', '.join(self.lost_nodes)} went away"
            return FailureReport(Outcome.LOST, EXIT_FAILED, summary)
        # Ranks that a stop signal ended are no evidence of a lost connection.
        lost = [ended for ended in self.rank_exits.values() if ended.code not in STOP_CODES]
        if lost:
            summary = (
                "ranks lost their connections and none reports a cause: "
                "a node or the network went away"
            )
            evidence = self._evidence_of(lost[0].rank)
            return FailureReport(Outcome.LOST, EXIT_FAILED, summary, evidence)
        is_signal = returncode in STOP_CODES or -returncode in STOP_SIGNALS
        if self.task_exits or self.rank_exits or is_signal:
            summary = "ended by a signal before it could save"
            return FailureReport(Outcome.INTERRUPTED, EXIT_RESUMABLE, summary)
        summary = self.srun_errors[0] if self.srun_errors else f"ended with exit code {returncode}"
        # subprocess returns a signal as a negative number.
        code = returncode if returncode > 0 else 128 - returncode
        return FailureReport(Outcome.FAILED, code, summary, self._evidence_of(0))

    def _has_resumable_exit(self, returncode: int) -> bool:
        """Whether srun or any rank ended with the code of a stop on request."""
        exits = {**self.task_exits, **self.rank_exits}
        codes = [returncode, *(ended.code for ended in exits.values())]
        return EXIT_RESUMABLE in codes

    def _describe_over_limit(self, match: re.Match[str]) -> str:
        """Which ranks of which node exceeded the memory limit, and by how much."""
        node = match["node"]
        ranks = sorted(rank for rank, ended in self.task_exits.items() if ended.node == node)
        where = node
        if ranks:
            plural = "s" if len(ranks) > 1 else ""
            where = f"rank{plural} {', '.join(map(str, ranks))} on {node}"
        used_gib, limit_gib = int(match["used"]) / 2**30, int(match["limit"]) / 2**30
        return (
            f"first failure: out of memory according to SLURM: {where} used {used_gib:.2f} of the "
            f"{limit_gib:.2f} GiB per node that the job requested; "
            "request more (--mem-gib, #SBATCH --mem)"
        )

    def _find_first_failure(self) -> RankExit | None:
        """The first rank whose end was not a consequence of another failure."""
        if self.out_of_memory:
            for ended in (*self.rank_exits.values(), *self.task_exits.values()):
                if ended.code == KILLED:
                    return ended
        candidates = list(self.rank_exits.values())
        # srun alone is believed only if no rank could report, and no node was lost.
        if not self.rank_exits and not self.lost_nodes:
            candidates = list(self.task_exits.values())
        for ended in candidates:
            if ended.code not in STOP_CODES and not self._is_consequence(ended.rank):
                return ended
        return None

    def _is_consequence(self, rank: int) -> bool:
        """Whether the error of a rank is a lost connection."""
        lines = self._lines_of(rank)
        start = _find_own_error(lines)
        if start is None:
            return False
        return any(CONSEQUENCE.search(text) for text in lines[start:])

    def _evidence_of(self, rank: int) -> tuple[str, ...]:
        """The lines of a rank from its first error on, or its last lines."""
        lines = self._lines_of(rank)
        start = _find_own_error(lines)
        if start is None:
            start = max(0, len(lines) - EVIDENCE_LINES)
        return tuple(f"  {rank}: {text}" for text in lines[start:])

    def _lines_of(self, rank: int) -> list[str]:
        return list(self.kept_lines.get(rank // self.ranks_per_task, ()))


def _find_own_error(lines: Sequence[str]) -> int | None:
    """The index of the first line that begins an error."""
    for number, text in enumerate(lines):
        if OWN_ERROR.match(text):
            return number
    return None


def parse_exit_code(ending: str) -> int:
    """The exit code of a shell: `Exited with exit code 3` -> 3, `Killed` -> 137."""
    if match := re.search(r"exit code (\d+)", ending):
        return int(match[1])
    description = ending.removesuffix(" (core dumped)")
    for number in signal.valid_signals():
        if signal.strsignal(number) == description:
            return 128 + number
    return KILLED


def expand_index_ranges(ranges: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5)."""
    found: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def list_ranks_by_node(nodes: Sequence[str], tasks_per_node: str) -> dict[str, str]:
    """The ranks of each node in srun's block order.

    Args:
        nodes: Host names.
        tasks_per_node: SLURM_TASKS_PER_NODE, e.g. `2(x2),1`.

    Returns:
        Host name -> range of ranks: (["a", "b"], "2(x2)") -> {"a": "0-1", "b": "2-3"}.
    """
    placed, first = {}, 0
    for node, count in zip(nodes, _expand_counts(tasks_per_node), strict=False):
        placed[node] = f"{first}-{first + count - 1}" if count > 1 else str(first)
        first += count
    return placed


def _expand_counts(tasks_per_node: str) -> Iterator[int]:
    """`2(x2),1` -> 2, 2, 1."""
    for part in tasks_per_node.split(","):
        number, _, repeat = part.partition("(x")
        for _ in range(int(repeat.rstrip(")") or 1)):
            yield int(number)
