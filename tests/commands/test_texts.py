"""What users write and call their files, through the commands: every command follows the same rules."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER
from tests.distributed.launch import liverseg
from tests.inference.small_run import SmallRun, shared_small_run

THREAD = ("--device", "cpu", "--threads", "1")
LATIN = os.fsdecode(b"caf\xe9")

ROOT = Path(__file__).parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


def test_predict_score_and_postprocessing_names_agree(
    small_run: SmallRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images, masks and truths of one scan under names of several systems."""
    source, images, truths = small_run.source, tmp_path / "images", tmp_path / "truths"
    images.mkdir()
    truths.mkdir()
    nfc, nfd = "Müller", unicodedata.normalize("NFD", "Müller")
    names = {"liver_0": (f"{LATIN}.nii.gz", f"{LATIN}.nii.gz"), "liver_1": ("volume-7.NII.GZ", "segmentation-7.nii.gz"),
             "liver_2": (f"{nfd}_0000.nii.gz", f"{nfc}.nii.gz")}  # fmt: skip
    for case, (image, truth) in names.items():
        shutil.copy(source / "imagesTr" / f"{case}.nii.gz", images / image)
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", truths / truth)
    (images / "x.nrrd").touch()
    (images / "broken\xa0.nii").write_bytes(b"no scan")
    monkeypatch.setenv("PLACE", str(tmp_path))
    code, out, err = call(
        capsys, "predict", small_run.run, "$PLACE/images", "--out", "${PLACE}/m", *THREAD
    )
    assert code == EXIT_FAILED
    assert "NRRD is not read: x.nrrd" in err
    assert sorted(p.name for p in (tmp_path / "m").glob("*.nii.gz")) == [
        f"{nfc}.nii.gz",
        "caf%E9.nii.gz",
        "volume-7.nii.gz",
    ]
    table = (tmp_path / "m" / "volumes.csv").read_text(encoding="utf-8")
    assert [line.split(",")[:2] for line in table.splitlines()[1:]] == [
        [nfc, "done"],
        ["broken", "failed"],
        ["caf%E9", "done"],
        ["volume-7", "done"],
    ]
    assert "caf%E9: liver" in out
    code, out, err = call(
        capsys, "score", tmp_path / "m", truths, "--out", tmp_path / "s", "--workers", 1, "--json"
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["n_cases"] == 3
    assert "warning" not in err, "what predict writes beside its masks is no surprise"
    assert "caf%E9" in (tmp_path / "s" / "cases.csv").read_text(encoding="utf-8")
    assert "caf%E9" in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("what", ["missing.nii.gz", "broken.nii.gz", "scan.nrrd", "series"])
def test_nothing_is_left_where_nothing_could_be_read(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, exists: bool
) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    (tmp_path / "scan.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "a.dcm").touch()
    out = tmp_path / "a" / "m"
    if exists:
        out.mkdir(parents=True)
    code, printed, err = call(
        capsys, "predict", small_run.run, tmp_path / what, "--out", out, *THREAD
    )
    assert code == EXIT_USER
    assert {
        "missing.nii.gz": "no such file",
        "broken.nii.gz": "NIfTI",
        "scan.nrrd": "SimpleITK",
        "series": "liverseg to-nifti",
    }[what] in err
    assert "table:" not in printed
    assert list(out.iterdir()) == [] if exists else not out.parent.exists()


def test_an_earlier_table_stays(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = small_run.source / "imagesTr" / "liver_0.nii.gz"
    assert call(capsys, "predict", small_run.run, scan, "--out", tmp_path / "m", *THREAD)[0] == 0
    missing = tmp_path / "missing.nii"
    assert (
        call(capsys, "predict", small_run.run, missing, "--out", tmp_path / "m", *THREAD)[0]
        == EXIT_USER
    )
    assert "liver_0,done" in (tmp_path / "m" / "volumes.csv").read_text()


def test_tables_of_convert_are_matched_aloud(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spacing.csv").write_text(
        "\ufeffcase;z_mm;y_mm;x_mm\r\nliver_0;2,5;1;1\r\nother;1;1;1\r\n", "utf-8"
    )
    words = ["convert", phantom_source, tmp_path / "s", "--dry-run", "convert.workers=1", "--json"]
    code, out, err = call(capsys, *words, f"convert.cleaning.spacing_table={tmp_path}/spacing.csv")
    assert code == 0, err
    assert "1 row(s) name no scan of this data set: other" in err
    assert json.loads(out.splitlines()[-1])["audit"]["liver_0"]["facts"]["spacing_mm"] == [
        2.5,
        1.0,
        1.0,
    ]
    (tmp_path / "none.csv").write_text("case,z_mm,y_mm,x_mm\nother,1,1,1\n")
    code, _, err = call(capsys, *words, f"convert.cleaning.spacing_table={tmp_path}/none.csv")
    assert (code, "no row names a scan" in err) == (EXIT_USER, True)


def test_convert_reads_a_name_that_is_not_utf8(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "d" / part).mkdir(parents=True)
        for case, name in (("liver_0", LATIN), ("liver_1", "b")):
            shutil.copy(
                phantom_source / part / f"{case}.nii.gz", tmp_path / "d" / part / f"{name}.nii.gz"
            )
    words = [
        "convert",
        tmp_path / "d",
        tmp_path / "s",
        "convert.workers=1",
        "convert.splits.folds=2",
        "--json",
    ]
    code, out, err = call(capsys, *words, "convert.cleaning.spacing_mm=[6,6,6]")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["counts"]["kept"] == 2
    assert "caf%E9" in (tmp_path / "s" / "audit.html").read_text(encoding="utf-8")
    assert call(capsys, "verify", tmp_path / "s")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tarin"], "did you mean 'train'?"),
        (["train", "--confg", "x"], "did you mean --config?"),
        (["predict", "r", "s", "--out", "o", "--probabilites"], "did you mean --probabilities?"),
        (["score", "a", "b", "--out", "$NOT_SET_AT_ALL/x"], "NOT_SET_AT_ALL is not set"),
        (["evaluate", "r", "--store", "$NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
    ],
)
def test_the_parser_helps(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == EXIT_USER
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["settings", "train.optimzer"], "did you mean train.optimizer?"),
        (["settings", "optimizer"], "did you mean train.optimizer?"),
        (["settings", "lr"], "did you mean train.learning_rate?"),
        (["train", "patch_size=[1,2,3]"], "unknown key patch_size; did you mean data.patch_size?"),
        (
            ["train", "data.patch_size=32"],
            "data.patch_size = 32: not a list; expected list of 3 whole number",
        ),
        (["train", "data.patch_size=32"], "e.g. data.patch_size=[64,128,128]"),
        (["train", "data.patch_size=[64,64]"], "too few items"),
        (
            ["train", "data.patch_size=[64,a,64]"],
            "data.patch_size, item 2 = 'a': not a whole number",
        ),
        (["train", "train=3"], "this is a section of settings"),
        (
            ["train", "model.regions=maybe"],
            "neither true nor false; expected true | false, e.g. model.regions=false",
        ),
        (["train", "--config", "$NOT_SET_AT_ALL/a.yaml"], "NOT_SET_AT_ALL"),
        (["predict", "r", "$NOT_SET_AT_ALL/a.nii", "--out", "o"], "NOT_SET_AT_ALL is not set"),
        (["compare", "$NOT_SET_AT_ALL", "b"], "NOT_SET_AT_ALL is not set"),
        (["convert", "a", "b", "--splits", "$NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["preview", "~nobody-of-that-name/s", "--out", "x.png"], "no such user"),
    ],
)
def test_mistakes_are_told_in_plain_words(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == EXIT_USER
    assert said in capsys.readouterr().err


def test_a_long_tmpdir(phantom_source: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    words = ("convert", phantom_source, tmp_path / "s", "--dry-run", "convert.workers=2")
    done = liverseg(*words, TMPDIR=str(long))
    assert done.returncode == 0, done.stderr
    assert not list(long.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_shared_memory_that_cannot_be_written_is_named(
    phantom_source: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "liverseg_dist",
        "convert",
        str(phantom_source),
        str(tmp_path / "s"),
        "--dry-run",
    ]
    script = 'mount -t tmpfs -o ro tmpfs /dev/shm || exit 77; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command], capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine does not let root mount")
    assert done.returncode == EXIT_USER
    assert "/dev/shm: worker processes need it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["liverseg_dist", "launch"])
def test_a_deleted_working_directory(module: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f'cd gone && rmdir ../gone && exec "{sys.executable}" -m {module} train run.dir=x'
    # `launch` is not installed under this name: it is found in the checkout.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == EXIT_USER
    assert "the working directory no longer exists" in done.stderr.splitlines()[-1]
