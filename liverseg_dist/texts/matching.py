"""Rows of a table against the scans of a data set: nothing on either side is left out without a
line.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import ScanIndex, derive_scan_id, fold_id, list_some

Value = TypeVar("Value")


@dataclass(frozen=True)
class TableEntry(Generic[Value]):
    """What a table says of one scan."""

    where: str
    """`line 3`, or the key as it is written."""
    name: str
    value: Value


@dataclass(frozen=True)
class TableMatches(Generic[Value]):
    by_scan: dict[str, TableEntry[Value]]
    unknown: tuple[str, ...]
    """Names in the table that are no scan of the data set."""
    without: tuple[str, ...]
    """Scans that no row names."""

    def describe(self, path: Path, of_those_without: str) -> list[str]:
        """A line for each side that does not match. `of_those_without`: what becomes of scans
        without a row.
        """
        lines = []
        if self.unknown:
            shown = list_some([printable(name) for name in self.unknown])
            count = len(self.unknown)
            lines.append(
                f"{printable(path)}: {count} row(s) name no scan of this data set: {shown}"
            )
        if self.without:
            shown = list_some([printable(name) for name in self.without])
            count = len(self.without)
            lines.append(
                f"{printable(path)}: {count} scan(s) have no row, {of_those_without}: {shown}"
            )
        return lines


def match_entries(
    path: Path, entries: Sequence[TableEntry[Value]], scans: Collection[str]
) -> TableMatches[Value]:
    """Find the scan of each row.

    Raises:
        UserError: A scan has two rows, or no row names a scan.
    """
    index = ScanIndex(scans)
    found: dict[str, TableEntry[Value]] = {}
    unknown: dict[str, TableEntry[Value]] = {}
    for entry in entries:
        scan = index.find_scan(entry.name)
        place, key = (
            (unknown, fold_id(derive_scan_id(entry.name))) if scan is None else (found, scan)
        )
        if key in place:
            raise UserError(
                f"{printable(path)}: {printable(entry.name)} stands twice, "
                f"in {place[key].where} and {entry.where}; remove one"
            )
        place[key] = entry
    if entries and scans and not found:
        raise UserError(
            f"{printable(path)}: no row names a scan of this data set; "
            f"its names begin with {printable(entries[0].name)}, those of the scans with {printable(min(scans))}"
        )
    without = tuple(sorted(set(scans) - found.keys()))
    return TableMatches(found, tuple(entry.name for entry in unknown.values()), without)
