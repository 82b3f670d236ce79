"""Look-up of the implementation that a setting names.

Each choice of the settings (a `Literal`) has one registry: a dictionary from name to implementation
in the package that implements it. `find_registered` reads it, so that a name which is in the
`Literal` but not in the registry is an error instead of a silent default. tests/test_registries.py
compares each registry with its `Literal`.
"""

from collections.abc import Mapping
from typing import TypeVar

from liverseg_dist.errors import UserError

Name = TypeVar("Name", bound=str)
Item = TypeVar("Item")


def find_registered(registry: Mapping[Name, Item], name: str, setting: str) -> Item:
    """Return the entry `name` of a registry.

    Args:
        registry: implementations by name.
        name: value of the setting.
        setting: key of the setting, for the error message.

    Raises:
        UserError: the registry has no such entry.
    """
    for known, item in registry.items():
        if known == name:
            return item
    raise UserError(f"{setting}={name} is not available; choose one of {', '.join(registry)}")
