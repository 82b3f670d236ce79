"""Training on any labels and channels: two channels, five classes, partly labelled cases."""

import hashlib
import json
from pathlib import Path

import pytest

from liverseg_dist.config import ChannelConfig, load_settings
from liverseg_dist.errors import EXIT_USER, UserError
from liverseg_dist.training.data_description import complete_settings
from liverseg_dist.training.resume_state import ResumeState
from liverseg_dist.training.run_folder import check_settings_compatible
from tests.data.scheme_store import CT, MR, make_scheme, write_scheme_store
from tests.distributed.launch import liverseg, torchrun

TINY = (
    "data.patch_size=[16,24,24]", "data.workers=0", "data.augmentation=strong",
    "model.features=[4,8]", "train.optimizer=adamw", "train.learning_rate=1e-3",
    "train.global_batch_size=4", "train.threads=1", "train.log_every_steps=1",
    "train.modality_dropout=0.3", "validation.every_steps=2",
)  # fmt: skip
FIVE = make_scheme(5, lesions=2)


def arguments(store: Path, run: Path, *overrides: str, steps: int = 2) -> list[str]:
    base = ["train", "--device", "cpu", f"data.store={store}", f"run.dir={run}"]
    return [*base, f"train.max_steps={steps}", *TINY, *overrides]


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Case 0 is validated; 1 and 2 are partly annotated, 3 lacks the second channel."""
    path = tmp_path_factory.mktemp("any") / "store.zarr"
    annotated = {0: ("organ 1", "lesion 5"), 1: ("organ 1",), 2: ("organ 2", "organ 3")}
    return write_scheme_store(path, FIVE, (CT, MR), annotated, absent={3: (1,)})


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any_run") / "run"
    done = liverseg(*arguments(store, folder, "loss.class_weights={lesion 5: 3}"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_records_and_scores_every_structure(run: Path) -> None:
    settings = load_settings([run / "config.yaml"])
    assert settings.data.label_scheme == FIVE
    assert [channel.name for channel in settings.data.image_channels] == ["CT", "T1"]
    assert settings.data.intensities[1] is None, "each MR scan has its own normalisation"
    assert (settings.model.in_channels, settings.model.out_channels) == (2, 6)
    trained, _, validated = read_metrics(run)
    for name in FIVE.structure_names:
        assert f"train/pseudo_dice_{name}" in trained
    # The validated case has two annotated structures: the others have no score.
    scored = {name.removeprefix("validation/dice_") for name in validated if "/dice_" in name}
    expected = {"organ 1", "lesion 5"}
    assert scored == expected | {f"global_{name}" for name in expected}
    mean = sum(validated[f"validation/dice_{name}"] for name in expected) / 2
    assert validated["validation/score"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("classes", "kinds", "overrides"),
    [
        (1, (CT,), ("model.regions=true",)),
        (16, (CT, MR, CT.model_copy(update={"name": "late"}), ChannelConfig(name="early")), ()),
    ],
    ids=["one region of one channel", "16 classes of four channels"],
)
def test_other_numbers_of_classes_and_channels(
    tmp_path: Path, classes: int, kinds: tuple, overrides: tuple[str, ...]
) -> None:
    labels = make_scheme(classes, lesions=min(3, classes - 1))
    path = write_scheme_store(tmp_path / "s.zarr", labels, kinds, cases=2)
    done = liverseg(*arguments(path, tmp_path / "run", *overrides, steps=1))
    assert done.returncode == 0, done.stderr[-3000:]
    settings = load_settings([tmp_path / "run" / "config.yaml"])
    outputs = classes if settings.model.regions else classes + 1
    assert (settings.model.in_channels, settings.model.out_channels) == (len(kinds), outputs)


def test_a_run_is_not_continued_on_other_labels_or_channels(run: Path, tmp_path: Path) -> None:
    weights = "loss.class_weights={lesion 5: 3}"
    other_labels = write_scheme_store(tmp_path / "a.zarr", make_scheme(3, 1), (CT, MR))
    done = liverseg(*arguments(other_labels, run, "loss.class_weights=none"))
    assert done.returncode == EXIT_USER
    line = done.stderr.strip().splitlines()[-1]
    assert "this run segments organ 1 (organ 1+4+5), organ 2 (organ 2)" in line
    assert "the store has organ 1 (organ 1+3), organ 2 (organ 2), lesion 3 (lesion 3 in" in line
    late = CT.model_copy(update={"name": "late"})
    other_channels = write_scheme_store(tmp_path / "b.zarr", FIVE, (CT, late))
    done = liverseg(*arguments(other_channels, run, weights))
    assert done.returncode == EXIT_USER
    line = done.stderr.strip().splitlines()[-1]
    assert "reads 2 channels: CT (CT, ct), T1 (MR, zscore), the store has 2 channels: CT (C" in line


def test_settings_that_contradict_the_store_are_refused(store: Path, tmp_path: Path) -> None:
    done = liverseg(*arguments(store, tmp_path / "run", "model.in_channels=1"))
    assert done.returncode == EXIT_USER
    assert "model.in_channels is 2, not 1: the store decides it" in done.stderr
    done = liverseg(*arguments(store, tmp_path / "run", "loss.class_weights={tumour: 3}"))
    assert done.returncode == EXIT_USER
    assert "names tumour; the classes are background, organ 1, organ 2, organ 3" in done.stderr


def test_runs_of_earlier_versions_can_be_continued() -> None:
    """They record neither labels nor channels: they have those of LiTS and one CT."""
    old = load_settings()
    now = complete_settings(old)
    assert old.data.labels is None
    assert now.model.out_channels == 3
    check_settings_compatible(old, now, Path("run"))
    data = now.data.model_copy(update={"labels": FIVE.to_json()})
    other = complete_settings(now.model_copy(update={"data": data}))
    with pytest.raises(UserError, match=r"segments liver \(organ 1\+2\), tumour \(lesion 2 in l"):
        check_settings_compatible(old, other, Path("run"))


def test_the_dice_of_many_structures_fits_in_a_line() -> None:
    dice = {f"organ {number}": number / 20 for number in range(1, 17)}
    text = ResumeState(last_dice=dice, last_dice_step=3).describe_dice()
    assert text == "Dice mean 0.425 of 16 structures, lowest organ 1 0.050 (step 3)"
    few = ResumeState(last_dice={"liver": 0.9, "tumour": 0.5}).describe_dice()
    assert few == "Dice liver 0.900, tumour 0.500"


@pytest.mark.distributed
def test_several_ranks_and_a_restart_give_the_bytes_of_one_rank(
    store: Path, tmp_path: Path
) -> None:
    """With dropped and absent channels and partly labelled cases in the batch of each rank."""
    same = ("train.deterministic_reduction=true", "train.micro_batch_size=1")
    alone = liverseg(*arguments(store, tmp_path / "alone", *same, steps=4))
    assert alone.returncode == 0, alone.stderr[-3000:]
    run = tmp_path / "several"
    for ranks, stop in ((2, 2), (3, 0)):
        again = ["-m", "liverseg_dist"]
        again += arguments(store, run, *same, f"train.stop_at_step={stop}", steps=4)
        done = torchrun(ranks, *again)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "continues at step 2 of 4" in done.stdout
    assert sha256(run) == sha256(tmp_path / "alone")
    dice = [m["train/pseudo_dice_organ 1"] for m in read_metrics(run) if "train/loss" in m]
    assert len(dice) == 4


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_every_strategy_trains_partly_labelled_regions(
    store: Path, tmp_path: Path, strategy: str
) -> None:
    settings = (f"train.strategy={strategy}", "model.regions=true", "loss.name=dice_ce_boundary")
    command = ["-m", "liverseg_dist", *arguments(store, tmp_path / "run", *settings)]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [m["train/loss"] for m in read_metrics(tmp_path / "run") if "train/loss" in m]
    assert len(losses) == 2
    assert (tmp_path / "run" / "model.safetensors").is_file()
