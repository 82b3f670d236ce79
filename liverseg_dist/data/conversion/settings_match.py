"""The settings a store was made with: their public form, their hash, and their differences.

A conversion that continues a store must use the same settings; otherwise the error names the
setting.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.config import CT_CHANNELS, ChannelConfig, ConvertConfig
from liverseg_dist.config.aliases import current_key
from liverseg_dist.config.shipped import find_config
from liverseg_dist.data.store.layout import SCHEMA
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256
from liverseg_dist.labels import LITS_SCHEME, LabelScheme

EARLIER_DEFAULTS = {
    "convert.cleaning.standardise": True,
    "convert.cleaning.min_slices": 4,
    "convert.modality": "CT",
    "convert.channels": None,
    "convert.labels": None,
    "convert.annotated": None,
    "convert.slab.around": None,
    "convert.register_channels": "none",
    "channels": None,
}
"""Settings that were added after the first stores, with the behaviour of those stores.

A setting with this value is left out of the recorded settings, so that older stores can be
continued.
"""
MAX_VALUE_CHARACTERS = 40


def public_settings(convert: ConvertConfig) -> dict[str, Any]:
    """The settings as the root shows them: without paths and without values of this machine."""
    # by_alias: stores keep the first names of renamed settings, so that their bytes do not change.
    shown = convert.model_dump(
        mode="json",
        by_alias=True,
        exclude={
            "workers": True,
            "labels_from": True,
            "annotated_table": True,
            "splits": {"file", "patients"},
        },
    )
    shown["slab"] = slab_settings(convert)
    shown["cleaning"].pop("spacing_table")
    for key in ("standardise", "min_slices"):
        if shown["cleaning"][key] == EARLIER_DEFAULTS[f"convert.cleaning.{key}"]:
            shown["cleaning"].pop(key)
    for key in ("modality", "channels", "register_channels", "labels", "annotated"):
        if shown[key] == EARLIER_DEFAULTS[f"convert.{key}"]:
            shown.pop(key)
    return shown


def slab_settings(convert: ConvertConfig) -> dict[str, Any]:
    """The settings of the slab, without `around` where it has no effect."""
    return convert.slab.model_dump(
        mode="json", exclude={"around"} if convert.slab.around is None else None
    )


def settings_sha256(shown: dict[str, Any]) -> str:
    """SHA-256 of `public_settings`, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def settings_that_must_match(
    dataset: str,
    convert: ConvertConfig,
    labels_from: str | None = None,
    *,
    channels: Sequence[ChannelConfig] = CT_CHANNELS,
    labels: LabelScheme = LITS_SCHEME,
) -> dict[str, Any]:
    """The settings that must be equal for a conversion to continue a store.

    Files that settings name are compared by their content.

    Args:
        dataset: Name of the data set.
        convert: Settings of the conversion.
        labels_from: Fingerprint of the run that labels scans.
        channels: Channels of the store.
        labels: Scheme of the store.

    Raises:
        UserError: A file that a setting names cannot be read.
    """
    shown = public_settings(convert)
    # A file may be edited or moved: its content decides, not its path.
    shown["splits"] |= {
        "file": _describe_content(convert.splits.file),
        "patients": _describe_content(convert.splits.patients),
    }
    if convert.annotated_table is not None:
        shown["annotated_table"] = _describe_content(convert.annotated_table)
    shown["cleaning"]["spacing_table"] = _describe_content(convert.cleaning.spacing_table)
    if labels_from is not None:
        shown["labels_from"] = labels_from
    wanted: dict[str, Any] = {"schema": SCHEMA, "dataset": dataset, "convert": shown}
    # `dataset.json` may name other channels than before, without any setting that differs.
    if tuple(channels) != CT_CHANNELS:
        wanted["channels"] = [channel.model_dump() for channel in channels]
    # The scheme may come from `dataset.json`, too.
    if labels != LITS_SCHEME:
        wanted["labels"] = describe_scheme(labels)
    return wanted


def describe_scheme(labels: LabelScheme) -> dict[str, str]:
    """Each structure of a scheme in one text, so that differences between two are readable."""
    described = {}
    for structure in labels.structures:
        inside = "" if structure.inside is None else f" inside {structure.inside}"
        values = ", ".join(map(str, structure.values))
        described[structure.name] = f"{structure.kind} {values}{inside}"
    return described


def list_setting_differences(before: object, now: dict[str, Any]) -> list[str]:
    """`convert.slab.policy was fit, is tile`, for each setting that differs.

    Args:
        before: Content of a store's settings file; anything but a dict counts as empty.
        now: Settings of this conversion.
    """
    old = (
        EARLIER_DEFAULTS | dict(_flatten(_with_labels(before))) if isinstance(before, dict) else {}
    )
    new = EARLIER_DEFAULTS | dict(_flatten(_with_labels(now)))
    differences = []
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            was, is_now = _shorten(old.get(key)), _shorten(new.get(key))
            differences.append(f"{current_key(key)} was {was}, is {is_now}")
    return differences


def _with_labels(content: dict[str, Any]) -> dict[str, Any]:
    """The settings with the scheme of LiTS, which is not recorded, written out."""
    return {**content, "labels": content.get("labels", describe_scheme(LITS_SCHEME))}


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for each value of nested dicts."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:16]}..."


def _describe_content(path: Path | None) -> str | None:
    """`sha256 <hash>` of a file that a setting names; None without a file."""
    if path is None:
        return None
    try:
        return f"sha256 {file_sha256(find_config(path))}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
