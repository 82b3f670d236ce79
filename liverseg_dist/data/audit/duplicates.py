"""Find the same scan under two names: in one data set, and across sources that overlap."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import printable
from liverseg_dist.volume import CANONICAL_ORIENTATION, Volume

MAX_NAMED = 10
IRCADB_CASES = range(1, 21)
IRCADB_TO_LITS = 27
"""3D-IRCADb-01 case n is Task03 liver_(27 + n) and LiTS volume-(27 + n)."""

_IRCADB = re.compile(
    r"ircadb?[-_. ]*(?:0?1[-_. ]+)?(?:case|patient)?[-_. ]*0*(\d{1,2})$", re.IGNORECASE
)
_LITS = re.compile(r"^(?:liver|volume|lits)[-_ ]0*(\d+)$", re.IGNORECASE)


def hash_voxels(volume: Volume) -> str:
    """SHA-256 of type, shape and voxels in canonical orientation: equal for copies of a scan."""
    voxels = volume.reoriented(CANONICAL_ORIENTATION).voxels
    digest = hashlib.sha256(f"{voxels.dtype.str}{voxels.shape}".encode())
    # By slice: a reoriented volume is a view, and a contiguous copy of all of it would be large.
    for slice_yx in voxels:
        digest.update(np.ascontiguousarray(slice_yx).data)
    return digest.hexdigest()


def find_duplicates(hashes: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of case ids with the same hash, sorted. `hashes`: case id -> `hash_voxels`."""
    # Equal hashes mean equal voxels; spacing and position may differ.
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id, digest in hashes.items():
        groups[digest].append(case_id)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def report_duplicates(groups: Iterable[tuple[str, ...]]) -> dict[str, Finding]:
    """One finding for each case of each group.

    A finding names at most `MAX_NAMED` other cases: with thousands of copies, all names in all
    findings would be millions.
    """
    findings = {}
    for group in groups:
        for case_id in group:
            others = [printable(other) for other in group[: MAX_NAMED + 1] if other != case_id]
            named = others[:MAX_NAMED]
            rest = len(group) - 1 - len(named)
            names = ", ".join(named) + (f" and {rest} more" if rest else "")
            message = f"same voxels as {names}; keep them on one side of a split"
            findings[case_id] = Finding("warning", "duplicate_scan", message)
    return findings


def find_ircadb_overlaps(case_ids: Iterable[str]) -> list[tuple[str, str]]:
    """(3D-IRCADb name, Task03 or LiTS name) of scans that are present under both names."""
    case_ids = sorted(case_ids)
    lits = {}
    for case_id in case_ids:
        if match := _LITS.match(case_id):
            # Numbers, not texts: liver_028 and liver_28 are the same scan.
            lits[int(match[1])] = case_id
    pairs = []
    for case_id in case_ids:
        match = _IRCADB.search(case_id)
        if match and int(match[1]) in IRCADB_CASES:
            other = lits.get(int(match[1]) + IRCADB_TO_LITS)
            if other is not None:
                pairs.append((case_id, other))
    return pairs


def report_ircadb_overlaps(case_ids: Iterable[str]) -> dict[str, Finding]:
    """One finding for each case of each pair of `find_ircadb_overlaps`."""
    findings = {}
    for ircadb_id, lits_id in find_ircadb_overlaps(case_ids):
        for case_id, other in ((ircadb_id, lits_id), (lits_id, ircadb_id)):
            message = (
                f"the same patient as {printable(other)} (3D-IRCADb n is liver_(27 + n)); keep one"
            )
            findings[case_id] = Finding("warning", "ircadb_overlap", message)
    return findings
