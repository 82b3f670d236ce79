"""What an ill-meant or talkative data set must not reach, after every command has run over it (`hostile`)."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.sweep.journal import Rung, Trial
from launch.sweep.sweep_config import SweepSettings
from launch.sweep.sweep_page import render_sweep_page as render_sweep
from tests.distributed.launch import clean_environment
from tests.security.hostile import CLINIC, EVIL_CASE, EVIL_TEXT, PATIENT, write_hostile_source

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)


@dataclass(frozen=True)
class Outcome:
    out: Path
    source: Path
    codes: dict[str, int]
    said: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("hostile")
    source, out = write_hostile_source(folder / CLINIC / "Task03"), folder / "out"
    command = [sys.executable, "-m", "tests.security.hostile", str(out), str(source)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Outcome(out, source, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def content(path: Path) -> bytes:
    """Unpacked, where it can be: one of the scans was cut short."""
    packed = path.read_bytes()
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError):
        return packed


def test_all_commands_have_done_their_work(outcome: Outcome) -> None:
    """The scan that was cut short fails alone; without this the other tests might look at nothing."""
    assert outcome.codes == {
        "convert": 0,
        "train": 0,
        "evaluate": 1,
        "predict": 1,
        "score": 2,
        "verify": 0,
    }
    kinds = {path.name.split(".")[0] for path in files(outcome.out)}
    assert {
        "audit",
        "report",
        "summary",
        "cases",
        "volumes",
        "metrics",
        "config",
        "manifest",
        "events",
    } <= kinds
    assert PATIENT[:5].encode() in content(outcome.source / "imagesTr" / "liver_0.nii.gz")


@pytest.mark.parametrize("word", [PATIENT[:5], "PatientName", CLINIC])
def test_no_result_tells_the_patient_or_where_the_scans_lay(outcome: Outcome, word: str) -> None:
    """The copied label is the test's own. The terminal may name a file that the user gave; nothing of its header."""
    told = [
        path
        for path in files(outcome.out)
        if word.encode() in content(path) and path.name != "liver_0.nii.gz"
    ]
    assert told == []
    if word != CLINIC:
        assert word not in outcome.said


def test_nothing_is_writable_for_everybody_though_the_umask_was_0(outcome: Outcome) -> None:
    assert [
        path for path in [outcome.out, *outcome.out.rglob("*")] if path.stat().st_mode & 0o002
    ] == []


def test_no_name_leaves_its_folder(outcome: Outcome) -> None:
    assert {path.name for path in outcome.out.parent.iterdir()} == {"out", CLINIC}


def sweep_page() -> str:
    settings = SweepSettings.model_validate(
        {
            "sweep": {
                "space": {"data.augmentation": {"type": "choice", "values": ["light", "none"]}},
                "folds": [0, 1],
            },
            "data": {"store": f"/data/{EVIL_CASE}"},
            "train": {"max_steps": 4},
        }
    )
    rungs = [Rung.from_folds(4, {"0": {"score": 0.4, "liver": 0.4}}, "end", 3.0)]
    trials = [
        Trial(0, EVIL_CASE, {"data.augmentation": EVIL_TEXT}, [], "failed", EVIL_TEXT),
        Trial(1, "b", {"data.augmentation": "light"}, rungs, "finished"),
    ]
    return render_sweep(
        settings,
        trials,
        {
            "steps_run": 6,
            "steps_unpruned": 8,
            "fold_hours": 0.1,
            "gpu_hours": 0.0,
            "last_session": {},
        },
    )


def opened(page: Path, profile: Path) -> str:
    """The page's elements after its scripts have run in headless Chromium."""
    assert CHROMIUM is not None
    options = (f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom")
    command = [CHROMIUM, *FLAGS, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_page_runs_what_the_data_says(outcome: Outcome, tmp_path: Path) -> None:
    (tmp_path / "open.html").write_text(f"<title>{EVIL_TEXT}</title>{EVIL_CASE}")
    assert "data-owned" in opened(tmp_path / "open.html", tmp_path / "profile"), (
        "the test would see a script that runs"
    )
    (tmp_path / "sweep.html").write_text(sweep_page())
    pages = {path.parent.name: path for path in files(outcome.out) if path.suffix == ".html"}
    assert len(pages) == 3  # audit, evaluation, scores
    for page in (*pages.values(), tmp_path / "sweep.html"):
        elements = opened(page, tmp_path / "profile")
        assert "dataset.owned" in elements, f"{page} tells nothing of the evil name"
        assert "data-owned" not in elements, page


def test_tensorboard_shows_settings_as_text(outcome: Outcome) -> None:
    """Its text page is markdown, which a setting's value could end and go on as HTML: TensorBoard cleans it."""
    with warnings.catch_warnings():  # of the HTML parser that TensorBoard brings along
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html
    (run,) = outcome.out.glob("run_*")
    board = EventAccumulator(str(run)).Reload()
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert EVIL_CASE in text  # the folder's name
    for markdown in (text, f"```\n{EVIL_TEXT}\n{EVIL_CASE}"):
        shown = markdown_to_safe_html(markdown)
        assert "&lt;img" in shown
        assert not re.search(r"<(script|img|svg)", shown)
