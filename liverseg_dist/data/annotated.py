"""Which structures were annotated in each case of partly labelled data.

From the settings (`convert.annotated`, `convert.annotated_table`), else from `dataset.json`, else
from the files that a case has, else what its source names.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.io.dataset_case import DatasetCase
from liverseg_dist.data.io.source_labels import fold_name
from liverseg_dist.data.label_mapping import LabelMapping
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.matching import TableEntry, match_entries
from liverseg_dist.texts.names import list_some
from liverseg_dist.texts.tables import read_table

COLUMNS = ("case", "structures")
PURPOSE = "; convert.annotated_table is a CSV `case,structures`, structures separated by semicolons"
SEPARATOR = ";"


def find_annotated(
    cases: Sequence[DatasetCase], mappings: Sequence[LabelMapping], convert: ConvertConfig
) -> dict[str, tuple[str, ...] | None]:
    """The annotated structures of each case, in the order of the scheme; None: all of them.

    Args:
        cases: All cases of the data set.
        mappings: Of each source.
        convert: Settings of the conversion.

    Raises:
        UserError: The settings name an unknown structure or case, or the table cannot be read.
    """
    scheme = mappings[0].scheme
    case_ids = [case.case_id for case in cases]
    by_case: dict[str, tuple[str, ...]] = {}
    if convert.annotated is not None:
        by_case |= _match_patterns(convert.annotated, case_ids, scheme)
    if convert.annotated_table is not None:
        by_case |= _read_table(convert.annotated_table, case_ids, scheme)
    result: dict[str, tuple[str, ...] | None] = {}
    for case in cases:
        mapping = mappings[case.source]
        names = by_case.get(case.case_id)
        if names is None:
            names = mapping.annotated
            if case.annotated is not None:
                names = mapping.find_annotated(case.annotated)
            elif case.structure_files:
                names = mapping.find_annotated([name for name, _ in case.structure_files])
        ordered = tuple(name for name in scheme.structure_names if name in names)
        result[case.case_id] = None if ordered == scheme.structure_names else ordered
    return result


def _match_patterns(
    patterns: Mapping[str, Sequence[str]], case_ids: Sequence[str], scheme: LabelScheme
) -> dict[str, tuple[str, ...]]:
    by_case: dict[str, tuple[str, ...]] = {}
    for pattern, names in patterns.items():
        where = f"convert.annotated: {printable(pattern)}"
        found = [case_id for case_id in case_ids if fnmatchcase(case_id, pattern)]
        if not found:
            shown = list_some([printable(case_id) for case_id in case_ids], 3)
            raise UserError(f"{where}: no case is called so; the cases are {shown}")
        structures = _resolve_names(names, scheme, where)
        for case_id in found:
            # The first pattern that fits counts.
            by_case.setdefault(case_id, structures)
    return by_case


def _read_table(
    path: Path, case_ids: Sequence[str], scheme: LabelScheme
) -> dict[str, tuple[str, ...]]:
    entries = []
    for row in read_table(path, COLUMNS, PURPOSE).rows:
        where = f"line {row.line}"
        names = [name.strip() for name in row["structures"].split(SEPARATOR) if name.strip()]
        structures = _resolve_names(names, scheme, f"{printable(path)}: {where}")
        entries.append(TableEntry(where, row["case"], structures))
    if not entries:
        raise UserError(f"{printable(path)}: has no rows{PURPOSE}")
    matches = match_entries(path, entries, case_ids)
    return {case_id: entry.value for case_id, entry in matches.by_scan.items()}


def _resolve_names(names: Sequence[str], scheme: LabelScheme, where: str) -> tuple[str, ...]:
    known = {fold_name(name): name for name in scheme.structure_names}
    found = []
    for name in names:
        if fold_name(name) not in known:
            raise UserError(
                f"{where}: no structure is called {printable(name)}; the structures are "
                f"{list_some([printable(other) for other in scheme.structure_names], 20)}"
            )
        found.append(known[fold_name(name)])
    return tuple(found)
