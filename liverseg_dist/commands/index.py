"""Add the loading index to a store: training then opens a case with one read instead of eight files.

liverseg index store.zarr

`liverseg convert` writes the index itself. Stores of earlier versions, and read-only stores, work
without it: the samples are the same, only slower to find with thousands of cases.
"""

import argparse
from typing import Any

from liverseg_dist.console import write_error, write_lines
from liverseg_dist.data.loading.index_writer import add_index
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import INDEX_FILE
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError, printable
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.progress import show_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", type=path_argument, metavar="STORE", help="a folder written by liverseg convert"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    store = CaseStore.open(args.store)
    with show_progress("index", len(store.case_ids)) as line:
        try:
            left_out = add_index(store, lambda case_id: line.advance(note=case_id))
        except OSError as error:
            raise UserError(
                f"{args.store}: the index cannot be written ({error.strerror}); training works "
                "without it, or make the index in a copy that can be written"
            ) from None
    for case_id, reason in left_out.items():
        write_error(printable(f"case {case_id}: {reason}; see liverseg verify"))
    size = (args.store / INDEX_FILE).stat().st_size
    indexed = len(store.case_ids) - len(left_out)
    write_lines(f"{args.store / INDEX_FILE}: {indexed} cases, {size / 2**20:.1f} MiB")
    return {
        "store": str(args.store),
        "bytes": size,
        "left_out": left_out,
        "exit_code": EXIT_FAILED if left_out else EXIT_DONE,
    }
