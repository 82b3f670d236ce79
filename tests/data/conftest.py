"""Fixtures of the data room."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_mini() -> Path:
    """The folder of real CTs; tests that need it are skipped, and say so, where it is missing."""
    folder = Path(os.environ.get("LIVERSEG_REAL_MINI", ROOT.parent / "shared" / "data" / "real_mini"))
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"the real CTs are not at {folder} (set LIVERSEG_REAL_MINI)")
    return folder
