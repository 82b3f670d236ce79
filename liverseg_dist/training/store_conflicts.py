"""Settings that the user gives although the store has fixed them.

Voxel size, cleaning and splits are decided when a store is made. `train` and `launch train` use this module to
report such settings before any work starts.
"""

from collections.abc import Sequence

from liverseg_dist.config import Settings
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.training.components import settings_conflicting_with_store


def describe_store_conflicts(settings: Settings, store: CaseStore, overrides: Sequence[str]) -> str:
    """Describe the settings that differ from those of the store.

    A config file may serve several conversions and runs, so a conflict in a file is only a warning.
    A conflict on the command line is a mistake in this call.

    Args:
        overrides: the `KEY=VALUE` arguments of the command line.

    Returns:
        One line for a warning; empty without conflicts.

    Raises:
        UserError: a setting of the command line conflicts with the store.
    """
    overridden = [override.partition("=")[0] + "." for override in overrides]
    conflicts = settings_conflicting_with_store(settings, store)
    for conflict in conflicts:
        key = conflict.partition(" ")[0] + "."
        # An override may name the key itself, a section above it, or a key below it.
        if any(key.startswith(given) or given.startswith(key) for given in overridden):
            raise UserError(
                f"{conflict}: the store decides it ({store.path}); "
                "remove it from the command line, or convert again"
            )
    if not conflicts:
        return ""
    return f"{store.path} decides: {'; '.join(conflicts)}; for these convert with --config"
