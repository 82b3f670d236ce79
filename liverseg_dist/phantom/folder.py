"""A folder of phantoms: the check before anything is written, and the loop over its cases.

`phantom.json` stores the settings that determine the bytes, so that two kinds of phantom never
share a folder.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from liverseg_dist.errors import UserError
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

T = TypeVar("T")

SETTINGS = "phantom.json"
SCAN_FOLDERS = ("imagesTr", "labelsTr", "imagesTs")


def check_phantom_folder(
    folder: Path, settings: Mapping[str, object], expected: Collection[Path]
) -> None:
    """Check that the folder is new or has phantoms of the same settings. Writes nothing.

    Args:
        folder: the folder.
        settings: content of `phantom.json`.
        expected: scan files of the wanted set.

    Raises:
        UserError: the folder cannot be used.
    """
    mark = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; give a new folder")
    # Without the mark the files can be real data, which must not be overwritten.
    if not mark.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: not empty and not a phantom set; give a new folder, "
                "existing files are not overwritten"
            )
        return
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{mark}: not readable as JSON; give another folder") from None
    if before != settings:
        raise UserError(
            f"{folder}: contains phantoms with the settings {before}, not {settings}; "
            "give another folder"
        )
    found: list[Path] = []
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        found += (folder / name).glob("*.nii*")
    # Scans of an earlier, larger set would stay in the folder, and the index would lack them.
    surplus = sorted(str(file.relative_to(folder)) for file in found if file not in expected)
    if surplus:
        raise UserError(
            f"{folder}: contains {len(surplus)} more scan files than requested ({surplus[0]}); "
            "increase --cases and --test-cases, or give another folder"
        )


def make_cases(
    make_case: Callable[[int], T],
    numbers: Sequence[int],
    workers: int,
    done: Callable[[T], None],
) -> list[T]:
    """Make every case, in this process or in several.

    Args:
        make_case: makes the case of a number; it must be possible to pickle it.
        numbers: numbers of the cases.
        workers: number of processes.
        done: called after each case, in the order in which they end.

    Returns:
        The results in the order of the numbers.
    """
    results: dict[int, T] = {}
    # One worker needs no pool: the start of a process costs time.
    if workers <= 1:
        for number in numbers:
            results[number] = make_case(number)
            done(results[number])
        return [results[number] for number in numbers]
    with worker_pool(workers, get_context("spawn")) as pool:
        with terminal_signals_blocked():
            futures = {pool.submit(make_case, number): number for number in numbers}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done(future.result())
    return [results[number] for number in numbers]
