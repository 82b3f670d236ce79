"""Read the fingerprint of a data set: list its labelled cases, measure them in parallel processes.

Labels and channels are those that `convert` would use. The result can be kept in a file that the
caller names; cases whose files did not change are then taken from it. No other place holds a copy.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

from liverseg_dist.config import ChannelConfig, ConvertConfig
from liverseg_dist.data.io.dataset_index import DatasetIndex, read_dataset
from liverseg_dist.data.io.dataset_json import INDEX_FILE
from liverseg_dist.data.io.structure_files import is_structure_folder
from liverseg_dist.data.label_plan import LabelPlan, plan_labels
from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.files import write_text
from liverseg_dist.planning.fingerprint import CaseFingerprint, DatasetFingerprint
from liverseg_dist.planning.fingerprint_case import CaseResult, LabelledScan, try_case
from liverseg_dist.texts.names import list_some
from liverseg_dist.texts.structured import read_json
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

KIND, SCHEMA = "liverseg fingerprint", 1
MAX_FILE_BYTES = 64 << 20
MIN_READABLE = 0.5
"""A plan from less than half of a data set would be a plan for another data set."""
UNUSABLE = ("image_missing", "label_missing")
"""Codes of findings that leave a case without image or label."""


def is_dataset_folder(path: Path) -> bool:
    """Return whether a path is a raw data set: dataset.json, imagesTr/, or a file per structure."""
    if not path.is_dir():
        return False
    return (
        (path / INDEX_FILE).is_file() or (path / "imagesTr").is_dir() or is_structure_folder(path)
    )


def read_fingerprint(
    folder: Path,
    workers: int = 1,
    cache: Path | None = None,
    convert: ConvertConfig | None = None,
) -> DatasetFingerprint:
    """Measure all labelled cases of a data set; a progress bar shows the work.

    Args:
        folder: The data set, in the layout of the Decathlon or of nnU-Net.
        workers: Number of processes.
        cache: File that keeps the measurements between calls; None: they are not kept.
        convert: Given channels and labels; None: those of `dataset.json`.

    Raises:
        UserError: The folder is not a data set, has no labelled case, or the cache is another file.
        RunFailed: Less than half of the labelled cases can be read.
    """
    convert = convert or ConvertConfig()
    index = read_dataset(folder, convert.channels)
    # The plan must see the labels as conversion will write them.
    labels = plan_labels(index.sources, convert.labels)
    inputs = _describe_inputs(labels, index.channels)
    scans, left_out = [], []
    for case in index.training:
        problem = next((f.message for f in case.findings if f.code in UNUSABLE), None)
        # A file that is listed but missing is a fault; a scan without a label may be intended.
        if problem is not None and _lists_scans(index):
            left_out.append((case.case_id, problem))
        elif problem is None and case.has_label:
            scans.append(LabelledScan(case, labels.mappings[case.source]))
    if not scans and not left_out:
        raise UserError(f"{printable(folder)}: no training case has a label; a plan needs labels")
    # Entries are valid only for the same labels and channels, which `inputs` describes.
    known = _read_cache(cache, inputs) if cache is not None else {}
    cases = []
    for result in _measure_cases(scans, len(index.channels), workers, known):
        if result.fingerprint is not None:
            cases.append(result.fingerprint)
        else:
            left_out.append((result.case_id, result.reason))
    if len(cases) < MIN_READABLE * (len(cases) + len(left_out)):
        name, reason = left_out[0]
        raise RunFailed(
            f"{printable(folder)}: {len(left_out)} of {len(cases) + len(left_out)} labelled scans "
            f"cannot be read, too many for a plan; {printable(name)}: {reason}"
        )
    if cache is not None:
        _write_cache(cache, inputs, cases)
    notes = [note.message for note in index.notes if note.severity == "warning"]
    return DatasetFingerprint(
        index.name, labels.scheme, index.channels, tuple(cases), tuple(left_out), tuple(notes)
    )


def _lists_scans(index: DatasetIndex) -> bool:
    """Return whether dataset.json lists the scans, so that a missing file is a fault."""
    return all(note.code != "no_index" for note in index.notes)


def _measure_cases(
    scans: Sequence[LabelledScan],
    channels: int,
    workers: int,
    known: Mapping[str, CaseFingerprint],
) -> list[CaseResult]:
    """Return the results in the order of `scans`."""
    results: dict[str, CaseResult] = {}
    todo = []
    for scan in scans:
        entry = known.get(scan.case_id)
        if entry is not None and _is_current(entry, scan):
            results[scan.case_id] = CaseResult(scan.case_id, entry)
        else:
            todo.append(scan)
    with show_progress("fingerprint", len(scans)) as line:
        if results:
            line.advance(len(results), note="measured before")
        # One case alone gains nothing from a second process.
        if workers <= 1 or len(todo) <= 1:
            for scan in todo:
                results[scan.case_id] = try_case(scan, channels)
                line.advance(note=scan.case_id)
        else:
            with worker_pool(min(workers, len(todo)), get_context("spawn")) as pool:
                with terminal_signals_blocked():
                    futures = [pool.submit(try_case, scan, channels) for scan in todo]
                for future in as_completed(futures):
                    result = future.result()
                    results[result.case_id] = result
                    line.advance(note=result.case_id)
    # In the order of the data set and not of completion, so that a plan is the same each time.
    return [results[scan.case_id] for scan in scans]


# --- the file of measurements -------------------------------------------------------------------


def _is_current(entry: CaseFingerprint, scan: LabelledScan) -> bool:
    try:
        return entry.files == scan.file_states()
    except OSError:
        return False


def _describe_inputs(labels: LabelPlan, channels: Sequence[ChannelConfig]) -> dict[str, Any]:
    """Return what the entries depend on besides the files."""
    mappings = []
    for mapping in labels.mappings:
        mappings.append(
            {
                "values": [list(pair) for pair in mapping.class_of],
                "files": [list(pair) for pair in mapping.class_of_file],
            }
        )
    return {
        "labels": labels.scheme.to_json(),
        "mappings": mappings,
        "channels": [channel.name for channel in channels],
    }


def _read_cache(file: Path, inputs: Mapping[str, Any]) -> dict[str, CaseFingerprint]:
    """Return the entries by case; empty if the file does not exist or has other labels."""
    if not file.exists():
        return {}
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    # A file that is no fingerprint is not overwritten: the user may have named the wrong one.
    refusal = UserError(
        f"{printable(file)}: not a fingerprint that liverseg plan wrote; remove it or name another"
    )
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise refusal
    if content.get("schema") != SCHEMA or content.get("inputs") != inputs:
        return {}
    try:
        entries = [CaseFingerprint.from_json(entry) for entry in cast(list, content["cases"])]
    except (KeyError, TypeError, ValueError):
        raise refusal from None
    return {entry.case_id: entry for entry in entries}


def _write_cache(file: Path, inputs: Mapping[str, Any], cases: Sequence[CaseFingerprint]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "inputs": inputs,
        "cases": [case.to_json() for case in cases],
    }
    # Compact: hundreds of quantiles a case, one per line, would be unreadable anyway.
    write_text(file, json.dumps(content, allow_nan=False) + "\n")


def describe_left_out(fingerprint: DatasetFingerprint) -> str:
    """Return one line that names the scans that were left out; empty if there are none."""
    if not fingerprint.left_out:
        return ""
    texts = [f"{printable(case)} ({reason})" for case, reason in fingerprint.left_out]
    return f"left out, {len(texts)} of the labelled scans: {list_some(texts, 5)}"
