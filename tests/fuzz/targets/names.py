"""Tables as spreadsheets write them, and folders of scans under the names of several systems."""

import csv
import io
import os
import unicodedata
from pathlib import Path
from random import Random

from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.errors import printable
from liverseg_dist.evaluation.pairing import pair_masks
from liverseg_dist.texts.names import ScanIndex, derive_scan_id
from liverseg_dist.texts.tables import read_table
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import damaged

CELLS = (
    "liver_1",
    "001",
    "1e3",
    "no",
    "a b",
    "Müller",
    "Mu\u0308ller",
    "a,b",
    "a;b",
    'a"b',
    "=1+1",
    "2024-11-30",
    "肝臓",
)


class CsvTarget:
    """`read_table`: the cells that Python's csv finds, in the same rows."""

    name = "csv"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        separator = chance.choice((",", ";", "\t"))
        text = io.StringIO()
        quoting = chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        writer = csv.writer(
            text,
            delimiter=separator,
            quoting=quoting,
            lineterminator=chance.choice(("\n", "\r\n", "\r")),
        )
        writer.writerow(
            chance.choice((("case", "patient"), (" Case", "PATIENT "), ("patient", "case", "note")))
        )
        for _ in range(chance.randrange(5)):
            writer.writerow([chance.choice(("", " ")) + chance.choice(CELLS) for _ in range(2)])
            if chance.random() < 0.2:
                writer.writerow(["", ""])
        raw = text.getvalue().encode(chance.choice(("utf-8", "utf-8-sig", "utf-16")))
        (case / "t.csv").write_bytes(damaged(raw, chance) if chance.random() < 0.6 else raw)
        (case / "separator").write_text(separator)

    def check(self, case: Path) -> None:
        table = read_table(case / "t.csv", ("case", "patient"))
        raw = (case / "t.csv").read_bytes()
        encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = raw.decode(encoding)
        lines = csv.reader(
            io.StringIO(text, newline=None), delimiter=table.separator, skipinitialspace=True
        )
        rows = [
            row
            for row in lines
            if any(_letters(cell) for cell in row) and not row[0].strip().startswith("#")
        ]
        header, *rest = rows
        names = [_letters(cell).casefold() for cell in header]
        for column in ("case", "patient"):
            at = names.index(column) if column in names else -1
            ours = [_letters(row[column]) for row in table.rows if row["case"] or row["patient"]]
            theirs = [_letters(row[at]) if at < len(row) else "" for row in rest]
            theirs = [cell for cell in theirs if cell]
            if at >= 0 and text.isprintable() and [cell for cell in ours if cell] != theirs:
                raise Wrong(f"{column}: {ours}, Python's csv reads {theirs}")


class NamesTarget:
    """`read_dataset` without an index and `pair_masks`: each file is read, or named in a line; one id each."""

    name = "names"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        for part in ("imagesTr", "labelsTr", "imagesTs"):
            (case / part).mkdir()
            for number in range(chance.randrange(1, 5)):
                stem = chance.choice(
                    (
                        f"liver_{number}",
                        f"volume-{number}",
                        f"segmentation-{number}",
                        f"Mü_{number}",
                        f"caf\udce9{number}",
                        f"case_000{number}",
                        f"a b{number}",
                        f"-{number}",
                        f"LIVER_{number}",
                        f"x\n{number}",
                        f"..{number}",
                    )
                )
                stem = unicodedata.normalize(chance.choice(("NFC", "NFD")), stem)
                channel = chance.choice(("", "", "_0000", "_0001"))
                suffix = chance.choice((".nii.gz", ".nii", ".NII.GZ", ".Nii.gz", ".nrrd", ".dcm"))
                (case / part / f"{stem}{channel}{suffix}").touch()

    def check(self, case: Path) -> None:
        dataset = read_dataset(case)
        cases = (*dataset.training, *dataset.test)
        used = {path for one in cases for path in (one.image, one.label) if path is not None}
        told = " ".join(note.message for note in dataset.notes)
        for part in ("imagesTr", "labelsTr", "imagesTs"):
            for entry in os.scandir(case / part):
                path = Path(entry.path)
                if (
                    path not in used
                    and derive_scan_id(path.name) not in told
                    and printable(path.name) not in told
                ):
                    raise Wrong(f"{path!r} is neither read nor named in {told!r}")
        ids = [one.case_id for one in cases]
        if len({name.casefold() for name in ids}) != len(ids) or not all(
            name.isprintable() for name in ids
        ):
            raise Wrong(f"ids {ids!r}")
        index = ScanIndex(ids)
        if [index.find_scan(name) for name in ids] != ids:
            raise Wrong(f"a table cannot name {ids!r}")
        if not any(one.label for one in dataset.training):
            return
        pairs = {
            pair.prediction: pair.truth
            for pair in pair_masks(case / "imagesTr", case / "labelsTr").pairs
        }
        for one in dataset.training:
            if one.label is not None and pairs.get(one.image) != one.label:
                raise Wrong(
                    f"score pairs {one.image!r} with {pairs.get(one.image)!r}, convert with {one.label!r}"
                )


def _letters(cell: str) -> str:
    """What is left of a cell whatever the spaces and marks."""
    return "".join(char for char in unicodedata.normalize("NFC", cell) if char.isalnum())
