"""Damaged inputs, thousands a minute: each must be read rightly or refused in one clear line.

  tools/fuzz                              12,000 inputs over all targets
  tools/fuzz --inputs 500 --target nifti  500 of one target; --seed N for others than before
  tools/fuzz --replay OUT/failures/nifti-17 --target nifti

An input is a pure function of target, seed and number. It is read in a process with a wall (RLIMIT_AS) and an alarm; a
second process sees crashes and hangs of the first. Inputs that fail are kept below --out. Prints a table.
"""

import argparse
import json
import math
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

from liverseg_dist.streams import guard_output_streams
from tests.fuzz.judge import FAILURES, PATIENCE_S, Verdict, judge, wall
from tests.fuzz.targets import PLACES, Target, target

SHARES = {"nifti": 4, "store": 2, "index": 2, "config": 2, "streams": 0.02}
"""Of the inputs; 1 for all others."""
SILENCE_S = 8 * PATIENCE_S
"""Of a worker, on a busy machine."""
START_S = 900.0
"""For imports, and to make what is whole."""
OUTCOMES = ("accepted", "refused", *FAILURES, "crash")


def one(target: Target, folder: Path, seed: int, number: int) -> Verdict:
    """Make input `number` in `folder`, which is made anew, and judge it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.make(folder, Random(f"{target.name} {seed} {number}"))
    return judge(target.check, folder)


def work(name: str, out: Path, seed: int, first: int, last: int) -> None:
    """In a process of its own: a line for each input as it is begun, and one for its verdict."""
    ready = out / "ready" / name
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir(parents=True)
    chosen = target(name, ready)
    one(chosen, out / "inputs" / name, seed, first)  # what is imported late is here before the wall
    wall()
    for number in range(first, last):
        print(json.dumps({"begun": number}), flush=True)
        verdict = one(chosen, out / "inputs" / name, seed, number)
        if verdict.failed:
            keep(out, name, number)
        print(json.dumps({"number": number, **verdict.__dict__}), flush=True)


def campaign(name: str, out: Path, seed: int, count: int) -> Iterator[tuple[int, Verdict]]:
    """Verdicts of inputs 0 to count - 1; a worker that dies or falls silent is replaced."""
    first = 0
    while first < count:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.run",
            "--worker",
            name,
            str(seed),
            str(first),
            str(count),
        ]
        with subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            for number, verdict in _verdicts(process, out, name, first):
                yield number, verdict
                first = number + 1


def _verdicts(
    process: subprocess.Popen[bytes], out: Path, name: str, first: int
) -> Iterator[tuple[int, Verdict]]:
    assert process.stdout is not None
    assert process.stderr is not None
    begun, buffer, said = first - 1, b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        patience = START_S
        while selector.get_map():
            ready = selector.select(patience)
            if not ready:
                process.kill()
                if begun < first:
                    raise SystemExit(f"tools/fuzz: the worker did not begin within {START_S:g} s")
                keep(out, name, begun)
                yield begun, Verdict("hang", f"silent for {patience:g} s")
                return
            for key, _ in ready:
                part = key.fileobj.read1(1 << 16)  # type: ignore[union-attr]
                if not part:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said = (said + part)[-4000:]
                else:
                    buffer += part
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                record = json.loads(line)
                if "begun" in record:
                    begun, patience = record["begun"], SILENCE_S
                else:
                    begun = -1
                    yield record["number"], Verdict(record["outcome"], record["detail"])
    code = process.wait()
    if code:
        if begun < first:
            raise SystemExit(
                f"tools/fuzz: the worker could not begin:\n{said.decode(errors='replace')}"
            )
        keep(out, name, begun)
        yield begun, Verdict("crash", f"exit code {code}: {said.decode(errors='replace')[-500:]}")


def keep(out: Path, name: str, number: int) -> None:
    kept = out / "failures" / f"{name}-{number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(out / "inputs" / name, kept, symlinks=True)


def table(counts: dict[str, Counter[str]], seconds: dict[str, float]) -> str:
    lines = [
        "| input | tried | " + " | ".join(OUTCOMES) + " | a second |",
        "|---|" + "--:|" * (len(OUTCOMES) + 2),
    ]
    for name, counter in counts.items():
        tried = sum(counter.values())
        cells = " | ".join(str(counter[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {name} | {tried:,} | {cells} | {tried / max(0.1, seconds[name]):.0f} |")
    total: Counter[str] = sum(counts.values(), Counter())
    lines.append(
        f"| **all** | {total.total():,} | " + " | ".join(str(total[o]) for o in OUTCOMES) + " | |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inputs", type=int, default=12_000, metavar="N", help="over all chosen targets"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", action="append", choices=sorted(PLACES), help="repeatable; default: all"
    )
    parser.add_argument(
        "--out", type=Path, help="default: a new folder below the temporary folder, kept"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FOLDER",
        help="judge one kept input again, without the walls",
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="liverseg-fuzz-"))
    if args.worker:
        work(args.worker[0], out, *map(int, args.worker[1:]))
        return 0
    names = args.target or list(PLACES)
    if args.replay:
        chosen = target(names[0], Path(tempfile.mkdtemp()))
        copy = Path(shutil.copytree(args.replay, Path(tempfile.mkdtemp()) / "input", symlinks=True))
        chosen.check(copy)
        print("accepted")
        return 0
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    seconds: dict[str, float] = defaultdict(float)
    shares = sum(SHARES.get(name, 1) for name in names)
    for name in names:
        begun = time.monotonic()
        for number, verdict in campaign(
            name, out, args.seed, math.ceil(args.inputs * SHARES.get(name, 1) / shares)
        ):
            counts[name][verdict.outcome] += 1
            if verdict.failed or verdict.outcome == "crash":
                print(
                    f"{name}-{number} {verdict.outcome}: {verdict.detail}",
                    file=sys.stderr,
                    flush=True,
                )
        seconds[name] = time.monotonic() - begun
    print(f"{table(counts, seconds)}\n\nseed {args.seed}; failures, if any: {out / 'failures'}")
    return 1 if any(counter[o] for counter in counts.values() for o in (*FAILURES, "crash")) else 0


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
