"""Read the fingerprint of a data set: list its labelled cases, measure them in parallel processes.

`dataset.json` is read as the Decathlon or nnU-Net writes it, with any labels and channels. The
result can be kept in a file that the caller names; cases whose files did not change are then taken
from it. No other place holds a copy.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.io.dataset_case import Cases, build_listed_cases, pair_files_by_name
from liverseg_dist.data.io.dataset_folder import parse_relative_path
from liverseg_dist.data.io.dataset_json import INDEX_FILE
from liverseg_dist.data.io.modality import (
    CT_PHRASES,
    CT_WORDS,
    MODALITY_KEYS,
    MR_WORDS,
    NUCLEAR_WORDS,
)
from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.files import write_text
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.planning.fingerprint import (
    CaseFingerprint,
    DatasetFingerprint,
)
from liverseg_dist.planning.fingerprint_case import CaseResult, LabelledScan, try_case
from liverseg_dist.texts.names import SUFFIXES, list_some, strip_suffix
from liverseg_dist.texts.structured import read_json
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

SCHEMA = 1
MAX_FILE_BYTES = 64 << 20
MIN_READABLE = 0.5
"""A plan from less than half of a data set would be a plan for another data set."""
MR_PHRASES = ("magnetic resonance",)
RANGE_NAMES = ("rescale_to_0_1", "rgb_to_0_1")
"""nnU-Net's names for channels that are scaled to a range."""
_CHANNEL_ZERO = re.compile(r"(?s)(.+)_0000")


def is_dataset_folder(path: Path) -> bool:
    """Return whether a path is a raw data set: a folder with dataset.json or imagesTr/."""
    return path.is_dir() and ((path / INDEX_FILE).is_file() or (path / "imagesTr").is_dir())


def read_fingerprint(
    folder: Path, workers: int = 1, cache: Path | None = None
) -> DatasetFingerprint:
    """Measure all labelled cases of a data set; a progress bar shows the work.

    Args:
        folder: The data set, in the layout of the Decathlon or of nnU-Net.
        workers: Number of processes.
        cache: File that keeps the measurements between calls; None: they are not kept.

    Raises:
        UserError: The folder is not a data set, has no labelled case, or the cache is another file.
        RunFailed: Less than half of the labelled cases can be read.
    """
    content = _read_index(folder)
    scheme, scheme_notes = _read_scheme(folder, content)
    channels, channel_notes = read_input_channels(content)
    scans, missing = list_labelled_scans(folder, content, len(channels))
    if not scans and not missing:
        raise UserError(f"{printable(folder)}: no training case has a label; a plan needs labels")
    known = _read_cache(cache, scheme, channels) if cache is not None else {}
    results = _measure_cases(scans, scheme, len(channels), workers, known)
    cases, left_out = [], list(missing)
    for result in results:
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
        _write_cache(cache, scheme, channels, cases)
    name = str(content.get("name") or folder.resolve().name)
    return DatasetFingerprint(
        name=printable(name)[:200],
        scheme=scheme,
        channels=channels,
        cases=tuple(cases),
        left_out=tuple(left_out),
        notes=(*scheme_notes, *channel_notes),
    )


# --- labels and channels ------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the content of dataset.json; empty without such a file."""
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    content = read_json(index, max_bytes=MAX_FILE_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"{printable(index)}: expected a JSON object with training and labels")
    return content


def _read_scheme(folder: Path, content: Mapping[str, Any]) -> tuple[LabelScheme, list[str]]:
    if "labels" not in content:
        note = f"no labels in {INDEX_FILE}: read as 0 background, 1 liver, 2 tumour"
        return LITS_SCHEME, [note]
    try:
        return scheme_from_labels(content["labels"]), []
    except UserError as error:
        raise UserError(f"{printable(folder / INDEX_FILE)}: {error}") from None


def read_input_channels(content: Mapping[str, Any]) -> tuple[tuple[ChannelConfig, ...], list[str]]:
    """Return the channels that dataset.json names, and notes about assumptions.

    Args:
        content: The object in the file; `channel_names` (nnU-Net) or `modality` (Decathlon).
    """
    named: Any = next((content[key] for key in MODALITY_KEYS if content.get(key)), None)
    if named is None:
        note = f"no channel_names or modality in {INDEX_FILE}: one channel of CT is assumed"
        return CT_CHANNELS, [note]
    if isinstance(named, dict):
        keys = sorted(named, key=lambda key: (not str(key).isdecimal(), str(key).zfill(9)))
        names = [str(named[key]) for key in keys]
    else:
        names = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    channels, notes = [], []
    for name in names:
        channel = classify_channel(name)
        channels.append(channel)
        if channel.modality == "other":
            notes.append(
                f"channel {printable(name)[:80]}: unknown modality, normalised by z-score per scan"
            )
    return tuple(channels), notes


def classify_channel(name: str) -> ChannelConfig:
    """Return modality and normalisation of a channel by its name.

    nnU-Net normalises `CT` by the data's foreground values and everything else by z-score per scan;
    this rule also knows longer names such as `CT portal venous`.
    """
    shown = printable(name).strip()[:80] or "channel"
    lower = shown.lower()
    if lower in RANGE_NAMES:
        # nnU-Net scales these by each scan's own range, too.
        return ChannelConfig(name=shown, modality="other", intensity="percentiles")
    text = re.sub(r"[^a-z0-9]+", " ", lower).strip()
    words = set(text.split())
    is_ct = bool(words & CT_WORDS) or any(phrase in text for phrase in CT_PHRASES)
    is_mr = bool(words & MR_WORDS) or any(phrase in text for phrase in MR_PHRASES)
    is_nuclear = bool(words & NUCLEAR_WORDS)
    # "PET/CT" names two modalities, but a channel has one.
    if is_ct and not is_mr and not is_nuclear:
        return ChannelConfig(name=shown)
    is_only_mr = is_mr and not is_ct and not is_nuclear
    return ChannelConfig(name=shown, modality="MR" if is_only_mr else "other", intensity="zscore")


# --- cases --------------------------------------------------------------------------------------


def list_labelled_scans(
    folder: Path, content: Mapping[str, Any], channels: int
) -> tuple[list[LabelledScan], list[tuple[str, str]]]:
    """Return the labelled training cases, and (case, reason) where a listed file is missing."""
    scans, missing = [], []
    for case in _list_training_cases(folder, content):
        problem = next((f.message for f in case.findings if f.code.endswith("_missing")), None)
        if case.label is not None and problem is None:
            images = _find_channel_files(case.image, channels)
            scans.append(LabelledScan(case.case_id, images, case.label))
        # A scan without a label in a folder without an index is unlabelled on purpose.
        elif problem is not None and (content.get("training") or case.label is not None):
            missing.append((case.case_id, problem))
    return scans, missing


def _list_training_cases(folder: Path, content: Mapping[str, Any]) -> Cases:
    entries = content.get("training")
    if not entries:
        return pair_files_by_name(folder)[0]
    pairs = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(
                f'{printable(folder / INDEX_FILE)}: a training entry is {{"image": ..., '
                f'"label": ...}}, not {printable(entry)[:80]}'
            )
        image = _resolve(folder, entry["image"])
        label = entry.get("label")
        pairs.append((image, _resolve(folder, label) if isinstance(label, str) else None))
    return build_listed_cases(pairs, [])[0]


def _resolve(folder: Path, name: str) -> Path:
    path = parse_relative_path(name)
    if path is None:
        raise UserError(
            f"{printable(folder / INDEX_FILE)}: {printable(name)[:80]} leaves the data set's folder"
        )
    return folder / path


def _find_channel_files(first: Path, channels: int) -> tuple[Path, ...]:
    """Return the files `_0000`, `_0001` and so on of a scan, or its only file."""
    match = _CHANNEL_ZERO.fullmatch(strip_suffix(first.name))
    if channels == 1 or match is None:
        return (first,)
    suffix = first.name[len(strip_suffix(first.name)) :] or SUFFIXES[0]
    return tuple(first.with_name(f"{match[1]}_{n:04d}{suffix}") for n in range(channels))


def _measure_cases(
    scans: Sequence[LabelledScan],
    scheme: LabelScheme,
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
        if workers <= 1 or len(todo) <= 1:
            for scan in todo:
                results[scan.case_id] = try_case(scan, scheme, channels)
                line.advance(note=scan.case_id)
        else:
            with worker_pool(min(workers, len(todo)), get_context("spawn")) as pool:
                with terminal_signals_blocked():
                    futures = [pool.submit(try_case, scan, scheme, channels) for scan in todo]
                for future in as_completed(futures):
                    result = future.result()
                    results[result.case_id] = result
                    line.advance(note=result.case_id)
    return [results[scan.case_id] for scan in scans]


# --- the file of measurements -------------------------------------------------------------------


def _is_current(entry: CaseFingerprint, scan: LabelledScan) -> bool:
    try:
        return entry.files == scan.file_states()
    except OSError:
        return False


def _describe_inputs(scheme: LabelScheme, channels: Sequence[ChannelConfig]) -> dict[str, Any]:
    """Return what the entries depend on besides the files."""
    return {"labels": scheme.to_json(), "channels": [channel.name for channel in channels]}


def _read_cache(
    file: Path, scheme: LabelScheme, channels: Sequence[ChannelConfig]
) -> dict[str, CaseFingerprint]:
    """Return the entries by case; empty if the file does not exist or has other labels."""
    if not file.exists():
        return {}
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    refusal = UserError(
        f"{printable(file)}: not a fingerprint that liverseg plan wrote; remove it or name another"
    )
    if not isinstance(content, dict) or content.get("kind") != "liverseg fingerprint":
        raise refusal
    if content.get("schema") != SCHEMA or content.get("inputs") != _describe_inputs(
        scheme, channels
    ):
        return {}
    try:
        entries = [CaseFingerprint.from_json(entry) for entry in cast(list, content["cases"])]
    except (KeyError, TypeError, ValueError):
        raise refusal from None
    return {entry.case_id: entry for entry in entries}


def _write_cache(
    file: Path,
    scheme: LabelScheme,
    channels: Sequence[ChannelConfig],
    cases: Sequence[CaseFingerprint],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "kind": "liverseg fingerprint",
        "schema": SCHEMA,
        "inputs": _describe_inputs(scheme, channels),
        "cases": [case.to_json() for case in cases],
    }
    # Compact: hundreds of quantiles a case, one per line, would be unreadable anyway.
    write_text(file, json.dumps(content, allow_nan=False) + "\n")


def describe_left_out(fingerprint: DatasetFingerprint) -> str:
    """Return one line that names the scans that were left out; empty if there are none."""
    if not fingerprint.left_out:
        return ""
    texts = [f"{printable(case)} ({reason})" for case, reason in fingerprint.left_out]
    return f"{len(texts)} scan(s) left out: {list_some(texts, 5)}"
