"""What several rooms' tests stand on: a small phantom set, its store, and the real CTs where they are."""

import os
from pathlib import Path

import hypothesis
import pytest

from liverseg_dist.commands.main import main

hypothesis.settings.register_profile("project", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]
SMALL_STORE = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2", "convert.workers=1")
"""Coarse voxels: what is tested is the machinery, and a patch of 16 x 32 x 32 holds most of a liver."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("LIVERSEG_LONG"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def phantom_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled small phantoms and one without label, in the Task03 layout. Read only."""
    folder = tmp_path_factory.mktemp("phantom") / "Task03_Phantom"
    assert main(["phantom", str(folder), "--cases", "6", "--test-cases", "1", "--seed", "3"]) == 0
    return folder


@pytest.fixture(scope="session")
def phantom_store(phantom_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms, converted at 6 mm with two folds and one test case. Read only."""
    store = tmp_path_factory.mktemp("store") / "store.zarr"
    assert main(["convert", str(phantom_source), str(store), *SMALL_STORE]) == 0
    return store


@pytest.fixture(scope="session")
def real_mini() -> Path:
    """Real CTs in the Task03 layout; they are not part of the repository."""
    folder = Path(
        os.environ.get("LIVERSEG_REAL_MINI", ROOT.parent / "shared" / "data" / "real_mini")
    )
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no real CTs at {folder}; set LIVERSEG_REAL_MINI to a folder that has them")
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where LIVERSEG_NO_SKIPS is set (CI), a skipped check must not pass for a done one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = (
        reporter.stats.get("skipped", [])
        if reporter and os.environ.get("LIVERSEG_NO_SKIPS")
        else []
    )
    if skipped:
        reporter.write_line(
            f"{len(skipped)} skipped where nothing may be: {skipped[0].nodeid} ...", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
