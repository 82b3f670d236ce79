"""Check a store: every checksum, chunk, piece of metadata, split and audit entry. Exit code 1 if anything is wrong.

  liverseg verify store.zarr
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from liverseg_dist.data.store import CaseStore
from liverseg_dist.data.verify import verify_store
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED
from liverseg_dist.tracking.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="a folder written by liverseg convert")


def run(args: argparse.Namespace) -> dict[str, Any]:
    cases = len(CaseStore.open(args.store).case_ids)
    with progress("verify", cases) as line:
        damage = verify_store(args.store, lambda case_id: line.advance(note=case_id))
    for item in damage:
        print(f"liverseg: {item}", file=sys.stderr)
    if damage:
        named = sorted({item.case_id for item in damage if item.case_id})
        print(f"{args.store}: {len(damage)} findings; remove cases/<case> of {', '.join(named)} and convert again")
    else:
        print(f"{args.store}: {cases} cases, every checksum right")
    return {
        "store": str(args.store),
        "cases": cases,
        "damage": [item.__dict__ for item in damage],
        "exit_code": EXIT_FAILED if damage else EXIT_DONE,
    }
