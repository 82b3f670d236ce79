"""Read the split file of `convert.splits.kind=file`.

Three forms are accepted: this project's `{"test": [...], "folds": [[...], ...]}`, nnU-Net's
`splits_final.json`, and a list of MONAI's Auto3DSeg whose entries have a `fold`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liverseg_dist.config import SplitConfig
from liverseg_dist.config.shipped import find_config
from liverseg_dist.errors import UserError
from liverseg_dist.texts.names import derive_scan_id, get_file_name, list_some
from liverseg_dist.texts.structured import read_json

SPLIT_FORMS = '{"test": [...], "folds": [[...], ...]}, nor nnU-Net\'s splits_final.json'
NOT_CASE_LISTS = "test and each fold must be lists of case names"


@dataclass(frozen=True)
class NamedSplits:
    """Names of scans or slabs as the file has them; they may be unknown to the data set."""

    test: list[str]
    folds: list[list[str]]

    def list_names(self) -> list[str]:
        """All names, those of the test set first."""
        names = list(self.test)
        for fold in self.folds:
            names += fold
        return names


def read_split_file(config: SplitConfig) -> NamedSplits:
    """Read and check `config.file`.

    Raises:
        UserError: No file is set, it has another form, no fold, or a case in two parts.
    """
    path = config.file
    if path is None:
        raise UserError(
            "convert.splits.kind=file needs convert.splits.file, "
            'a JSON {"test": [...], "folds": [[...]]}'
        )
    content = read_json(find_config(path), purpose=f"; not a JSON {SPLIT_FORMS}")
    try:
        splits = _parse_splits(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON {SPLIT_FORMS} ({error})") from None
    # Ids, not names: `liver_1` and `imagesTr/liver_1.nii.gz` are the same scan.
    scan_ids = Counter(
        derive_scan_id(get_file_name(name), keep_channel=True) for name in splits.list_names()
    )
    repeated = sorted(scan_id for scan_id, count in scan_ids.items() if count > 1)
    if repeated:
        raise UserError(f"{path}: {list_some(repeated)} occurs in more than one part; remove one")
    if not splits.folds:
        raise UserError(f"{path}: names no fold; there is nothing to train on")
    return splits


def _parse_splits(content: Any) -> NamedSplits:
    """Raise one of several built-in exceptions if the content has another form."""
    if isinstance(content, list):
        # nnU-Net: [{"train": [...], "val": [...]}, ...]
        content = {"folds": [fold["val"] for fold in content]}
    elif "folds" not in content and isinstance(content.get("training"), list):
        content = _convert_monai_list(content)
    test, folds = content.get("test", []), content["folds"]
    if not isinstance(folds, list):
        raise TypeError(NOT_CASE_LISTS)
    return NamedSplits(_read_case_names(test), [_read_case_names(fold) for fold in folds])


def _convert_monai_list(content: Mapping[str, Any]) -> dict[str, Any]:
    """From {"training": [{"image": ..., "fold": 0}, ...], "testing": [...]}."""
    folds: dict[int, list[Any]] = {}
    for entry in content["training"]:
        fold = entry["fold"]
        if not isinstance(fold, int) or fold < 0:
            raise TypeError("fold must be an integer from 0 on")
        folds.setdefault(fold, []).append(entry)
    count = max(folds, default=-1) + 1
    # Limits the memory for a file with one huge fold number.
    if count > len(content["training"]):
        raise TypeError(f"fold {count - 1} is more than there are cases")
    test = content.get("testing", content.get("test", []))
    return {"test": test, "folds": [folds.get(number, []) for number in range(count)]}


def _read_case_names(entries: Any) -> list[str]:
    """Names from texts, or from mappings with `image`."""
    if not isinstance(entries, list):
        raise TypeError(NOT_CASE_LISTS)
    names = []
    for entry in entries:
        name = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise TypeError(NOT_CASE_LISTS)
        names.append(name)
    return names
