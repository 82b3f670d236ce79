"""What a system that learns must and must not do, on phantoms: trained by the real command in seconds.

A label that leaks into the input, a test case that is trained on, a flipped or permuted axis, a spacing taken for
another: each makes one of these fail.
"""

from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.phantom.anatomy import draw_patient
from liverseg_dist.phantom.scan import PhantomScan, scan_patient
from liverseg_dist.volume import Float3, Grid, Volume
from tests.data.sources import write_index
from tests.distributed.launch import liverseg

TRAINED_MM = (4.0, 3.5, 3.5)
CASES, STEPS = 6, 150
FOUND = 0.8
"""Dice of the liver that the few steps reach (0.84 after 120)."""
NEW = 100
"""A patient that is not in the training set."""
SETTINGS = (
    "data.fold=all", "data.workers=0", "data.patch_size=[32,32,32]", "data.augmentation=none",
    "data.oversample_foreground=0.5", "model.features=[4,8,16]", "model.deep_supervision=false",
    "train.optimizer=adamw", "train.learning_rate=1e-2", "train.schedule.name=cosine", "train.threads=1",
    "train.ema_decay=0.9", "validation.every_steps=0", f"train.max_steps={STEPS}",
)  # fmt: skip


def scan_of(number: int, spacing_mm: Float3 = TRAINED_MM, orientation: str = "RAS") -> PhantomScan:
    """One patient per number, scanned on any grid."""
    patient = draw_patient(np.random.default_rng(number), 2, (30.0, 60.0), hard=False)
    half_x, half_y = (1.1 * half for half in patient.body_mm)
    low, high = (z + room for z, room in zip(patient.liver_z_mm, (-25, 25), strict=True))
    extent_mm = (high - low, 2 * half_y, 2 * half_x)
    shape = tuple(round(length / mm) for length, mm in zip(extent_mm, spacing_mm, strict=True))
    affine = np.diag([*reversed(spacing_mm), 1.0])
    affine[:3, 3] = (-half_x, -half_y, low)
    return scan_patient(patient, Grid(shape, affine), orientation, (number,))  # type: ignore[arg-type]


def random_label(scan: PhantomScan, seed: int) -> Volume:
    """A ball of two litres in a random place of the scan, instead of the liver."""
    grid, rng = scan.label.grid, np.random.default_rng(seed)
    radius_mm = 78.0
    centre = [
        rng.uniform(min(radius_mm, n * mm / 2), max(n * mm - radius_mm, n * mm / 2))
        for n, mm in sizes(grid)
    ]
    axes = np.ogrid[tuple(slice(0, n) for n in grid.shape)]
    square = sum((a * mm - c) ** 2 for a, c, (_, mm) in zip(axes, centre, sizes(grid), strict=True))
    return Volume((square < radius_mm**2).astype(np.uint8), grid)


def sizes(grid: Grid) -> list[tuple[int, float]]:
    return list(zip(grid.shape, grid.spacing_mm, strict=True))


def trained_run(folder: Path, random_labels: bool) -> Path:
    """Trained on scans of one orientation and one spacing only."""
    names = [f"liver_{number}" for number in range(CASES)]
    for name in ("imagesTr", "labelsTr"):
        (folder / "source" / name).mkdir(parents=True)
    for number, name in enumerate(names):
        scan = scan_of(number)
        label = random_label(scan, number) if random_labels else scan.label
        write_image(
            folder / "source" / "imagesTr" / f"{name}.nii.gz", scan.image.voxels, scan.image.grid
        )
        write_mask(folder / "source" / "labelsTr" / f"{name}.nii.gz", label.voxels, label.grid)
    write_index(folder / "source", names)
    store, run = folder / "store.zarr", folder / "run"
    cleaning = (
        "convert.cleaning.spacing_mm=[6,6,6]",
        "convert.workers=1",
        "convert.splits.test_fraction=0",
    )
    assert (
        main(["convert", str(folder / "source"), str(store), "convert.splits.folds=2", *cleaning])
        == 0
    )
    done = liverseg(
        "train",
        "--device",
        "cpu",
        f"data.store={store}",
        f"run.dir={run}",
        *SETTINGS,
        timeout_s=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("sane"), random_labels=False)


def predicted(run: Path, image: Volume, folder: Path) -> Volume:
    folder.mkdir()
    write_image(folder / "new.nii.gz", np.ascontiguousarray(image.voxels), image.grid)
    words = ("predict", str(run), str(folder / "new.nii.gz"), "--out", str(folder / "masks"))
    assert main([*words, "--device", "cpu", "--threads", "1"]) == 0
    return read_nifti(folder / "masks" / "new.nii.gz", "label")


def liver_dice(mask: Volume, truth: Volume) -> float:
    one, other = mask.voxels > 0, truth.reoriented(mask.grid.orientation).voxels > 0
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_training_on_one_orientation_and_spacing_generalises_to_others(
    run: Path, tmp_path: Path
) -> None:
    """The same new patient scanned on other grids, and the same voxels stored in another order."""
    first = scan_of(NEW)
    mask = predicted(run, first.image, tmp_path / "first")
    reached = liver_dice(mask, first.label)
    assert reached > FOUND
    for orientation, spacing_mm in (
        ("LPI", TRAINED_MM),
        ("PIR", (2.5, 3.0, 3.0)),
        ("LAS", (6.0, 2.5, 2.5)),
    ):
        scan = scan_of(NEW, spacing_mm, orientation)
        again = predicted(run, scan.image, tmp_path / orientation)
        assert liver_dice(again, scan.label) > reached - 0.04, (orientation, spacing_mm)
    turned = predicted(run, first.image.reoriented("SLP"), tmp_path / "turned").reoriented("RAS")
    assert turned.grid.matches(mask.grid, 1e-3)
    assert np.array_equal(turned.voxels, mask.voxels)


@pytest.mark.long
def test_random_labels_do_not_generalise(run: Path, tmp_path: Path) -> None:
    """What was learnt from balls in random places finds neither the next ball nor the liver."""
    nonsense = trained_run(tmp_path / "random", random_labels=True)
    scan = scan_of(NEW)
    mask = predicted(nonsense, scan.image, tmp_path / "new")
    assert liver_dice(mask, random_label(scan, NEW)) < 0.5
    assert liver_dice(mask, scan.label) < 0.5
    assert liver_dice(predicted(run, scan.image, tmp_path / "sane"), scan.label) > FOUND


def test_a_left_right_flip_is_detected(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Voxels mirrored under an unchanged header score as the nonsense they are; a mirrored header is named."""
    scan = scan_of(NEW)
    mask = predicted(run, scan.image, tmp_path / "new")
    mirrored = Volume(np.ascontiguousarray(mask.voxels[:, :, ::-1]), mask.grid)
    assert liver_dice(mask, scan.label) > FOUND
    assert liver_dice(mirrored, scan.label) < 0.4
    negated = Grid(mask.shape, np.diag([-1.0, 1, 1, 1]) @ mask.grid.affine)
    for folder in ("prediction", "truth"):
        (tmp_path / folder).mkdir()
    write_mask(tmp_path / "prediction" / "new.nii.gz", mask.voxels, negated)
    write_mask(tmp_path / "truth" / "new.nii.gz", scan.label.voxels, scan.label.grid)
    words = (
        "score",
        str(tmp_path / "prediction"),
        str(tmp_path / "truth"),
        "--out",
        str(tmp_path / "scores"),
    )
    code = main([*words, "--no-pictures", "--workers", "1"])
    errors = capsys.readouterr().err
    assert code == 2
    assert "their positions differ by up to" in errors
