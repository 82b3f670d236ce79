"""Choice of the post-processing: codes give the predictor's labels; only what helps is kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from liverseg_dist.commands.main import main
from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.label_codes import THRESHOLDS, LabelCodes
from liverseg_dist.inference.load_run import load_run
from liverseg_dist.inference.postprocess_operations import OPTIONS, list_operations
from liverseg_dist.inference.postprocess_search import compute_mean_dice, decide_operation
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.structure_settings import dump_inference
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.model.outputs import OutputChannels
from tests.distributed.launch import torchrun
from tests.inference.models import Random
from tests.inference.small_run import SmallRun

CPU = torch.device("cpu")


def make_predictor(regions: bool, threshold: float) -> SlidingWindowPredictor:
    return SlidingWindowPredictor(
        Random(),
        (8, 8, 8),
        OutputChannels(regions=regions),
        InferenceConfig(lesion_threshold=threshold),
        CPU,
    )


@pytest.mark.parametrize("regions", [False, True])
def test_codes_give_the_labels_for_every_threshold(regions: bool) -> None:
    values = torch.rand(2, 12, 30, 30, generator=torch.Generator().manual_seed(0))
    values[:, 0, 0, : len(THRESHOLDS)] = torch.tensor(THRESHOLDS)  # exactly on the threshold
    if not regions:
        values = values / values.sum(0).clamp(min=1)
    encoder = LabelCodes(OutputChannels(regions=regions))
    codes = encoder.encode(values)
    assert codes.dtype == np.uint8
    for threshold in OPTIONS["lesion_threshold"]:
        expected = make_predictor(regions, threshold).assign_labels(values)
        thresholds = {"tumour": threshold} if threshold else {}
        assert np.array_equal(encoder.decode(codes, thresholds), expected), threshold
        assert set(np.unique(expected)) == {0, 1, 2}


def test_mean_dice_ignores_unknown_voxels() -> None:
    truth, mask = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    truth[0], mask[0] = 1, 1
    truth[0, 0], mask[0, 0, :2] = 2, 2
    assert compute_mean_dice(mask, truth, LITS_SCHEME) == (1 + 2 * 2 / 6) / 2
    truth[3], mask[3] = 255, 2
    assert compute_mean_dice(mask, truth, LITS_SCHEME) == (1 + 2 * 2 / 6) / 2


def make_scores(*gains: float) -> dict[str, list[float]]:
    """Scores of two options per case; the second one has these gains."""
    return {f"c{i:02}": [0.5, 0.5 + gain] for i, gain in enumerate(gains)}


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ((0.01,) * 6, True),
        ((0.0,) * 6, False),
        ((-0.01,) * 6, False),
        ((0.0, 0.0, 0.0, 0.2, 0.0, 0.0), False),  # one case: chosen without it, the option is off
        ((0.0, 0.1, 0.0, 0.2, 0.0, 0.0), True),
        ((-0.02, -0.02, 0.3, -0.02, 0.3, -0.02), False),  # more cases get worse than better
    ],
)
def test_an_operation_is_kept_only_if_it_helps_on_held_out_cases(
    gains: tuple[float, ...], kept: bool
) -> None:
    assert decide_operation("fill_holes", (False, True), make_scores(*gains)).kept is kept


def test_the_cross_validated_score_uses_choices_made_without_the_case() -> None:
    """Two cases with opposite best options: each is scored with the best option of the other."""
    found = decide_operation(
        "fill_holes", (False, True), {"a": [0.2, 0.8], "b": [0.9, 0.5]}, folds=2
    )
    assert (found.score_cross_validated, found.score_before) == (
        pytest.approx(0.35),
        pytest.approx(0.55),
    )
    assert found.scores == (pytest.approx(0.55), pytest.approx(0.65))
    assert (found.better, found.worse, found.kept) == (0, 1, False)


@pytest.fixture(scope="module")
def run(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on all folds; its three cases are enough for a choice."""
    run = tmp_path_factory.mktemp("tuning") / "run"
    shutil.copytree(small_run.run, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["fold"] = "all"
    settings["inference"]["min_volume_ml"] = 0.2  # set by hand; the choice replaces it
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_the_choice_is_saved_with_the_run_and_used(
    run: Path, small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "postprocess",
        str(run),
        "--store",
        str(small_run.store),
        "--part",
        "train",
        "--device",
        "cpu",
        "--json",
    ]
    assert main([*line, "--dry-run"]) == 0
    assert not (run / "postprocess.yaml").exists()
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(line) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["chosen"] == first["chosen"]
    assert result["chosen"], "this network finds small false livers, so an operation helps"
    assert result["score"] > result["score_before"]
    settings = dump_inference(load_run(run, CPU).settings.inference, LITS_SCHEME)
    for name, operation in list_operations(LITS_SCHEME).items():
        assert settings[name] == result["chosen"].get(name, operation.options[0])
    assert load_run(run, CPU, ["inference.min_tumour_ml=7"]).settings.inference.min_volume_ml == 7
    assert load_run(run, CPU, postprocessed=False).settings.inference.min_volume_ml == 0.2
    # evaluate gives the score that the search predicted for these cases
    choice = json.loads((run / "evaluation" / "postprocess" / "choice.json").read_text())
    kept = [decision for decision in choice["decisions"] if decision["kept"]]
    ids = ",".join(sorted(path.stem for path in (run / "evaluation" / "postprocess").glob("*.npz")))
    common = [
        "evaluate",
        str(run),
        "--store",
        str(small_run.store),
        "--cases",
        ids,
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main(common) == 0
    summary = json.loads((run / "evaluation" / "cases" / "summary.json").read_text())
    found = (summary["liver"]["dice_per_case"] + summary["tumour"]["dice_per_case"]) / 2
    assert found == pytest.approx(max(kept[-1]["scores"]), abs=1e-12)


@pytest.mark.distributed
def test_two_ranks_make_the_same_choice_and_name_a_failed_rank(
    run: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    copies = [Path(shutil.copytree(run, tmp_path / name)) for name in ("one", "two", "failing")]
    options = [
        "--store",
        str(small_run.store),
        "--part",
        "train",
        "--device",
        "cpu",
        "--timeout",
        "30",
    ]
    assert main(["postprocess", str(copies[0]), *options]) == 0
    done = torchrun(2, "-m", "liverseg_dist", "postprocess", str(copies[1]), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    choices = [
        json.loads((copy / "evaluation" / "postprocess" / "choice.json").read_text())
        for copy in copies[:2]
    ]
    assert choices[0] == choices[1]
    (tmp_path / "failing.py").write_text(FAILING)
    done = torchrun(2, str(tmp_path / "failing.py"), "postprocess", str(copies[2]), *options)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("liverseg:")]
    assert errors, done.stderr[-3000:]
    assert all("rank 1 on " in line and "KeyError" in line for line in errors), errors
    reports = list((copies[2] / "evaluation" / "postprocess" / "errors").glob("*rank1.txt"))
    assert "missing on rank 1" in reports[0].read_text()


FAILING = """
import os, sys
from liverseg_dist.commands.main import main
from liverseg_dist.inference.postprocess_search import PostprocessSearch
def fail(self, *_):
    raise KeyError("missing on rank 1")
if os.environ["RANK"] == "1":
    PostprocessSearch.try_options = fail
sys.exit(main(sys.argv[1:]))
"""


def test_too_few_cases_are_refused(small_run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["postprocess", str(small_run.run), "--store", str(small_run.store), "--device", "cpu"]
    assert main(line) == 2
    assert "the choice needs 3" in capsys.readouterr().err
