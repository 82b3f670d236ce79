"""The NIfTI reader and writer: equality with nibabel, damaged files, atomic writing."""

import errno
import gzip
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.nifti import read_nifti, read_scan_file, write_image, write_mask
from liverseg_dist.errors import EXIT_USER, UserError
from liverseg_dist.volume import Grid, Volume
from tests.data.geometry import grids, numbered

AFFINE = np.array([[-0.7, 0, 0, 100.0], [0, -0.7, 0, 120.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])


def some_hu(shape_xyz: tuple[int, ...] = (7, 6, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1024, 2000, shape_xyz).astype(np.int16)


def save(path: Path, voxels_xyz: np.ndarray, affine: np.ndarray = AFFINE, **fields: object) -> Path:
    """Write with nibabel; `fields` overwrite the header afterwards, byte for byte."""
    image = nib.Nifti1Image(voxels_xyz, affine, dtype=voxels_xyz.dtype)
    nib.save(image, path)
    if fields:
        raw = bytearray(decompressed(path))
        header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        raw[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(raw), 1) if path.suffix == ".gz" else bytes(raw))
    return path


def decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def assert_like_nibabel(path: Path, volume: Volume) -> None:
    reference = nib.load(path)
    expected = np.asarray(reference.dataobj).T
    expected = expected.reshape(expected.shape[-3:])
    assert volume.voxels.flags.c_contiguous
    assert volume.voxels.dtype.isnative
    np.testing.assert_array_equal(volume.voxels, expected.astype(np.float32))
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-6)


# --- readable files ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_scalar_type_equals_nibabel(
    tmp_path: Path, kind: str, order: str, suffix: str
) -> None:
    voxels = (some_hu() % 100).astype(kind)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(kind))
    path = tmp_path / f"scan{suffix}"
    nib.save(nib.Nifti1Image(voxels, AFFINE, header, dtype=np.dtype(kind)), path)
    volume = read_nifti(path)
    assert volume.voxels.dtype == np.int16  # all values are integers in its range
    assert_like_nibabel(path, volume)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0.5, 1, 2]), np.float32),
        (np.array([40000, 1, 2], dtype=np.int32), np.float32),
        (np.array([np.nan, 1, 2]), np.float32),
        (np.array([np.inf, 1, 2]), np.float32),
        (np.array([-32768.0, 32767, 2]), np.int16),
        (np.array([-32769.0, 0, 2]), np.float32),
        (np.array([65535, 0, 2], dtype=np.uint16), np.float32),
    ],
    ids=["fraction", "int32", "nan", "inf", "limits", "below", "uint16"],
)
def test_int16_only_if_lossless(tmp_path: Path, values: np.ndarray, dtype: type) -> None:
    path = save(tmp_path / "scan.nii.gz", values.reshape(3, 1, 1))
    volume = read_nifti(path)
    assert volume.voxels.dtype == dtype
    np.testing.assert_array_equal(volume.voxels.reshape(-1), values.astype(dtype))


def test_late_fraction_keeps_earlier_values(tmp_path: Path) -> None:
    voxels = np.zeros((256, 256, 40), dtype=np.float32)  # several chunks
    voxels[...] = np.arange(40)
    voxels[0, 0, 39] = 0.25
    path = save(tmp_path / "scan.nii", voxels)
    volume = read_nifti(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, voxels.T)


@pytest.mark.parametrize(
    ("slope", "inter"), [(1, -1024), (2, 0), (0.5, 10), (0, 5), (np.nan, 5), (-1, 0)]
)
def test_scaling_equals_nibabel(tmp_path: Path, slope: float, inter: float) -> None:
    path = save(tmp_path / "scan.nii", some_hu(), scl_slope=slope, scl_inter=inter)
    assert_like_nibabel(path, read_nifti(path))


def test_nifti_2(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti2Image(some_hu(), AFFINE), path)
    assert_like_nibabel(path, read_nifti(path))


def test_trailing_dimensions_of_one_are_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", some_hu((4, 5, 6, 1, 1)))
    assert read_nifti(path).shape == (6, 5, 4)
    assert_like_nibabel(path, read_nifti(path))


def test_header_extensions_are_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(some_hu(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of a patient" * 50))
    nib.save(image, tmp_path / "scan.nii.gz")
    assert_like_nibabel(tmp_path / "scan.nii.gz", read_nifti(tmp_path / "scan.nii.gz"))


@pytest.mark.parametrize(
    "name", ["scan.nii", "scan.nii.gz", "scan", "Leber groß <b> 肝臓.nii.gz", "two words.nii"]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_compression_is_recognised_by_content(tmp_path: Path, name: str, compressed: bool) -> None:
    plain = decompressed(save(tmp_path / "plain.nii", some_hu()))
    (tmp_path / name).write_bytes(gzip.compress(plain) if compressed else plain)
    np.testing.assert_array_equal(read_nifti(tmp_path / name).voxels, some_hu().T)


def test_several_gzip_members(tmp_path: Path) -> None:
    plain = decompressed(save(tmp_path / "plain.nii", some_hu()))
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]))
    np.testing.assert_array_equal(read_nifti(path).voxels, some_hu().T)


def test_read_only_file_and_folder(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", some_hu())
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert read_nifti(path).shape == (5, 6, 7)
    finally:
        tmp_path.chmod(0o700)


# --- geometry ------------------------------------------------------------------------------------


def forms(tmp_path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> Path:
    image = nib.Nifti1Image(some_hu(), None)
    image.header.set_zooms((0.7, 0.7, 2.5))
    image.set_sform(sform, code=0 if sform is None else 1)
    image.set_qform(qform, code=0 if qform is None else 1)
    nib.save(image, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_form_choice_equals_nibabel(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 30
    for sform, qform, codes in (
        (AFFINE, None, []),
        (None, AFFINE, []),
        (AFFINE, AFFINE, []),
        (AFFINE, moved, ["qform_sform_disagree"]),
        (None, None, ["no_orientation"]),
    ):
        path = forms(tmp_path, sform, qform)
        scan = read_scan_file(path)
        assert_like_nibabel(path, scan.volume)
        assert [note.code for note in scan.notes] == codes


@pytest.mark.parametrize("code", [-1, 6, 300])
def test_form_with_undefined_code_is_ignored(tmp_path: Path, code: int) -> None:
    """As nibabel reads it. Otherwise another affine would be used without a finding."""
    moved = AFFINE.copy()
    moved[:3, 3] += 30
    path = forms(tmp_path, AFFINE, moved)
    raw = bytearray(decompressed(path))
    raw[254:256] = code.to_bytes(2, "little", signed=True)  # sform_code
    path.write_bytes(raw)
    np.testing.assert_allclose(read_nifti(path).affine, moved, atol=1e-4)


def test_shear_and_wrong_pixdim_have_findings(tmp_path: Path) -> None:
    slanted = AFFINE.copy()
    slanted[1, 2] = 0.5
    scan = read_scan_file(save(tmp_path / "a.nii", some_hu(), slanted, qform_code=0))
    np.testing.assert_allclose(scan.volume.affine, slanted, atol=1e-6)
    assert [note.code for note in scan.notes] == ["sheared"]
    pixdim = [1, 1, 1, 1, 0, 0, 0, 0]
    scan = read_scan_file(save(tmp_path / "b.nii", some_hu(), pixdim=pixdim, qform_code=0))
    assert [note.code for note in scan.notes] == ["pixdim_disagrees"]
    np.testing.assert_allclose(scan.volume.spacing_mm, (2.5, 0.7, 0.7), rtol=1e-6)


@given(grids(sheared=True))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_geometry_survives_writing(tmp_path: Path, grid: Grid) -> None:
    volume = numbered(grid)
    path = tmp_path / "scan.nii.gz"
    write_image(path, volume.voxels, grid)
    back = read_nifti(path)
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    assert back.grid.matches(grid, tolerance_mm=1e-3)
    assert_like_nibabel(path, back)
    write_image(path, back.voxels, back.grid)
    # A mask on a scan's grid has exactly the scan's affine.
    assert read_nifti(path).grid == back.grid


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_labels_are_uint8(tmp_path: Path, dtype: str) -> None:
    voxels = (some_hu() % 3).astype(dtype)
    label = read_nifti(save(tmp_path / "label.nii.gz", voxels), "label")
    assert label.voxels.dtype == np.uint8
    np.testing.assert_array_equal(label.voxels, voxels.T)


def test_labels_within_tolerance_are_rounded(tmp_path: Path) -> None:
    voxels = np.array([0.0, 0.9995, 2.0004]).reshape(3, 1, 1)
    label = read_nifti(save(tmp_path / "label.nii", voxels), "label")
    assert label.voxels.reshape(-1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.5, "label_fractional"),
        (1.002, "label_fractional"),
        (np.nan, "label_not_finite"),
        (np.inf, "label_not_finite"),
        (-1, "label_values"),
        (256, "label_values"),
    ],
)
def test_invalid_label_values_are_refused(tmp_path: Path, value: float, code: str) -> None:
    path = save(tmp_path / "label.nii", np.array([0, 1, value], dtype=np.float32).reshape(3, 1, 1))
    with pytest.raises(ScanFileError, match="label") as caught:
        read_nifti(path, "label")
    assert caught.value.code == code


# --- damaged files -------------------------------------------------------------------------------

Damage = Callable[[Path], Path]


def with_header(**fields: object) -> Damage:
    return lambda folder: save(folder / "scan.nii.gz", some_hu(), **fields)


def from_bytes(change: Callable[[bytes], bytes], suffix: str = ".nii.gz") -> Damage:
    def damage(folder: Path) -> Path:
        path = save(folder / f"scan{suffix}", some_hu((40, 40, 40)))
        path.write_bytes(change(path.read_bytes()))
        return path

    return damage


def of_type(dtype: object) -> Damage:
    return lambda folder: save(folder / "scan.nii", np.zeros((3, 4, 5), dtype=dtype))


def flipped(position: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(position * len(data))
        return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]

    return change


def folder_instead(folder: Path) -> Path:
    (folder / "scan.nii").mkdir()
    return folder / "scan.nii"


def link_loop(folder: Path) -> Path:
    (folder / "scan.nii").symlink_to(folder / "other.nii")
    (folder / "other.nii").symlink_to(folder / "scan.nii")
    return folder / "scan.nii"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "scan.nii")  # opening it would block
    return folder / "scan.nii"


def converted_line_ends(folder: Path) -> Path:
    nib.save(nib.Nifti2Image(some_hu(), AFFINE), folder / "scan.nii")
    raw = bytearray((folder / "scan.nii").read_bytes())
    raw[8:10] = b"\n\n"
    (folder / "scan.nii").write_bytes(raw)
    return folder / "scan.nii"


DAMAGED_FILES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: folder / "none.nii.gz", "unreadable"),
    "folder": (folder_instead, "not_nifti"),
    "pipe": (pipe, "not_nifti"),
    "link loop": (link_loop, "unreadable"),
    "name too long": (lambda folder: folder / ("x" * 300), "unreadable"),
    "empty": (from_bytes(lambda data: b""), "not_nifti"),
    "one byte": (from_bytes(lambda data: data[:1]), "not_nifti"),
    "text": (from_bytes(lambda data: b"hello " * 200), "not_nifti"),
    "dicom": (from_bytes(lambda data: bytes(128) + b"DICM" + bytes(500)), "not_nifti"),
    "header pair": (with_header(magic=b"ni1"), "not_nifti"),
    "gzip of text": (from_bytes(lambda data: gzip.compress(b"hello" * 200)), "not_nifti"),
    "truncated gzip": (from_bytes(lambda data: data[: len(data) // 2]), "truncated"),
    "gzip without trailer": (from_bytes(lambda data: data[:-8]), "truncated"),
    "wrong checksum": (from_bytes(lambda data: data[:-8] + b"abcd" + data[-4:]), "corrupt"),
    "flipped byte": (from_bytes(flipped(0.5)), "corrupt"),
    "truncated plain": (from_bytes(lambda data: data[:-10], ".nii"), "truncated"),
    "more than in the header": (
        from_bytes(lambda data: data + bytes(100_000), ".nii"),
        "header_shape",
    ),
    "zero dimensions": (with_header(dim=[0] * 8), "header_shape"),
    "negative size": (with_header(dim=[3, -7, 6, 5, 1, 1, 1, 1]), "header_shape"),
    "zero size": (with_header(dim=[3, 7, 0, 5, 1, 1, 1, 1]), "header_shape"),
    "huge": (with_header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "header_shape"),
    "larger than the file": (with_header(dim=[3, 700, 600, 500, 1, 1, 1, 1]), "truncated"),
    "NIfTI-2 sent as text": (converted_line_ends, "not_nifti"),
    "2D": (with_header(dim=[2, 42, 5, 1, 1, 1, 1, 1]), "not_3d"),
    "4D": (lambda folder: save(folder / "scan.nii", some_hu((3, 4, 5, 2))), "not_3d"),
    "5D": (lambda folder: save(folder / "scan.nii", some_hu((3, 4, 5, 1, 3))), "not_3d"),
    "RGB": (of_type(np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), "not_scalar"),
    "complex": (of_type(np.complex64), "not_scalar"),
    "float128": (with_header(datatype=1536, bitpix=128), "not_scalar"),
    "unknown type": (with_header(datatype=77), "not_scalar"),
    "wrong bit count": (with_header(bitpix=8), "header_type"),
    "zero spacing": (
        with_header(sform_code=0, pixdim=[1, 0.7, 0, 2.5, 0, 0, 0, 0]),
        "header_spacing",
    ),
    "negative spacing": (
        with_header(sform_code=0, pixdim=[1, 0.7, -0.7, 2.5, 0, 0, 0, 0]),
        "header_spacing",
    ),
    "NaN spacing": (
        with_header(sform_code=0, pixdim=[1, 0.7, np.nan, 2.5, 0, 0, 0, 0]),
        "header_spacing",
    ),
    "both forms": (
        with_header(srow_x=[0, 0, 0, 0], qform_code=1, quatern_b=np.nan),
        "header_affine",
    ),
    "no size in either": (
        with_header(srow_z=[0, 0, 0, 0], qform_code=1, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]),
        "header_affine",
    ),
    "NaN affine": (with_header(srow_x=[np.nan, 0, 0, 0]), "header_affine"),
    "singular affine": (with_header(srow_x=[0, 0, 0, 0]), "header_affine"),
    "metres": (
        with_header(srow_x=[1e-4, 0, 0, 0], pixdim=[1, 1e-4, 0.7, 2.5, 0, 0, 0, 0]),
        "header_spacing",
    ),
    "no rotation": (with_header(sform_code=0, qform_code=1, quatern_b=5.0), "header_affine"),
    "NaN quaternion": (with_header(sform_code=0, qform_code=1, quatern_b=np.nan), "header_affine"),
    "infinite scale": (with_header(scl_slope=np.inf), "header_scaling"),
    "NaN intercept": (with_header(scl_slope=1, scl_inter=np.nan), "header_scaling"),
    "NaN offset": (with_header(vox_offset=np.nan), "header_offset"),
    "offset in the header": (with_header(vox_offset=16), "header_offset"),
    "offset far away": (with_header(vox_offset=1e12), "header_offset"),
    "offset behind the end": (with_header(vox_offset=100_000), "truncated"),
}


@pytest.mark.filterwarnings("ignore")  # nibabel warns while it writes them
@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_damaged_file_is_scan_file_error(tmp_path: Path, name: str) -> None:
    damage, code = DAMAGED_FILES[name]
    path = damage(tmp_path)
    with pytest.raises(ScanFileError) as caught:
        read_nifti(path)
    assert caught.value.code == code, caught.value
    message = str(caught.value)
    assert message.startswith(str(path)[:60])
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_USER
    assert pickle.loads(pickle.dumps(caught.value)).code == code  # noqa: S301 - own data


def test_message_has_no_control_characters(tmp_path: Path) -> None:
    for name in ("a\nb.nii", "a\x1b[2Jb.nii", os.fsdecode(b"a\xffb.nii")):
        with pytest.raises(ScanFileError) as caught:
            read_nifti(tmp_path / name)
        assert str(caught.value).isprintable()


BOMB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_nifti(sys.argv[1])
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("kind", ["trailing", "promised"])
def test_gzip_bomb_allocates_no_memory(tmp_path: Path, kind: str) -> None:
    """200 MB of zeros in 200 KB: after a small volume, or as a volume of 2 GB by the header."""
    header = decompressed(save(tmp_path / "plain.nii", some_hu()))
    if kind == "promised":
        fields = nib.Nifti1Header(header[:348])
        fields["dim"] = [3, 1024, 1024, 1000, 1, 1, 1, 1]
        header = fields.binaryblock + bytes(4)
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", compresslevel=6) as stream:
        stream.write(header)
        for _ in range(200):
            stream.write(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True, timeout=120
    )
    grown_kib, _, message = done.stdout.partition(" ")
    assert str(path) in message
    assert int(grown_kib) < 50 << 10


@given(st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_bytes_give_volume_or_scan_file_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Change any bytes of the header, or of the compressed stream."""
    path = tmp_path / "scan.nii"
    raw = bytearray(decompressed(save(path, some_hu())))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = bytearray(gzip.compress(bytes(raw), 1, mtime=0))
        raw[data.draw(st.integers(2, len(raw) - 1))] ^= data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    for kind in ("image", "label"):
        try:
            volume = read_nifti(path, kind)  # type: ignore[arg-type]
        except ScanFileError:  # the test above checks its message
            pass
        else:
            assert volume.voxels.dtype in (np.int16, np.float32, np.uint8)
            assert np.isfinite(volume.affine).all()


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask.nii", "mask.nii.gz"])
def test_equal_masks_give_equal_bytes(tmp_path: Path, name: str) -> None:
    mask = (some_hu((40, 30, 20)).T % 3).astype(np.uint8)
    grid = Grid(mask.shape, AFFINE)
    contents = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_mask(tmp_path / folder / name, mask, grid)
        contents.add((tmp_path / folder / name).read_bytes())
        os.utime(tmp_path / folder / name, (0, 0))
        assert [p.name for p in (tmp_path / folder).iterdir()] == [name]
    assert len(contents) == 1
    if name.endswith(".gz"):
        assert contents.pop()[4:8] == bytes(4)  # no time in the gzip header
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a" / name).dataobj).T, mask)
    assert int(nib.load(tmp_path / "a" / name).header["qform_code"]) == 1


def test_views_are_written_correctly(tmp_path: Path) -> None:
    volume = numbered(Grid((4, 5, 6), AFFINE)).reoriented("ASL")
    write_image(tmp_path / "scan.nii.gz", volume.voxels, volume.grid)
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii.gz").voxels, volume.voxels)


def test_failed_write_keeps_old_file(tmp_path: Path) -> None:
    grid = Grid((64, 256, 256), AFFINE)
    mask = np.random.default_rng(0).integers(0, 3, grid.shape).astype(np.uint8)
    path = tmp_path / "mask.nii"
    write_mask(path, mask, grid)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"""
import resource, signal, numpy as np
from pathlib import Path
from liverseg_dist.data.io.nifti import write_mask
from liverseg_dist.volume import Grid
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {limits[1]}))
try:
    grid = Grid((64, 256, 256), np.eye(4))
    write_mask(Path({str(path)!r}), np.zeros(grid.shape, np.uint8), grid)
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) == errno.EFBIG  # as for a full disk
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mask.nii"]


def test_invalid_output_is_refused(tmp_path: Path) -> None:
    grid = Grid((2, 3, 4), AFFINE)
    with pytest.raises(UserError, match=r"\.nii\.gz"):
        write_mask(tmp_path / "mask.png", np.zeros(grid.shape, np.uint8), grid)
    with pytest.raises(ValueError, match="uint8"):
        write_mask(tmp_path / "mask.nii", np.zeros(grid.shape, np.int16), grid)
    with pytest.raises(ValueError, match="shape"):
        write_mask(tmp_path / "mask.nii", np.zeros((4, 3, 2), np.uint8), grid)


@pytest.mark.real_mini
def test_real_scans_equal_nibabel(real_mini: Path) -> None:
    for path in sorted(real_mini.glob("images*/*.nii.gz")):
        if path.name != "liver_28.nii.gz":  # large
            volume = read_nifti(path)
            assert volume.voxels.dtype == np.int16
            assert_like_nibabel(path, volume)
    for path in sorted(real_mini.glob("labels*/*.nii.gz")):
        assert_like_nibabel(path, read_nifti(path, "label"))
