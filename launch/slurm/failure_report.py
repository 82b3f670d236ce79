"""How a job's ranks ended, read from what they and srun said: finished, stopped, lost, or who failed first and why.

When one rank dies its peers die of the broken connection a moment later, often with the longer traceback. The verdict
names the rank that failed on its own account. Pure text in, text out.
"""

import re
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE

LAST_WORDS = 60
"""Lines kept of each rank."""
LABEL = re.compile(r"^\s*(?P<rank>\d+): (?P<text>.*)$")
DEATH = re.compile(
    r"^liverseg rank (?P<rank>\d+) on (?P<node>\S+) (?P<how>was killed by (?P<signal>\w+)|ended with exit code "
    r"(?P<code>\d+)); peak memory (?P<gib>[\d.]+) GiB"
)
"""From launch.slurm.rank."""
EXIT = re.compile(r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<ranks>[\d,-]+): (?P<what>.+)$")
NODE_FAILURE = re.compile(r"Node failure on (?P<node>[\w.,\[\]-]+)")
OWN_ERROR = re.compile(r"^(Traceback \(most recent call last\)|liverseg: )")
CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused)|closed by peer|Broken pipe|connectFullMesh failed|DistNetworkError|"
    r"remote process exit|Watchdog caught collective operation timeout|Heartbeat monitor timed out|"
    r"Timed out waiting \d+ms for (recv|send)|client socket has (failed|timed out)|TCPStore.*(failed|timed out)"
)
"""What a healthy rank says when another one, a node or the network is gone."""
OUT_OF_MEMORY = re.compile(r"(slurmstepd|srun).*(oom[-_]kill|Out Of Memory)", re.IGNORECASE)
OVER_LIMIT = re.compile(
    r"slurmstepd-(?P<node>[^:\s]+): error: \S+ exceeded memory limit \((?P<took>\d+) > (?P<limit>\d+)\)"
)
"""SLURM that watches memory by itself kills every rank of the step, and this line alone says whose node it was."""
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
STOP_CODES = tuple(128 + number for number in STOP_SIGNALS)
KILLED = 128 + signal.SIGKILL


class Kind(Enum):
    DONE = "done"
    STOPPED = "stopped"
    """Asked to stop, and saved."""
    INTERRUPTED = "interrupted"
    """Ended by a signal before it could save."""
    LOST = "lost"
    """A node or the network went; no rank is at fault."""
    FAILED = "failed"


@dataclass(frozen=True)
class RankExit:
    """How one rank ended. `code`: its exit code, or 128 + the signal's number, as a shell has it."""

    rank: int
    node: str
    code: int
    peak_gib: float | None = None

    @property
    def told(self) -> str:
        if self.code < 128:
            return f"rank {self.rank} on {self.node} ended with exit code {self.code}"
        memory = "" if self.peak_gib is None else f" at {self.peak_gib:.2f} GiB"
        hint = "; most often that is memory: ask for more (--mem)" if self.code == KILLED else ""
        return f"rank {self.rank} on {self.node} was killed by {signal.Signals(self.code - 128).name}{memory}{hint}"


@dataclass(frozen=True)
class FailureReport:
    kind: Kind
    exit_code: int
    story: str = "done"
    evidence: tuple[str, ...] = ()
    """The last words of the rank in question, for the end of the log."""


@dataclass
class LogReader:
    """Feed it each line of srun's output; ask it for the verdict."""

    ranks_per_task: int = 1
    """Under torchrun an srun task is a node with several ranks, and lines are labelled by node."""
    deaths: dict[int, RankExit] = field(default_factory=dict)
    """By rank, in the order in which they became known."""
    task_deaths: dict[int, RankExit] = field(default_factory=dict)
    """srun's word on its tasks, by their number (in each, that of its first rank); a rank's own word counts more."""
    last_words: dict[int, deque[str]] = field(default_factory=dict)
    lost_nodes: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """srun's other errors, such as a step that could not be created."""
    out_of_memory: bool = False
    over_limit: re.Match[str] | None = None

    def feed(self, line: str) -> None:
        line = line.rstrip("\n")
        self.out_of_memory = self.out_of_memory or bool(OUT_OF_MEMORY.search(line))
        self.over_limit = self.over_limit or OVER_LIMIT.search(line)
        if match := EXIT.match(line):
            for rank in expand_index_ranges(match["ranks"]):
                first = rank * self.ranks_per_task
                self.task_deaths.setdefault(
                    rank, RankExit(first, match["node"], exit_code(match["what"]))
                )
        elif match := NODE_FAILURE.search(line):
            self.lost_nodes.append(match["node"])
        elif line.startswith("srun: error: "):
            self.complaints.append(line.removeprefix("srun: error: "))
        else:
            self._hear(line)

    def _hear(self, line: str) -> None:
        match = LABEL.match(line)
        rank, text = (int(match["rank"]), match["text"]) if match else (0, line)
        if death := DEATH.match(text):
            code = 128 + signal.Signals[death["signal"]] if death["signal"] else int(death["code"])
            own = RankExit(int(death["rank"]), death["node"], code, float(death["gib"]))
            self.deaths.setdefault(own.rank, own)
            return
        self.last_words.setdefault(rank, deque(maxlen=LAST_WORDS)).append(text)

    def verdict(self, returncode: int, saved_and_stopped: bool = False) -> FailureReport:
        """`saved_and_stopped`: the run's folder says so (under torchrun exit codes do not get through)."""
        if returncode == 0:
            return FailureReport(Kind.DONE, 0)
        told = {**self.task_deaths, **self.deaths}
        if (
            saved_and_stopped
            or returncode == EXIT_RESUMABLE
            or any(d.code == EXIT_RESUMABLE for d in told.values())
        ):
            return FailureReport(Kind.STOPPED, EXIT_RESUMABLE, "stopped on request, all is saved")
        if self.over_limit:
            return FailureReport(Kind.FAILED, KILLED, self._memory_story(self.over_limit))
        if culprit := self._culprit():
            memory = (
                "out of memory, says SLURM: "
                if self.out_of_memory and culprit.code == KILLED
                else ""
            )
            return FailureReport(
                Kind.FAILED,
                culprit.code,
                f"first failure: {memory}{culprit.told}",
                self.words(culprit.rank),
            )
        if self.lost_nodes:
            return FailureReport(
                Kind.LOST, EXIT_FAILED, f"node {', '.join(self.lost_nodes)} went away"
            )
        lost = [death for death in self.deaths.values() if death.code not in STOP_CODES]
        if lost:
            story = "ranks lost each other and none says why: a node or the network went away"
            return FailureReport(Kind.LOST, EXIT_FAILED, story, self.words(lost[0].rank))
        if told or returncode in STOP_CODES or -returncode in STOP_SIGNALS:
            return FailureReport(
                Kind.INTERRUPTED, EXIT_RESUMABLE, "ended by a signal before it could save"
            )
        said = self.complaints[0] if self.complaints else f"ended with exit code {returncode}"
        return FailureReport(
            Kind.FAILED, returncode if returncode > 0 else 128 - returncode, said, self.words(0)
        )

    def _memory_story(self, said: re.Match[str]) -> str:
        node = said["node"]
        ranks = sorted(rank for rank, death in self.task_deaths.items() if death.node == node)
        who = (
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {node}"
            if ranks
            else node
        )
        took_gib, limit_gib = (int(said[key]) / 2**30 for key in ("took", "limit"))
        return (
            f"first failure: out of memory, says SLURM: {who} took {took_gib:.2f} of the {limit_gib:.2f} GiB per node "
            "that the job asked for; ask for more (--mem-gib, #SBATCH --mem)"
        )

    def _culprit(self) -> RankExit | None:
        """The first that ended on its own account. srun's word alone counts only where no rank could speak."""
        if self.out_of_memory:
            killed = [
                d for d in (*self.deaths.values(), *self.task_deaths.values()) if d.code == KILLED
            ]
            if killed:
                return killed[0]
        speechless = {} if self.deaths or self.lost_nodes else self.task_deaths
        for death in (*self.deaths.values(), *speechless.values()):
            if death.code not in STOP_CODES and not self._is_consequence(death.rank):
                return death
        return None

    def _is_consequence(self, rank: int) -> bool:
        words = self._of(rank)
        start = next((i for i, text in enumerate(words) if OWN_ERROR.match(text)), len(words))
        return any(CONSEQUENCE.search(text) for text in words[start:])

    def words(self, rank: int) -> tuple[str, ...]:
        """What the rank said from its first error on, or its last lines."""
        words = self._of(rank)
        start = next(
            (i for i, text in enumerate(words) if OWN_ERROR.match(text)), max(0, len(words) - 5)
        )
        return tuple(f"  {rank}: {text}" for text in words[start:])

    def _of(self, rank: int) -> list[str]:
        return list(self.last_words.get(rank // self.ranks_per_task, ()))


def exit_code(what: str) -> int:
    """srun's words as a shell's exit code: `Exited with exit code 3` -> 3, `Killed` -> 137."""
    if match := re.search(r"exit code (\d+)", what):
        return int(match[1])
    plain = what.removesuffix(" (core dumped)")
    return next((128 + s for s in signal.valid_signals() if signal.strsignal(s) == plain), KILLED)


def expand_index_ranges(ranks: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5)."""
    found: list[int] = []
    for part in ranks.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def ranks_by_node(nodes: Sequence[str], tasks_per_node: str) -> dict[str, str]:
    """Which ranks sit on which node in srun's block order: (["a", "b"], "2(x2)") -> {"a": "0-1", "b": "2-3"}."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        number, _, repeat = part.partition("(x")
        counts += [int(number)] * int(repeat.rstrip(")") or 1)
    placed, first = {}, 0
    for node, count in zip(nodes, counts, strict=False):
        placed[node] = f"{first}-{first + count - 1}" if count > 1 else str(first)
        first += count
    return placed
