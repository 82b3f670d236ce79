"""Match the rows of a user's table with the scans of a data set.

Rows without a scan and scans without a row are both reported.
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
    """One row of a table: a scan's name and its value."""

    where: str
    """Position in the file, for messages: `line 3`, or the key as written."""
    name: str
    value: Value


@dataclass(frozen=True)
class TableMatches(Generic[Value]):
    """Result of `match_entries`."""

    by_scan: dict[str, TableEntry[Value]]
    unknown: tuple[str, ...]
    """Names in the table that are not scans of the data set."""
    missing: tuple[str, ...]
    """Scans without a row."""

    def describe(self, path: Path, consequence: str) -> list[str]:
        """Describe what does not match, one line for rows and one for scans.

        Args:
            path: The table.
            consequence: What happens to scans without a row, for the message.
        """
        lines = []
        if self.unknown:
            shown = list_some([printable(name) for name in self.unknown])
            count = len(self.unknown)
            lines.append(
                f"{printable(path)}: {count} row(s) name no scan of this data set: {shown}"
            )
        if self.missing:
            shown = list_some([printable(name) for name in self.missing])
            count = len(self.missing)
            lines.append(f"{printable(path)}: {count} scan(s) have no row, {consequence}: {shown}")
        return lines


def match_entries(
    path: Path, entries: Sequence[TableEntry[Value]], scans: Collection[str]
) -> TableMatches[Value]:
    """Find the scan of each row.

    Args:
        path: The table, for messages.
        entries: Its rows.
        scans: Ids of the data set.

    Raises:
        UserError: A scan has two rows, or no row names a scan.
    """
    index = ScanIndex(scans)
    found: dict[str, TableEntry[Value]] = {}
    unknown: dict[str, TableEntry[Value]] = {}
    for entry in entries:
        scan = index.find_scan(entry.name)
        if scan is None:
            # Repeated names are refused for unknown scans as well.
            group, key = unknown, fold_id(derive_scan_id(entry.name))
        else:
            group, key = found, scan
        if key in group:
            raise UserError(
                f"{printable(path)}: {printable(entry.name)} occurs twice, "
                f"in {group[key].where} and {entry.where}; remove one"
            )
        group[key] = entry
    # No match at all is a wrong table or a wrong column, not a few missing rows.
    if entries and scans and not found:
        raise UserError(
            f"{printable(path)}: no row names a scan of this data set; "
            f"its names begin with {printable(entries[0].name)}, "
            f"those of the scans with {printable(min(scans))}"
        )
    return TableMatches(
        by_scan=found,
        unknown=tuple(entry.name for entry in unknown.values()),
        missing=tuple(sorted(set(scans) - found.keys())),
    )
