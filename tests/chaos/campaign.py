"""A run that is struck again and again: by which line it is started, when it is struck, what must come of it."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.faults import Fault
from tests.chaos.processes import Hang, Process
from tests.chaos.stages import OURS, PEER_TIMEOUT_S, USUAL_S, Ended, Stage, Undisturbed

PATIENCE_S = 60.0 + 3 * PEER_TIMEOUT_S
"""From the fault, or the last progress after it, to the end of all processes."""
STRIKES = 4
"""On one run."""
TRIES = 3
"""Starts after the last strike until it must be done."""
COLD = 1 / 10
"""Share of the struck processes that start as a user starts them; the others start warm, as far as the stage can."""
WHILE_STARTING = 1 / 6
"""Share of the faults that strike before any work is done."""
BY_SIGNAL = 128
TORCHRUNS = "traceback : Signal"
"""How torchrun tells of a rank that was killed; it ends the others at once, often before they miss it."""


@dataclass
class Report:
    """One fault and what came of it."""

    kind: str
    stage: str
    run: int
    """Number of the run of this stage."""
    at: str = ""
    warm: bool = False
    did: str = ""
    exit_code: int = 0
    ended_after_s: float = 0.0
    said: str = ""
    reached: int = 0
    """Steps (scans, cases) that were done when it struck."""
    steps_lost: int | None = None
    """Of a training: logged, and done again."""
    survived: bool = False
    problem: str = ""
    story: str = ""
    """The end of what it wrote, where it did not survive."""


@dataclass
class StruckRun:
    """Of one stage. Reports are handed to `settled` once the run's result is known."""

    stage: Stage
    usual: Undisturbed
    settled: Callable[[Report], None]
    others: frozenset[int] = frozenset()
    """Processes of ours that are not the stage's."""
    _number: int = 0
    _strikes: int = 0
    _open: list[Report] = field(default_factory=list)

    def strike(self, fault: Fault, chance: random.Random) -> None:
        """Start the run, or start it again, and strike. What is then done is checked, and the next run begun."""
        report = Report(fault.kind, self.stage.name, self._number)
        try:
            process = self._run_until_moment(fault, chance, report)
            self._open.append(report)
            report.reached = self.stage.done()
            report.did = fault.strike(process, self.stage, chance)
            ended = self.stage.wait(process, PATIENCE_S, self.others)
            _note_lost(ended, self._open[:-1])
            report.exit_code, report.ended_after_s, report.said = (
                ended.exit_code,
                round(ended.seconds, 1),
                ended.last_words,
            )
            if fault.met_when_run_again and ended.exit_code:
                ended = self._run()
                report.exit_code, report.said = ended.exit_code, ended.last_words
            report.problem = _silence(fault, ended)
            report.story = ended.err[-3000:] if report.problem else ""
            fault.heal(self.stage)
        except Hang as error:
            report.problem = f"hang: {error}"
            if report not in self._open:
                self._open.append(report)
            fault.heal(self.stage)
            self._settle("")
            return
        self._strikes += 1
        if ended.exit_code == 0:
            self._settle(self._difference())
        elif self._strikes == STRIKES or self.stage.done() >= self.usual.total:
            self.finish()

    def finish(self) -> None:
        """Run to the end, undisturbed, and check the result."""
        if not self._open:
            return
        try:
            for _ in range(TRIES):
                ended = self._run()
                if ended.exit_code == 0:
                    self._settle(self._difference())
                    return
            self._settle(
                f"exit code {ended.exit_code} when run again: {ended.last_words}", ended.err
            )
        except Hang as error:
            self._settle(f"hang when run again: {error}")

    def _run_until_moment(self, fault: Fault, chance: random.Random, report: Report) -> Process:
        for attempt in range(TRIES):
            if self._strikes == 0:
                self.stage.fresh()
                self._number += 1
                report.run = self._number
            target, delay_s = (
                self._moment(chance) if attempt < TRIES - 1 else (0, 0.1 * self.usual.start_s)
            )
            environment = fault.environment(self.stage)
            last_try = (
                attempt == TRIES - 1
            )  # cold: a warm start may be over before it can be struck
            report.warm = (
                self.stage.can_be_warm
                and not environment
                and chance.random() > COLD
                and not last_try
            )
            process = self.stage.start(report.warm, **environment)
            if _reach(process, self.stage, target, delay_s):
                report.at = (
                    f"{delay_s:.1f} s after {target} of {self.usual.total}"
                    if target
                    else f"{delay_s:.1f} s"
                )
                return process
            self._settle_early(self.stage.wait(process, PATIENCE_S, self.others))
        raise AssertionError(f"{self.stage.name} is done before it can be struck")

    def _moment(self, chance: random.Random) -> tuple[int, float]:
        """Work done, and seconds from then on."""
        usual, done = self.usual, self.stage.done()
        if chance.random() < WHILE_STARTING:
            return 0, chance.uniform(0, usual.start_s)
        share = chance.random() / (STRIKES - self._strikes)
        target = min(usual.total, done + 1 + int(share * (usual.total - done)))
        return target, chance.uniform(0, usual.close_s if target == usual.total else usual.each_s)

    def _settle_early(self, ended: Ended) -> None:
        """The run came to its end before it could be struck."""
        _note_lost(ended, self._open)
        if ended.exit_code == 0:
            self._settle(self._difference())
        else:
            self._settle(
                f"exit code {ended.exit_code} when run again: {ended.last_words}", ended.err
            )

    def _run(self) -> Ended:
        ended = self.stage.wait(self.stage.start(self.stage.can_be_warm), USUAL_S, self.others)
        _note_lost(ended, self._open)
        return ended

    def _difference(self) -> str:
        try:
            same = self.stage.result() == self.usual.result
        except (OSError, ValueError, KeyError) as error:
            return f"no result to compare: {error}"
        return "" if same else "another result than the undisturbed one"

    def _settle(self, problem: str, story: str = "") -> None:
        for report in self._open:
            report.story = report.story or story[-3000:]
            report.problem = report.problem or problem
            report.survived = not report.problem
            self.settled(report)
        self._open, self._strikes = [], 0


def _reach(process: Process, stage: Stage, target: int, delay_s: float) -> bool:
    """Wait for so much work and so many seconds more; False when the process has ended before."""
    give_up = time.monotonic() + USUAL_S
    while (
        target and stage.done() < target and process.poll() is None and time.monotonic() < give_up
    ):
        time.sleep(0.02)
    end = time.monotonic() + delay_s
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    return process.poll() is None


def _note_lost(ended: Ended, reports: list[Report]) -> None:
    """Where a start says that it continues tells what the strikes before it have cost."""
    if found := re.search(r"^continues at step (\d+)", ended.out, re.MULTILINE):
        for report in reports:
            if report.steps_lost is None:
                report.steps_lost = max(0, report.reached - int(found[1]))


def _silence(fault: Fault, ended: Ended) -> str:
    """What is wrong with the last line of a command that failed by itself; killed ones say nothing."""
    if not fault.says or not 0 < ended.exit_code < BY_SIGNAL:
        return ""
    if ended.last_words.startswith((*OURS, TORCHRUNS)) and re.search(fault.says, ended.last_words):
        return ""
    return f"its last line does not name the cause: {ended.last_words[:200]}"
