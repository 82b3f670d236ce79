"""Phantoms: layout, determinism, plausible anatomy, and tumours that thresholds do not find."""

import hashlib
import json
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cc3d
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, signal

from liverseg_dist.commands.main import main
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.phantom.anatomy import Patient, draw_patient
from liverseg_dist.phantom.dataset import FIRST_TEST, PhantomSet, write_dataset
from liverseg_dist.phantom.grids import ORIENTATIONS, draw_grid
from liverseg_dist.phantom.organs import build_vena_cava
from liverseg_dist.phantom.painter import Painter
from liverseg_dist.phantom.scan import PhantomScan, make_scan, scan_patient
from liverseg_dist.phantom.scanner import SpectralField, spectrum_frequencies
from liverseg_dist.phantom.shapes import Cone, Ellipsoid, Points, Waves
from liverseg_dist.phantom.tumours import tumour_count
from liverseg_dist.volume import Grid

ROOT = Path(__file__).resolve().parents[2]
SCANS = 8


@pytest.fixture(scope="module")
def scans() -> list[PhantomScan]:
    return [make_scan(5, case, "small", case % 2 == 1) for case in range(SCANS)]


def patient_of(seed: int, tumours: int = 3) -> Patient:
    return draw_patient(np.random.default_rng(seed), tumours, (12.0, 40.0), False)


def grid_of(spacing_mm: tuple[float, float, float], turn_deg: float = 0.0) -> Grid:
    """A box of 400 x 320 x 260 mm (x, y, z) around the liver, turned about y."""
    extent = np.array([400.0, 320.0, 260.0])
    step = np.array(spacing_mm[::-1])
    shape = np.round(extent / step).astype(int)
    a = np.deg2rad(turn_deg)
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(step)
    affine[:3, 3] = [0, 0, -10] - affine[:3, :3] @ (shape - 1) / 2
    return Grid((shape[2], shape[1], shape[0]), affine)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.nii.gz"))
    }


def body_of(hu: np.ndarray) -> np.ndarray:
    parts = cc3d.connected_components(np.ascontiguousarray(hu > -300), connectivity=6)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1


def best_window_dice(inside: np.ndarray, outside: np.ndarray) -> float:
    """Dice of the best HU interval that separates two sets of voxels."""
    edges = np.arange(-1100, 1500, 4)
    yes, no = (
        np.concatenate([[0], np.cumsum(np.histogram(v, edges)[0])]) for v in (inside, outside)
    )
    taken_yes, taken_no = yes[None] - yes[:, None], no[None] - no[:, None]
    return float((2 * taken_yes / np.maximum(taken_yes + taken_no + yes[-1], 1)).max())


# --- the folder


def test_case_bytes_do_not_depend_on_workers_and_number_of_cases(tmp_path: Path) -> None:
    write_dataset(PhantomSet(tmp_path / "one", 2, 1, seed=11), 1, lambda case: None)
    write_dataset(PhantomSet(tmp_path / "many", 3, 2, seed=11), 2, lambda case: None)
    write_dataset(PhantomSet(tmp_path / "other", 1, 0, seed=12), 1, lambda case: None)
    one, many, other = (
        hashes(tmp_path / "one"),
        hashes(tmp_path / "many"),
        hashes(tmp_path / "other"),
    )
    assert set(one) == {"imagesTr/liver_0.nii.gz", "imagesTr/liver_1.nii.gz", "labelsTr/liver_0.nii.gz",
                        "labelsTr/liver_1.nii.gz", f"imagesTs/liver_{FIRST_TEST}.nii.gz"}  # fmt: skip
    assert {name: many[name] for name in one} == one
    assert len(set(many.values())) == len(many) == 8
    assert other["imagesTr/liver_0.nii.gz"] != one["imagesTr/liver_0.nii.gz"]


def test_layout_is_that_of_task03(phantom_source: Path) -> None:
    index = json.loads((phantom_source / "dataset.json").read_text())
    assert list(index) == ["name", "description", "reference", "licence", "release", "tensorImageSize", "modality",
                           "labels", "numTraining", "numTest", "training", "test"]  # fmt: skip
    assert index["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert index["modality"] == {"0": "CT"}
    assert (
        (index["numTraining"], index["numTest"])
        == (len(index["training"]), len(index["test"]))
        == (6, 1)
    )
    for entry in index["training"]:
        image, label = (nib.load(phantom_source / entry[key]) for key in ("image", "label"))
        assert image.shape == label.shape
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(
            image.get_qform(), image.get_sform(), atol=5e-3
        )  # quaternions are float32
        assert set(np.unique(np.asanyarray(label.dataobj))) <= {0, 1, 2}
        assert image.header.get_xyzt_units()[0] == "mm"
    assert (phantom_source / index["test"][0]).is_file()


def test_stopped_run_continues_and_keeps_complete_files(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["phantom", str(tmp_path / "set"), "--cases", "2", "--seed", "4", "--json"]
    assert main(line) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = hashes(tmp_path / "set")
    kept, lost = (tmp_path / "set" / name / "liver_1.nii.gz" for name in ("imagesTr", "labelsTr"))
    whole = tmp_path / "set" / "imagesTr" / "liver_0.nii.gz"
    written = whole.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "set" / "dataset.json").unlink()
    assert main([*line, "--montage", str(tmp_path / "look.png")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert hashes(tmp_path / "set") == before
    assert kept.is_file()
    assert whole.stat().st_mtime_ns == written
    with Image.open(tmp_path / "look.png") as picture:
        assert np.asarray(picture).std() > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "5"], "contains phantoms with the settings"),
        (["--size", "full"], "contains phantoms with the settings"),
        (["--difficulty", "hard"], "contains phantoms with the settings"),
        (["--cases", "0"], "--cases must be 1 to"),
        (["--cases", "5"], "more scan files than requested"),
        (["--montage", "look.tiff"], "must end in .png or .jpg"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(
    phantom_source: Path, capsys: pytest.CaptureFixture, change: list[str], message: str
) -> None:
    before = hashes(phantom_source)
    assert (
        main(
            [
                "phantom",
                str(phantom_source),
                "--cases",
                "6",
                "--test-cases",
                "1",
                "--seed",
                "3",
                *change,
            ]
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert hashes(phantom_source) == before


def test_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert main(["phantom", str(tmp_path), "--cases", "1"]) == 2
    assert "not a phantom set" in capsys.readouterr().err
    (tmp_path / "phantom.json").write_text("{")
    assert main(["phantom", str(tmp_path), "--cases", "1"]) == 2
    assert "not readable as JSON" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["letter.txt", "phantom.json"]
    assert main(["phantom", str(tmp_path / "letter.txt"), "--cases", "1"]) == 2
    assert main(["phantom", str(tmp_path / "new"), "--cases", "1", "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()


def test_script_runs_the_command() -> None:
    shown = subprocess.run(
        [ROOT / "tools" / "phantom", "--help"], capture_output=True, text=True, check=True
    )
    assert "--difficulty" in shown.stdout


# --- the patients


def test_livers_and_tumours_are_of_human_size(scans: list[PhantomScan]) -> None:
    counts = []
    for scan in scans:
        label = np.ascontiguousarray(scan.label.reoriented().voxels)
        ml = scan.label.grid.voxel_volume_ml
        assert 800 < (label > 0).sum() * ml < 2500
        parts = cc3d.connected_components(label > 0, connectivity=26)
        assert np.bincount(parts.ravel())[1:].max() > 0.97 * (label > 0).sum()  # one organ
        assert not label[0].any()
        assert not label[-1].any()  # the whole liver is in the field of view
        tumours = cc3d.connected_components(label == TUMOUR, connectivity=26)
        counts.append(int(tumours.max()))
        sizes_ml = np.bincount(tumours.ravel())[1:] * ml
        assert (sizes_ml < 4 / 3 * np.pi * 3.5**3).all()
        assert (label == TUMOUR).sum() < 0.5 * (label > 0).sum()
        # A tumour lies in the liver: most of its rim touches liver, not fat or lung.
        rim = ndimage.binary_dilation(label == TUMOUR) & (label != TUMOUR)
        assert not rim.any() or (label[rim] == LIVER).mean() > 0.5
    assert min(counts) == 0
    assert max(counts) >= 4
    assert max(counts) <= 6


def test_numbers_of_tumours_have_their_frequencies() -> None:
    found = (
        np.bincount([tumour_count(f) for f in np.linspace(0, 1, 1000, endpoint=False)], minlength=7)
        / 1000
    )
    np.testing.assert_allclose(found, [0.12, *[0.88 / 6] * 6], atol=0.002)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_organs_have_their_positions_in_the_world(orientation: str) -> None:
    patient = patient_of(2)
    scan = scan_patient(patient, grid_of((6, 4, 4), turn_deg=4.0), orientation, (2,))
    assert scan.image.grid.orientation == orientation
    assert scan.image.grid == scan.label.grid
    hu, grid = scan.image.voxels, scan.image.grid
    body = body_of(hu)

    def centre(mask: np.ndarray) -> np.ndarray:
        return grid.world_mm(np.argwhere(mask)).mean(axis=0)

    liver, middle = centre(scan.label.voxels > 0), centre(body)
    bones = centre(body & (hu > 350))
    gas = grid.world_mm(np.argwhere(hu < -700))
    lungs = gas[(np.abs(gas - middle) < [110, 70, 400]).all(axis=1)].mean(
        axis=0
    )  # and a little gas in the bowel
    assert liver[0] > middle[0] + 20  # on the patient's right: x grows to the right in RAS+
    assert bones[1] < liver[1] - 20  # the spine lies behind
    assert lungs[2] > liver[2] + 20  # the lungs above
    # The left kidney and spleen, made at negative x, lie on the left in the scan.
    spleen = next(s.shape for s in patient.organs if s.tissue.hu == patient.contrast.spleen)
    assert spleen.bounding_box()[1][0] < 0
    p = patient.map_voxels(scan.image.reoriented().grid, slice(0, grid_of((6, 4, 4)).shape[0]))
    inside = scan.image.reoriented().voxels[spleen.signed_distance(p) < -8]
    assert abs(np.median(inside) - patient.contrast.spleen) < 15


def test_tissues_have_portal_venous_hu() -> None:
    patient = patient_of(6)
    grid = grid_of((3, 2.5, 2.5))
    scan = scan_patient(patient, grid, "RAS", (6,))
    hu, p = scan.image.voxels, patient.map_voxels(grid, slice(0, grid.shape[0]))
    liver = scan.label.voxels == LIVER
    wall = patient.torso.cavity_mm(p)
    abdomen = np.maximum(patient.torso.dome_mm(p), wall)
    organs = {s.tissue.hu: s.shape for s in patient.organs}
    expected = {
        "liver": (ndimage.binary_erosion(liver, iterations=2), 60, 145),
        "spleen": (organs[patient.contrast.spleen].signed_distance(p) < -8, 85, 155),
        "cava": (np.min([c.signed_distance(p) for c in build_vena_cava()], axis=0) < -6, 85, 175),
        "fat under the skin": ((wall > patient.torso.wall_mm + 5) & (hu > -300), -125, -80),
        "muscle of the back": (_back(p) & (np.abs(p.z) < 100), 35, 80),
        "lung": ((wall < -8) & (abdomen > 8) & (np.abs(p.x) > 70), -950, -750),
        "air": (
            (np.abs(wall - patient.torso.wall_mm - 1.6 * patient.torso.fat_mm - 15) < 8)
            & (p.y > 0),
            -1025,
            -930,
        ),
    }
    for name, (mask, low, high) in expected.items():
        assert mask.sum() > 100, name
        assert low < np.median(hu[mask]) < high, name
    assert np.percentile(hu[body_of(hu)], 99.5) > 300  # bone
    assert 8 < hu[ndimage.binary_erosion(liver, iterations=2)].std() < 40


def _back(p: Points) -> np.ndarray:
    return (np.abs(np.abs(p.x) - 33) < 15) & (np.abs(p.y + 66) < 8)


def test_thresholding_fails(scans: list[PhantomScan]) -> None:
    """The best HU interval finds neither tumours in the true liver nor the liver in the body.

    For tumours the interval of one case is bad, and that of all cases is worse.
    """
    per_case, tumour, liver, rest = [], [], [], []
    for scan in scans:
        hu, label = scan.image.voxels, scan.label.voxels
        body = body_of(hu)
        tumour.append(hu[label == TUMOUR])
        liver.append(hu[label == LIVER])
        rest.append(hu[body & (label == 0)])
        if len(tumour[-1]):
            per_case.append(best_window_dice(tumour[-1], liver[-1]))
    assert np.mean(per_case) < 0.5
    assert best_window_dice(np.concatenate(tumour), np.concatenate(liver)) < 0.4
    assert best_window_dice(np.concatenate(liver), np.concatenate(rest)) < 0.75


def test_tumours_can_be_seen(scans: list[PhantomScan]) -> None:
    """Without noise, each tumour of an easy case differs from the liver around it."""
    seen = 0
    for scan in scans[::2]:
        hu, label = (
            ndimage.uniform_filter(scan.image.voxels.astype(float), 3),
            np.ascontiguousarray(scan.label.voxels),
        )
        homogeneous = ndimage.binary_erosion(label == LIVER, iterations=4)
        variation = np.abs(hu[homogeneous] - np.median(hu[homogeneous])).mean()
        parts = cc3d.connected_components(label == TUMOUR, connectivity=26)
        for part in range(1, int(parts.max()) + 1):
            inside = ndimage.binary_erosion(parts == part)
            if inside.sum() < 20:
                continue
            around = ndimage.binary_dilation(parts == part, iterations=5) & (label == LIVER)
            assert np.abs(hu[inside] - np.median(hu[around])).mean() > 1.5 * variation
            seen += 1
    assert seen >= 5


# --- the geometry


def test_same_patient_on_other_grids() -> None:
    """Anatomy is defined in millimetres: volumes do not depend on voxel size or on a turned gantry."""
    patient = patient_of(9)
    volumes = []
    for spacing, turn in (((2.0, 3.0, 3.0), 0.0), ((6.0, 3.0, 3.0), 0.0), ((3.0, 4.0, 4.0), 5.0)):
        label = scan_patient(patient, grid_of(spacing, turn), "RAS", (9,)).label
        volumes.append(
            [
                (label.voxels == value).sum() * label.grid.voxel_volume_ml
                for value in (LIVER, TUMOUR)
            ]
        )
    np.testing.assert_allclose(volumes[1:], [volumes[0]] * 2, rtol=0.06, atol=1.0)
    assert abs(sum(volumes[0]) / patient.liver_ml - 1) < 0.03


def test_full_size_grids_vary_as_in_hospitals() -> None:
    grids = []
    for seed in range(40):
        patient = replace(patient_of(seed % 4), tumours=())
        grid = draw_grid(np.random.default_rng(seed), patient, "full")
        grids.append(grid)
        low, high = grid.corners_mm()[:, 2].min(), grid.corners_mm()[:, 2].max()
        assert low < patient.liver_z_mm[0]
        assert high > patient.liver_z_mm[1]
    slices = np.array([grid.shape[0] for grid in grids])
    spacing = np.array([grid.spacing_mm for grid in grids])
    assert (slices < 64).any()
    assert (slices > 200).any()
    assert spacing[:, 0].min() == pytest.approx(1)
    assert spacing[:, 0].max() == pytest.approx(5)
    assert (spacing[:, 1:] > 0.599).all()
    assert (spacing[:, 1:] < 0.901).all()
    assert (
        3
        < sum(
            np.abs(grid.affine[:3, :3]).max(axis=0).sum() < np.sum(grid.spacing_mm) - 1e-3
            for grid in grids
        )
        < 20
    )


def test_waves_on_a_grid_equal_waves_at_its_points() -> None:
    waves = Waves.draw_random(np.random.default_rng(0), (40, 90), 3.0, 5)
    grid = grid_of((7, 9, 11), turn_deg=20)
    z, y, x = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    world = grid.world_mm(np.stack([z, y, x], axis=-1))
    direct = sum(
        np.sin(world @ k + phase) for k, phase in zip(waves.vectors, waves.phases, strict=True)
    )
    direct *= 3.0 * np.sqrt(2 / 5)
    np.testing.assert_allclose(waves.evaluate_planes(grid, slice(3, 9)), direct[3:9], atol=2e-4)
    points = Points(*(np.float32(world[..., axis]) for axis in range(3)))
    np.testing.assert_allclose(waves.evaluate_points(points), direct, atol=2e-3)
    assert np.abs(direct).max() <= waves.largest
    assert direct.std() == pytest.approx(3.0, rel=0.2)


@pytest.mark.parametrize(
    "shape",
    [
        Ellipsoid((60.0, -30.0, -40.0), (20.0, 30.0, 50.0), 35.0, -20.0),
        Ellipsoid((0.0, 0.0, 0.0), (12.0, 12.0, 12.0)),
        Cone((-40.0, 10.0, 0.0), (30.0, 50.0, -60.0), 4.0, 12.0),
    ],
)
def test_voxel_box_contains_the_whole_body(shape: Ellipsoid | Cone) -> None:
    patient, grid = patient_of(1), grid_of((5, 4, 4), turn_deg=5)
    distance = shape.signed_distance(patient.map_voxels(grid, slice(0, grid.shape[0])))
    inside = np.argwhere(distance < grid.spacing_mm[0] / 2)
    box = patient.find_voxel_box(grid, shape.bounding_box())
    assert len(inside) > 50
    assert (inside.min(axis=0) >= box[0]).all()
    assert (inside.max(axis=0) < box[1]).all()
    reach = np.array(shape.bounding_box()[1]) - shape.bounding_box()[0]
    assert np.prod((box[1] - box[0]) * grid.spacing_mm) < np.prod(
        1.15 * reach + 45
    )  # and not much more


def test_signed_distances_are_exact() -> None:
    rng = np.random.default_rng(3)
    where = rng.uniform(-60, 60, (3, 500)).astype(np.float32)
    start, end = np.array([-20.0, 5.0, 0.0]), np.array([30.0, -10.0, 25.0])
    tube = Cone(tuple(start), tuple(end), 6.0, 6.0).signed_distance(Points(*where))
    axis = start + np.linspace(0, 1, 4000)[:, None] * (end - start)
    nearest = np.linalg.norm(where.T[:, None] - axis[None], axis=2).min(axis=1)
    np.testing.assert_allclose(tube, nearest - 6, atol=1e-3)
    ball = Ellipsoid((1.0, 2.0, 3.0), (9.0, 9.0, 9.0), 40.0, 10.0).signed_distance(Points(*where))
    np.testing.assert_allclose(ball, np.linalg.norm(where.T - [1, 2, 3], axis=1) - 9, atol=1e-3)


def test_slabs_equal_the_complete_scan() -> None:
    patient, grid = patient_of(4), grid_of((8, 6, 6))
    flat = np.zeros(grid.shape, np.float32)
    whole = Painter(patient, grid).paint_planes(slice(0, grid.shape[0]), flat)
    painter = Painter(patient, grid)
    cut = [painter.paint_planes(slice(z, z + 1), flat[z : z + 1]) for z in range(10, 22)]
    for field in range(3):
        parts = np.concatenate([slab[field] for slab in cut])
        np.testing.assert_allclose(parts, whole[field][10:22], atol=2e-2 if field == 0 else 1e-5)


def test_noise_has_its_variance_spectrum_and_correlation() -> None:
    grid = Grid((60, 125, 96), np.diag([0.8, 0.8, 1.5, 1.0]))
    along_y, along_x = spectrum_frequencies(grid)
    f = np.sqrt(along_y**2 + along_x**2)
    field = SpectralField(
        np.random.default_rng(0), grid, np.sqrt(f) * np.exp(-((f / 0.3) ** 2)), 0.4
    ).next_slices(60)
    assert field.shape == grid.shape
    assert field.std() == pytest.approx(1, abs=0.02)
    between = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairwise(field)])
    assert between == pytest.approx(0.4, abs=0.03)
    for axis in (1, 2):
        frequency, power = signal.welch(field, fs=1 / 0.8, nperseg=48, axis=axis, detrend=False)
        power = power.mean(axis=tuple(a for a in range(3) if a != axis))
        assert 0.05 < frequency[power.argmax()] < 0.3
        assert power[frequency > 0.55].max() < 0.1 * power.max()
