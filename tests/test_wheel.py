"""The wheel is complete: built from what git tracks, installed elsewhere, and used from another working directory.

No network: setuptools, build and the dependencies are those of the environment that runs the tests.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"liverseg_dist": "liverseg_dist", "launch": "liverseg_launch"}
MAPPED = {"configs": "liverseg_dist/configs", "slurm": "liverseg_launch/batch_files"}
NOT_INSTALLED = {"configs/LOG.md"}
SHORT = (
    "train.max_steps=4", "validation.every_steps=100", "checkpoint.every_steps=4", "train.threads=1",
    "convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2", "convert.splits.test_fraction=0.2",
    "data.patch_size=[16,32,32]",
)  # fmt: skip


def tracked_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def clean_environment() -> dict[str, str]:
    """Without anything by which the checkout could be found."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SLURM", "LIVERSEG"))
    }
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("clean") / "source"
    for name in tracked_files():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    dist = source.parent / "dist"
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    done = subprocess.run(
        words, capture_output=True, text=True, env=clean_environment(), cwd=source.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "absent from the `packages`" not in done.stdout + done.stderr
    return dist


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (found,) = archives.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment that has the wheel; its dependencies are those of this environment."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files (an editable installation's) are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = home / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    subprocess.run(
        [*pip, "--force-reinstall", str(wheel)], check=True, env=clean_environment(), cwd=home
    )
    return home / "bin"


def expected_files() -> set[str]:
    """The wheel's files, from what git tracks."""
    found = set()
    for name in tracked_files():
        top, _, rest = name.partition("/")
        # Pages about a folder are for readers of the repository.
        if name in NOT_INSTALLED or not rest or name.endswith("/README.md"):
            continue
        if top in NAMES:
            found.add(f"{NAMES[top]}/{rest}")
        elif top in MAPPED:
            found.add(f"{MAPPED[top]}/{rest}")
    return found


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, extra = expected_files() - names, names - expected_files()
    assert not missing, (
        f"not in the wheel (list new folders in pyproject.toml, [tool.setuptools]): {sorted(missing)}"
    )
    assert not extra
    assert {name.partition("/")[0] for name in names} == {"liverseg_dist", "liverseg_launch"}


def use(bin_folder: Path, folder: Path, *words: str, code: int = 0) -> str:
    """Run an installed script in `folder`; its standard output."""
    command = [str(bin_folder / words[0]), *words[1:]]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == code, f"{words}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout + (done.stderr if code else "")


@pytest.fixture(scope="module")
def demo(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of `liverseg demo`, shortened."""
    folder = tmp_path_factory.mktemp("elsewhere")
    output = use(
        bin_folder, folder, "liverseg", "demo", "--cases", "4", "--out", "out", "--json", *SHORT
    )
    result = json.loads(output.splitlines()[-1])
    assert result["summary"]["n_cases"] >= 1
    return folder


def test_the_installed_code_is_what_runs(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, liverseg_dist, liverseg_launch; print(u.find_spec('launch'))"
    )
    code += "; print(liverseg_dist.__file__, liverseg_launch.__file__)"
    none, files = use(bin_folder, tmp_path, "python", "-c", code).splitlines()
    assert none == "None", "no top-level package `launch`"
    assert files.count(str(bin_folder.parent)) == 2


def test_score_and_report_work_from_the_wheel(bin_folder: Path, tmp_path: Path) -> None:
    """Templates of pages are data files: they are found beside the installed code only."""
    phantoms = ("phantom", "data", "--cases", "1", "--size", "small")
    use(bin_folder, tmp_path, "liverseg", *phantoms)
    masks = str(tmp_path / "data" / "labelsTr")
    use(bin_folder, tmp_path, "liverseg", "score", masks, masks, "--out", "scores")
    report = tmp_path / "scores" / "report.html"
    report.unlink()
    use(bin_folder, tmp_path, "liverseg", "report", "scores")
    assert "<script" in report.read_text()


@pytest.mark.long
def test_demo_works_from_the_wheel(bin_folder: Path, demo: Path) -> None:
    report = demo / "out" / "run" / "evaluation" / "report.html"
    report.unlink()
    use(bin_folder, demo, "liverseg", "report", "out/run/evaluation")
    assert "<script" in report.read_text()


@pytest.mark.long
def test_shipped_configs_are_found_from_any_folder(bin_folder: Path, tmp_path: Path) -> None:
    shown = use(bin_folder, tmp_path, "liverseg", "settings", "--configs")
    assert "configs/demo_cpu.yaml" in shown
    words = ("liverseg", "train", "--config", "configs/demo_cpu.yaml", "--print-config")
    assert "preset: tiny" in use(bin_folder, tmp_path, *words)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo_cpu.yaml").write_text("seed: 77\n")
    assert "seed: 77" in use(bin_folder, tmp_path, *words), "the user's own file comes first"
    refusal = use(bin_folder, tmp_path, "liverseg", "train", "--config", "configs/nix.yaml", code=2)
    assert "configs/demo_cpu.yaml" in refusal


@pytest.mark.long
def test_jobs_of_the_wheel_name_the_installed_package(bin_folder: Path, demo: Path) -> None:
    config = ("--config", "configs/demo_cpu.yaml")
    words = (
        "train",
        *config,
        "data.store=out/store.zarr",
        "run.dir=cv",
        "--array",
        "folds",
        "--gpus-per-node",
        "0",
    )
    text = use(bin_folder, demo, "liverseg-launch", *words, "--dry-run")
    assert "-m liverseg_launch.slurm.supervise" in text
    assert "-m liverseg_launch.slurm.rank" in text
    assert "liverseg_launch.slurm.pool_folds" in text
    assert "-m launch." not in text
    sweep = (
        "tune",
        "--config",
        "configs/sweep_cpu.yaml",
        "data.store=out/store.zarr",
        "run.dir=sweep",
        "sweep.folds=[0,1]",
    )
    text = use(bin_folder, demo, "liverseg-launch", *sweep, "--gpus-per-node", "0", "--dry-run")
    assert "liverseg_launch.slurm.ray_node liverseg_launch.tune" in text
    assert "liverseg-launch train" in use(bin_folder, demo, "liverseg-launch", "--help")


def test_a_job_runs_the_copy_of_the_code_with_its_configs(bin_folder: Path, tmp_path: Path) -> None:
    """Supervised on this machine, by the snapshot that `liverseg-launch` took of the installed packages."""
    folder = tmp_path / "jobs"
    words = ("settings", "--configs", "--cluster", "local", "--job-dir", str(folder), "--follow")
    output = use(bin_folder, tmp_path, "liverseg-launch", *words)
    (code,) = (folder / "code").iterdir()
    assert str(code / "liverseg_dist" / "configs" / "demo_cpu.yaml") in output
    assert {path.name for path in code.iterdir()} == {"liverseg_dist", "liverseg_launch", "COMMIT"}
