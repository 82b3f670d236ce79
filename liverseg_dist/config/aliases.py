"""Settings keys that were renamed: the old names still work, and a warning names the new ones.

Users' YAML files, command lines and the files of earlier runs hold the old names. They are replaced
before the settings are validated, so the rest of the program only uses the new names. To rename a
key, rename the field and add a row here.

The settings that a store records (`convert.*`) keep their old names there: the field has a
`serialization_alias`, so that the bytes and hashes of stores do not change.
"""

import logging
from collections.abc import Iterator
from typing import Any

from liverseg_dist.errors import UserError
from liverseg_dist.logging_setup import ONCE

RENAMED_KEYS = {
    "convert.cleaning.thick_order": "convert.cleaning.order_z",
    "data.unreadable": "data.on_read_error",
    "train.nonfinite": "train.on_nonfinite",
    "inference.tumour_threshold": "inference.lesion_threshold",
    "inference.tumour_reach_mm": "inference.reach_mm",
    "inference.tumour_cut_mm": "inference.cut_mm",
    "inference.min_tumour_ml": "inference.min_volume_ml",
}
"""Old dotted key -> present key. Only the last part of a key may differ."""

_logger = logging.getLogger(__name__)
_reported: set[str] = set()
"""Old keys that this process has warned about."""


def former_name(key: str) -> str:
    """Return the former last part of a dotted key; the present one where it never changed."""
    for old, new in RENAMED_KEYS.items():
        if new == key:
            return old.rpartition(".")[2]
    return key.rpartition(".")[2]


def current_key(key: str) -> str:
    """Return the present name of a dotted settings key."""
    return RENAMED_KEYS.get(key, key)


def replace_old_keys(settings: dict[str, Any], source: str, *, warn: bool = True) -> None:
    """Rename old keys in a nested mapping of settings, in place.

    Args:
        settings: nested sections as read from a file or an override.
        source: file, or "command line", for the messages.
        warn: log one line per old key and process. Not for files that the program wrote itself.

    Raises:
        UserError: a key is given with its old and its present name.
    """
    for old, new in RENAMED_KEYS.items():
        for section in _sections_with(settings, old):
            old_name, new_name = old.rpartition(".")[2], new.rpartition(".")[2]
            if new_name in section:
                raise UserError(f"{source}: {old} is the old name of {new}; give only {new}")
            section[new_name] = section.pop(old_name)
            if warn and old not in _reported:
                _reported.add(old)
                _logger.warning("%s: %s is deprecated, use %s", source, old, new, extra=ONCE)


def _sections_with(settings: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Yield the mapping that holds the last part of a dotted key, if there is one."""
    *parents, name = key.split(".")
    section: Any = settings
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if isinstance(section, dict) and name in section:
        yield section
