"""The optional packages of the extra `dicom`, which read and write DICOM.

pydicom parses files, python-gdcm decodes compressed pixels (JPEG lossless, JPEG-LS, JPEG 2000),
highdicom writes segmentations and reports. The core of the package works without them.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from liverseg_dist.errors import UserError

READERS = {"pydicom": "pydicom", "gdcm": "python-gdcm"}
"""Module -> name of its package."""
WRITERS = {**READERS, "highdicom": "highdicom"}


def has_dicom_packages() -> bool:
    """Whether DICOM can be read on this machine."""
    return all(importlib.util.find_spec(module) is not None for module in READERS)


def require_dicom() -> None:
    """Check that DICOM can be read. Raises `UserError` as `require_packages` does."""
    require_packages(READERS)


def require_packages(modules: dict[str, str]) -> None:
    """Check that packages are installed.

    Args:
        modules: module -> name of its package.

    Raises:
        UserError: names the missing package and the command that installs it.
    """
    for module, package in modules.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"DICOM needs the package {package}, which is not installed; "
                "pip install 'liverseg_dist[dicom]'"
            )


def load_module(name: str) -> Any:
    """A module of the extra, imported at its first use.

    Raises:
        UserError: it is not installed.
    """
    top = name.partition(".")[0]
    require_packages({top: WRITERS[top]})
    # Log records of these packages quote values of the file, too (see `quiet_pydicom`).
    logging.getLogger(top).setLevel(logging.CRITICAL + 1)
    return importlib.import_module(name)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Suppress pydicom's warnings about values that violate the standard.

    Scanners write many of them; what is needed is checked by this package. pydicom's warnings quote
    values of the file, which can contain the name of a patient.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
