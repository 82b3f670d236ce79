"""Check a store: checksums, chunks, metadata, splits and audit entries. Exit code 1 if anything is wrong.

liverseg verify store.zarr
"""

import argparse
from typing import Any

from liverseg_dist.console import write_error, write_lines
from liverseg_dist.data.store.layout import CASES
from liverseg_dist.data.store.verify_store import verify_store
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.progress import show_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", type=path_argument, metavar="STORE", help="a folder written by liverseg convert"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    checked = 0
    with show_progress("verify", sum(1 for _ in (args.store / CASES).glob("*/"))) as line:

        def count_case(case_id: str) -> None:
            nonlocal checked
            checked += 1
            line.advance(note=case_id)

        damage = verify_store(args.store, count_case)
    for item in damage:
        write_error(item)
    named = sorted({item.case_id for item in damage if item.case_id})
    if named:
        verdict = (
            f"{len(damage)} findings; remove {CASES}/<case> of {', '.join(named)} and convert again"
        )
    elif damage:
        verdict = f"{len(damage)} findings; convert again, which writes what is missing"
    else:
        verdict = f"{checked} cases, all checksums are correct"
    write_lines(f"{args.store}: {verdict}")
    return {
        "store": str(args.store),
        "cases": checked,
        "damage": [item.__dict__ for item in damage],
        "exit_code": EXIT_FAILED if damage else EXIT_DONE,
    }
