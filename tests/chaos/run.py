"""Faults at random moments, one after another: does each command end soon, say why, and go on to the same result?

  tools/chaos                        200 faults, about two hours on two cores
  tools/chaos --faults 20 --seed 4   the same faults for the same seed, on any machine of equal speed
  tools/chaos --stage train --kind network

Every fault begins with a fresh run of its stage, strikes at a random share of an undisturbed run's time, waits for the
end, heals what outlasts the process (a full disk) and runs the same line again until it is done. Survived means: no
hang, the result is that of the undisturbed run to the byte. Prints a table; `chaos.jsonl` keeps each fault. Needs root
(a small file system and a network of its own); nothing outside --out is touched.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from liverseg_dist.commands.main import main as liverseg
from tests.chaos.faults import FAULTS, Fault, small_disk
from tests.chaos.stages import PEER_TIMEOUT_S, STEPS, Hang, Stage, stages, undisturbed, wait

PATIENCE_S = 60 + 3 * PEER_TIMEOUT_S
"""From the fault to the end of the command."""
TRIES = 3


@dataclass
class Report:
    """One fault and what came of it."""

    kind: str
    stage: str
    at_share: float
    did: str = ""
    exit_code: int = 0
    ended_after_s: float = 0.0
    said: str = ""
    steps_lost: int = 0
    restarts: int = 0
    survived: bool = False
    problem: str = ""


def run_fault(fault: Fault, stage: Stage, expected: str, usual_s: float, chance: random.Random) -> Report:
    report = Report(fault.kind, stage.name, round(chance.uniform(0.1, 0.95), 3))
    try:
        process = _strike(fault, stage, usual_s, chance, report)
        reached = steps_done(stage)
        ended = wait(process, PATIENCE_S)
        report.exit_code, report.ended_after_s, report.said = ended.exit_code, round(ended.seconds, 1), ended.last_words
        fault.heal(stage)
        report.steps_lost = max(0, reached - steps_done(stage, checkpoints=True))
        while report.restarts < TRIES and (report.restarts == 0 or ended.exit_code != 0):
            ended = stage.run()
            report.restarts += 1
        if ended.exit_code != 0:
            report.problem = f"exit code {ended.exit_code} when run again: {ended.last_words}"
        elif stage.result() != expected:
            report.problem = "another result than the undisturbed one"
    except Hang as error:
        report.problem = f"hang: {' '.join(str(error).split())[-400:]}"
        fault.heal(stage)
    report.survived = not report.problem
    return report


def _strike(fault: Fault, stage: Stage, usual_s: float, chance: random.Random, report: Report) -> subprocess.Popen[str]:
    """A fresh run, struck at a share of its time; sooner, if the machine is quicker now and it was done by then."""
    while True:
        stage.fresh()
        process = stage.start()
        end = time.monotonic() + report.at_share * usual_s
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            report.did = fault.strike(process, stage, chance)
            return process
        wait(process, PATIENCE_S)
        report.at_share = round(0.8 * report.at_share, 3)


def steps_done(stage: Stage, checkpoints: bool = False) -> int:
    """Of a training: logged, or safe in a checkpoint."""
    if checkpoints:
        return max((int(path.name[5:]) for path in stage.output.glob("checkpoints/step_*")), default=0)
    log = stage.output / "metrics.jsonl"
    if stage.name != "train" or not log.is_file():
        return 0
    lines = log.read_text(errors="replace").splitlines()
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def campaign(out: Path, faults: Sequence[tuple[Fault, str]], seed: int, source: Path) -> list[Report]:
    """Each (fault, stage name) once, in this order."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "ready", ignore_errors=True)
    reports = []
    with small_disk(out / "disk"):
        everything = stages(out, source)
        expected = undisturbed(everything, out / "ready")
        by_name = {stage.name: stage for stage in everything}
        with (out / "chaos.jsonl").open("w") as file:
            for number, (fault, name) in enumerate(faults, 1):
                result, usual_s = expected[name]
                chance = random.Random(f"{seed} {number}")
                report = run_fault(fault, by_name[name], result, usual_s, chance)
                reports.append(report)
                file.write(json.dumps(asdict(report)) + "\n")
                file.flush()
                good = "survived" if report.survived else f"NOT SURVIVED: {report.problem}"
                print(f"{number}/{len(faults)} {name}: {report.did}: {good}", file=sys.stderr, flush=True)
    return reports


def draw(count: int, seed: int, kind: str = "", stage: str = "") -> list[tuple[Fault, str]]:
    """Every combination in turn, in a shuffled order, until there are `count`."""
    pairs = [(fault, name) for fault in FAULTS for name in fault.stages if kind in fault.kind and stage in ("", name)]
    if not pairs:
        raise SystemExit(f"tools/chaos: no such fault; kinds: {', '.join(fault.kind for fault in FAULTS)}")
    chance = random.Random(seed)
    drawn: list[tuple[Fault, str]] = []
    while len(drawn) < count:
        drawn += chance.sample(pairs, len(pairs))
    return drawn[:count]


def table(reports: Sequence[Report]) -> str:
    """Markdown: kinds in rows."""
    lines = [
        "| fault | done to | tried | survived | longest end, s | steps lost, at most |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for kind in dict.fromkeys(report.kind for report in reports):
        ours = [report for report in reports if report.kind == kind]
        names = ", ".join(sorted({report.stage for report in ours}))
        longest = max(report.ended_after_s for report in ours)
        lost = max(report.steps_lost for report in ours)
        survived = sum(report.survived for report in ours)
        lines.append(f"| {kind} | {names} | {len(ours)} | {survived} | {longest:.0f} | {lost} |")
    survived = sum(report.survived for report in reports)
    lines.append(f"| **all** | | {len(reports)} | {survived} | | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds with these words in their name")
    parser.add_argument("--stage", default="", choices=["", "convert", "train", "evaluate"])
    parser.add_argument("--out", type=Path, help="default: a new folder below the temporary folder, kept")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("tools/chaos: filling disks and cutting networks needs root", file=sys.stderr)
        return 2
    out = args.out or Path(tempfile.mkdtemp(prefix="liverseg-chaos-"))
    drawn = draw(args.faults, args.seed, args.kind, args.stage)
    source = out / "Task03_Phantom"
    liverseg(["phantom", str(source), "--cases", "6", "--seed", "3"])
    reports = campaign(out, drawn, args.seed, source)
    print(f"{table(reports)}\n\n{STEPS} steps a training; a checkpoint every 2. Each fault: {out / 'chaos.jsonl'}")
    return 0 if all(report.survived for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
