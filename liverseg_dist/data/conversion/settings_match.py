"""What a store was made with, so that a run with other settings is refused by the name of the setting."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liverseg_dist.config import ConvertConfig
from liverseg_dist.config.shipped import find_config
from liverseg_dist.data.store.layout import SCHEMA
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256

DONE_BEFORE = {
    "convert.cleaning.standardise": True,
    "convert.cleaning.min_slices": 4,
    "convert.modality": "CT",
}
"""Settings that came later, as they stand where nothing is said: stores made before can be continued."""


def public_settings(convert: ConvertConfig) -> dict[str, Any]:
    """As the root shows them: no paths, nothing that depends on the machine."""
    shown = convert.model_dump(
        mode="json", exclude={"workers": True, "labels_from": True, "splits": {"file", "patients"}}
    )
    shown["cleaning"].pop("spacing_table")
    for key in ("standardise", "min_slices"):
        if shown["cleaning"][key] == DONE_BEFORE[f"convert.cleaning.{key}"]:
            shown["cleaning"].pop(key)
    if shown["modality"] == DONE_BEFORE["convert.modality"]:
        shown.pop("modality")
    return shown


def settings_sha256(shown: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def settings_that_must_match(
    dataset: str, convert: ConvertConfig, labels_from: str | None = None
) -> dict[str, Any]:
    """What has to be the same for a run to continue a store; files of settings count by their content.

    `labels_from`: fingerprint of the run that labels scans.
    """
    shown = public_settings(convert)
    shown["splits"] |= {
        "file": _content(convert.splits.file),
        "patients": _content(convert.splits.patients),
    }
    shown["cleaning"]["spacing_table"] = _content(convert.cleaning.spacing_table)
    if labels_from is not None:
        shown["labels_from"] = labels_from
    return {"schema": SCHEMA, "dataset": dataset, "convert": shown}


def list_setting_differences(before: object, now: dict[str, Any]) -> list[str]:
    """`convert.slab.policy was fit, is tile`, for each setting that differs."""
    old = DONE_BEFORE | dict(_flat(before)) if isinstance(before, dict) else {}
    new = DONE_BEFORE | dict(_flat(now))
    return [
        f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _content(path: Path | None) -> str | None:
    try:
        return None if path is None else f"sha256 {file_sha256(find_config(path))}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
