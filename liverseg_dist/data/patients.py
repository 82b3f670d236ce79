"""The patient of each case, from the table `convert.splits.patients`.

Splits keep the scans of a patient together. Names of patients stay in the table: in the store, a
patient is identified by the first of its cases.
"""

from collections.abc import Sequence
from pathlib import Path

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.matching import TableEntry, TableMatches, match_entries
from liverseg_dist.texts.names import MAX_SHOWN, fold_id
from liverseg_dist.texts.tables import read_table

COLUMNS = ("case", "patient")
PURPOSE = "; convert.splits.patients is a CSV `case,patient`"


def read_patients(path: Path | None, case_ids: Sequence[str]) -> dict[str, str]:
    """Map each case to its patient, identified by the patient's first case.

    Spellings of a patient that differ only in spaces, case or Unicode form are one patient. Read as
    two, their scans could be on both sides of a split.

    Args:
        path: CSV with the columns case and patient. None: each case is a patient of its own.
        case_ids: The cases of the data set. A case without a row is a patient of its own.

    Raises:
        UserError: Not such a table, or a case with two rows.
    """
    patients = {case_id: case_id for case_id in case_ids}
    if path is None:
        return patients
    groups: dict[str, list[str]] = {}
    for case_id, entry in _match_patients(path, case_ids).by_scan.items():
        groups.setdefault(fold_id(entry.value), []).append(case_id)
    for group in groups.values():
        patients.update(dict.fromkeys(group, min(group)))
    return patients


def describe_patients(path: Path, case_ids: Sequence[str]) -> list[str]:
    """List rows without a case, cases without a row, and patients with several spellings.

    Raises:
        UserError: see `read_patients`.
    """
    matches = _match_patients(path, case_ids)
    lines = matches.describe(path, "so each counts as a patient of its own")
    spellings: dict[str, dict[str, str]] = {}
    for entry in matches.by_scan.values():
        spellings.setdefault(fold_id(entry.value), {}).setdefault(entry.value, entry.where)
    ambiguous = [rows for rows in spellings.values() if len(rows) > 1]
    for rows in ambiguous[:MAX_SHOWN]:
        # Line numbers instead of names: names of patients stay in the file.
        lines.append(
            f"{printable(path)}: {', '.join(rows.values())}: spellings of one patient, "
            "read as one patient"
        )
    return lines


def _match_patients(path: Path, case_ids: Sequence[str]) -> TableMatches[str]:
    table = read_table(path, COLUMNS, PURPOSE)
    entries = []
    for row in table.rows:
        if not row["case"] or not row["patient"]:
            raise UserError(
                f"{printable(path)}: line {row.line} lacks a case or a patient; "
                "the header is `case,patient`"
            )
        entries.append(TableEntry(f"line {row.line}", row["case"], row["patient"]))
    if not entries:
        raise UserError(f"{printable(path)}: has no rows{PURPOSE}")
    return match_entries(path, entries, case_ids)
