"""Faults, one after another: does each command end soon, say why, and go on to the same result?

  tools/chaos                        every kind on every stage it is meant for, in turn, 200 faults
  tools/chaos --faults 20 --seed 4   the same faults in the same order for the same seed
  tools/chaos --stage train --kind network

A run of a stage is struck up to four times. Each time it is started by the same line, struck at a random moment (once
in six while it starts, else a random time after a random step, scan or case), and must end within a stated time; what
outlasts the process (a full disk) is undone. After the last strike it runs to its end. Survived means: no hang, nothing
left running, the last line names the cause, and the result is that of an undisturbed run to the byte; a wrong result
counts against all faults of its run. Prints a table; `chaos.jsonl` keeps each fault. Needs root (a small file system
and networks of its own); nothing outside --out is touched.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from liverseg_dist.streams import guard_output_streams
from tests.chaos.campaign import Report, StruckRun
from tests.chaos.damage import TOO_EARLY, small_disk
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.processes import descendants, kill, orphans_are_ours
from tests.chaos.stages import CHECKPOINT_EVERY, ROOT, STEPS, stages, undisturbed
from tests.chaos.strikes import NOBODY
from tests.chaos.warm import get_warm

NEEDS = {
    "convert": (),
    "train": ("convert",),
    "train on two nodes": ("convert",),
    "tune": ("convert",),
}
"""Stage -> those whose undisturbed results it reads; `evaluate` reads both."""


def campaign(
    out: Path, faults: Sequence[tuple[Fault, str]], seed: int, source: Path
) -> list[Report]:
    """Each (fault, stage name) once, in this order."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "ready").mkdir(exist_ok=True)
    wanted = {name for _, name in faults}
    wanted |= {need for name in wanted for need in NEEDS.get(name, ("convert", "train"))}
    get_warm()
    others = frozenset(descendants(os.getpid()))
    reports: list[Report] = []
    with ExitStack() as stack:
        stack.enter_context(small_disk(out / "disk"))
        stack.enter_context(orphans_are_ours())
        file = stack.enter_context((out / "chaos.jsonl").open("w"))

        def settled(report: Report) -> None:
            reports.append(report)
            file.write(json.dumps(asdict(report)) + "\n")
            file.flush()
            good = "survived" if report.survived else f"NOT SURVIVED: {report.problem}"
            print(
                f"{len(reports)}/{len(faults)} {report.stage}: {report.did}: {good}",
                file=sys.stderr,
                flush=True,
            )

        runs = {
            stage.name: StruckRun(stage, undisturbed(stage, out / "ready", others), settled, others)
            for stage in stages(out, source)
            if stage.name in wanted
        }
        stack.callback(kill, others)
        for number, (fault, name) in enumerate(faults, 1):
            runs[name].strike(fault, random.Random(f"{seed} {number}"))
        for run in runs.values():
            run.finish()
    return reports


SHORT = (
    ("disk full", "train"),
    ("network cut in mid-step", "train"),
)
"""For CI: what no other test does. Both strike one stage, so that one undisturbed run suffices."""


def draw(
    count: int, seed: int, kind: str = "", only: Sequence[str] = ()
) -> list[tuple[Fault, str]]:
    """Every combination in turn, in a shuffled order, until there are `count`."""
    possible = [fault for fault in FAULTS if fault.possible and kind in fault.kind]
    pairs = [
        (fault, name) for fault in possible for name in fault.stages if not only or name in only
    ]
    if not pairs:
        raise SystemExit(
            f"tools/chaos: no such fault; kinds: {', '.join(fault.kind for fault in FAULTS)}"
        )
    chance = random.Random(seed)
    drawn: list[tuple[Fault, str]] = []
    while len(drawn) < count:
        drawn += chance.sample(pairs, len(pairs))
        pairs = [(fault, name) for fault, name in pairs if not fault.once]
    return drawn[:count]


def table(reports: Sequence[Report]) -> str:
    """Markdown: kinds in rows. What found nothing to do its harm to counts as what it was: a kill, or nothing."""
    reports = [
        replace(report, kind="kill -9 of all") if report.did.startswith(TOO_EARLY) else report
        for report in reports
        if not report.did.startswith(NOBODY)
    ]
    lines = [
        "| fault | done to | tried | survived | longest end, s | steps lost, median | at most |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for kind in dict.fromkeys(report.kind for report in reports):
        ours = [report for report in reports if report.kind == kind]
        names = ", ".join(sorted({report.stage for report in ours}))
        longest = max(report.ended_after_s + _waited_s(report) for report in ours)
        lost = sorted(report.steps_lost for report in ours if report.steps_lost is not None)
        survived = sum(report.survived for report in ours)
        steps = f"{lost[len(lost) // 2]} | {lost[-1]}" if lost else "- | -"
        lines.append(f"| {kind} | {names} | {len(ours)} | {survived} | {longest:.0f} | {steps} |")
    survived = sum(report.survived for report in reports)
    lines.append(f"| **all** | | {len(reports)} | {survived} | | | |")
    return "\n".join(lines)


def _waited_s(report: Report) -> float:
    """What passed while the fault itself waited for the ranks' end."""
    found = re.search(r"its ranks ended after (\d+) s", report.did)
    return float(found[1]) if found else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds with these words in their name")
    parser.add_argument(
        "--stage", action="append", default=[], choices=["convert", "train", "train on two nodes", "evaluate", "tune"],
        help="only this one; repeatable",
    )  # fmt: skip
    parser.add_argument("--short", action="store_true", help=f"{len(SHORT)} faults, as in CI")
    parser.add_argument(
        "--out", type=Path, help="default: a new folder below the temporary folder, kept"
    )
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="FILE", help="only the table of these chaos.jsonl"
    )
    args = parser.parse_args()
    if args.table:
        print(
            table(
                [
                    Report(**json.loads(line))
                    for file in args.table
                    for line in file.read_text().splitlines()
                ]
            )
        )
        return 0
    if os.geteuid() != 0:
        print("tools/chaos: filling disks and cutting networks needs root", file=sys.stderr)
        return 2
    for fault in FAULTS:
        if not fault.possible:
            print(
                f"tools/chaos: left out: {fault.kind} (apt-get install faketime)", file=sys.stderr
            )
    out = args.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    kinds = {fault.kind: fault for fault in FAULTS}
    drawn = draw(args.faults, args.seed, args.kind, args.stage)
    if args.short:
        drawn = [(kinds[kind], stage) for kind, stage in SHORT]
    source = out / "Task03_Phantom"
    phantom = [
        sys.executable,
        "-m",
        "liverseg_dist",
        "phantom",
        str(source),
        "--cases",
        "6",
        "--seed",
        "3",
    ]
    if not (source / "dataset.json").is_file():
        subprocess.run(phantom, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    reports = campaign(out, drawn, args.seed, source)
    print(
        f"{table(reports)}\n\n{STEPS} steps a training, a checkpoint every {CHECKPOINT_EVERY}. {out / 'chaos.jsonl'}"
    )
    return 0 if all(report.survived for report in reports) else 1


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
