"""The same scan under two names, within a data set and across sources that are known to overlap."""

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
    """SHA-256 of shape and voxels in canonical orientation: the same for copies."""
    voxels = volume.reoriented(CANONICAL_ORIENTATION).voxels
    digest = hashlib.sha256(f"{voxels.dtype.str}{voxels.shape}".encode())
    for slice_yx in voxels:
        digest.update(np.ascontiguousarray(slice_yx).data)
    return digest.hexdigest()


def find_duplicates(hashes: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of case ids with the same hash, sorted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id, digest in hashes.items():
        groups[digest].append(case_id)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def report_duplicates(groups: Iterable[tuple[str, ...]]) -> dict[str, Finding]:
    """One finding per case of each group. It names the first others only: thousands of copies would be millions."""
    found = {}
    for group in groups:
        for case_id in group:
            named = [printable(other) for other in group[: MAX_NAMED + 1] if other != case_id][
                :MAX_NAMED
            ]
            more = len(group) - 1 - len(named)
            others = ", ".join(named) + (f" and {more} more" if more else "")
            found[case_id] = Finding(
                "warning",
                "duplicate_scan",
                f"same voxels as {others}; keep them on one side of a split",
            )
    return found


def find_ircadb_overlaps(case_ids: Iterable[str]) -> list[tuple[str, str]]:
    """(3D-IRCADb name, Task03 or LiTS name) of scans that are present under both names."""
    ids = sorted(case_ids)
    lits = {int(match.group(1)): case_id for case_id in ids if (match := _LITS.match(case_id))}
    pairs = []
    for case_id in ids:
        match = _IRCADB.search(case_id)
        if match and int(match.group(1)) in IRCADB_CASES:
            other = lits.get(int(match.group(1)) + IRCADB_TO_LITS)
            if other is not None:
                pairs.append((case_id, other))
    return pairs


def report_ircadb_overlaps(case_ids: Iterable[str]) -> dict[str, Finding]:
    found = {}
    for ircadb, lits in find_ircadb_overlaps(case_ids):
        for one, other in ((ircadb, lits), (lits, ircadb)):
            message = (
                f"the same patient as {printable(other)} (3D-IRCADb n is liver_(27 + n)); keep one"
            )
            found[one] = Finding("warning", "ircadb_overlap", message)
    return found
