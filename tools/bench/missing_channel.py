"""What a missing channel costs: a network of CT and MR without one of them, against networks of one.

  OMP_NUM_THREADS=1 python tools/bench/missing_channel.py OUT --seeds 0 1 --dropout 0.5

Phantoms of the same patients as CT, MR, and both (aligned); benign lesions look like tumours in one
of the channels. One network is trained on CT, one on MR, and one on both with
`train.modality_dropout`, all with equal settings and steps. The latter predicts each test scan from
CT, from MR, and from both. Prints one JSON line per prediction, then a table of Dice (mean over the
test scans that have the structure, and over seeds). `cost` is how much lower the network of both is
than the network of that channel alone, in points of 0.01. One CPU core; about 15 CPU minutes.
"""

import argparse
import json
import statistics
from pathlib import Path

from phantom_runs import add_arguments, convert, make_phantom, read_cpu_s, score, train

from liverseg_dist.streams import guard_output_streams
from liverseg_dist.tracking.terminal_table import print_table

MODALITIES = ("CT", "MR")
STRUCTURES = ("liver", "tumour", "spleen", "kidney_right", "kidney_left")
Found = dict[tuple[str, str], list[dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, steps=600)
    parser.add_argument("--dropout", type=float, default=0.5, help="train.modality_dropout (0.5)")
    args = parser.parse_intermixed_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    trained, tested = make_sets(out, args.cases, args.test_cases)
    stores = {name: convert(out, name, source) for name, source in trained.items()}
    found: Found = {}
    for seed in args.seeds:
        for name, store in stores.items():
            overrides, run_name = list(args.overrides), name
            if name == "both":
                overrides.append(f"train.modality_dropout={args.dropout}")
                run_name = f"both_{args.dropout}"
            run = train(out, run_name, store, seed, args.steps, overrides)
            inputs = (*MODALITIES, "both") if name == "both" else (name,)
            for given in inputs:
                dice = score(
                    out, given, run, name_scans(tested[given], given), find_truth(tested, given)
                )
                found.setdefault((name, given), []).append(dice)
                shown = {structure: round(value, 4) for structure, value in dice.items()}
                line = {"bench": "missing_channel", "network": run_name, "input": given}
                line |= {"seed": seed, "steps": args.steps, "cpu_s": read_cpu_s(run)}
                print(json.dumps(line | {"dice": shown}), flush=True)
    print_costs(found)


def make_sets(out: Path, cases: int, test_cases: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """Make training and test sets of the same patients as CT, MR, and both."""
    trained, tested = {}, {}
    for name in (*MODALITIES, "both"):
        kind = ("--modality", "ct+mr" if name == "both" else name.lower(), "--benign-lesions", "3")
        if name == "both":
            kind = (*kind, "--misalignment-mm", "0")
        trained[name] = make_phantom(out, name, cases, 404, *kind)
        tested[name] = make_phantom(out, f"test_{name}", test_cases, 505, *kind)
    return trained, tested


def name_scans(source: Path, given: str) -> list[str]:
    """Arguments of `liverseg predict` for the scans of a test set: one channel, or both."""
    images = source / "imagesTr"
    return [str(images)] if given == "both" else ["--channel", f"{given}={images}"]


def find_truth(tested: dict[str, Path], given: str) -> Path:
    """Folder of the true masks: on the grid of the first channel that is given."""
    return tested[given] / "labelsTr"


def print_costs(found: Found) -> None:
    """Print Dice by input and structure, of the network of that input alone and of both."""
    rows = []
    for given in (*MODALITIES, "both"):
        costs = []
        for structure in STRUCTURES:
            own = average(found, (given, given), structure)
            fused = average(found, ("both", given), structure)
            cost = 100 * (own - fused)
            costs.append(cost)
            # With both channels there is no other network to compare with.
            compared = ("-", "-") if given == "both" else (f"{own:.3f}", f"{cost:+.1f}")
            rows.append((given, structure, compared[0], f"{fused:.3f}", compared[1]))
        if given != "both":
            rows.append((given, "mean", "", "", f"{statistics.mean(costs):+.1f}"))
    print_table(("input", "structure", "trained on it alone", "trained on both", "cost"), rows)


def average(found: Found, key: tuple[str, str], structure: str) -> float:
    return statistics.mean(dice[structure] for dice in found[key])


if __name__ == "__main__":
    guard_output_streams()
    main()
