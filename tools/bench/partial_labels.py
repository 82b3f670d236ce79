"""Partly labelled data: networks of two data sets with different structures, and of both together.

  OMP_NUM_THREADS=1 python tools/bench/partial_labels.py OUT --seeds 0 1

Set A: phantom CTs with liver and tumour annotated. Set B: other phantom CTs with liver, spleen and
kidneys, but not tumours. A+B: `liverseg convert A B STORE`. The three networks are trained with
equal settings and steps and predict scans of a third set, in which everything is annotated
(`liverseg predict`, `liverseg score`). Prints one JSON line per network, then a table of Dice
(mean over the test scans that have the structure, and over seeds); -: the network does not know the
structure. One CPU core; about 20 CPU minutes.
"""

import argparse
import json
import statistics

from phantom_runs import add_arguments, convert, make_phantom, read_cpu_s, score, train

from liverseg_dist.streams import guard_output_streams
from liverseg_dist.tracking.terminal_table import print_table

STRUCTURES = ("liver", "tumour", "spleen", "kidney_right", "kidney_left")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, steps=600)
    args = parser.parse_intermixed_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    lesions = make_phantom(out, "A", args.cases, 101, "--annotate", "liver,tumour")
    organs = make_phantom(out, "B", args.cases, 202, "--annotate", "liver,spleen,kidneys")
    test = make_phantom(out, "test", args.test_cases, 303)
    stores = {
        "A": convert(out, "A", lesions),
        "B": convert(out, "B", organs),
        "A+B": convert(out, "A+B", lesions, organs),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, store in stores.items():
            run = train(out, name, store, seed, args.steps, args.overrides)
            dice = score(out, "test", run, [str(test / "imagesTr")], test / "labelsTr")
            found.setdefault(name, []).append(dice)
            shown = {structure: round(value, 4) for structure, value in dice.items()}
            line = {"bench": "partial_labels", "set": name, "seed": seed, "steps": args.steps}
            print(json.dumps(line | {"cpu_s": read_cpu_s(run), "dice": shown}), flush=True)
    rows = []
    for structure in STRUCTURES:
        row = [structure]
        for results in found.values():
            values = [dice[structure] for dice in results if structure in dice]
            row.append(f"{statistics.mean(values):.3f}" if values else "-")
        rows.append(tuple(row))
    print_table(("structure", *found), rows)


if __name__ == "__main__":
    guard_output_streams()
    main()
