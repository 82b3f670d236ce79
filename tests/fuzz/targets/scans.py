"""NIfTI files: the reader against nibabel, and `score` of a pair of them against numpy's own counts."""

import gzip
import zlib
from pathlib import Path
from random import Random
from typing import Any

import nibabel as nib
import numpy as np

from liverseg_dist.commands.score import read_mask
from liverseg_dist.data.io.nifti import read_scan_file
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.evaluation.pairing import pair_masks
from liverseg_dist.evaluation.score_folders import ScoreJob, open_ledger, score_pair
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import damaged

SHAPE_XYZ = (6, 5, 4)
AFFINES = (
    np.diag([-0.8, -0.8, 2.5, 1]),
    np.array([[-0.7, 0, 0.1, 100.0], [0.02, -0.7, 0, 120.0], [0, 0.3, 2.5, -300.0], [0, 0, 0, 1]]),
    np.eye(4),
)
KINDS = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "c16", "rgb")
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
FIELD_VALUES: dict[str, tuple[Any, ...]] = {
    "dim": (0, 1, 2, -1, 5, 7, 8, 255, 1024, 32767, -32768),
    "pixdim": (0.0, -1.0, 1.0, -0.7, 0.005, 1e-38, 1e30, np.nan, np.inf, 99.0),
    "datatype": (
        0,
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        256,
        512,
        768,
        1024,
        1280,
        1536,
        1792,
        2048,
        2304,
        11,
        77,
        -1,
    ),
    "bitpix": (0, 1, 8, 16, 32, 64, 128, -8),
    "vox_offset": (0, 16, 348, 352, 353, 352.5, 400, 1e4, 1e12, -352, np.nan, np.inf),
    "scl_slope": (0, 1, -1, 2.5, 1e-30, 1e30, np.nan, np.inf),
    "scl_inter": (0, -1024, 1e30, np.nan, -np.inf, 0.5),
    "qform_code": (0, 1, 2, 4, 5, -1, 300),
    "sform_code": (0, 1, 2, 4, 5, -1, 300),
    "xyzt_units": (0, 1, 2, 3, 10, 255),
}
FLOAT_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_z")
FLOATS = (0.0, 1.0, -1.0, 0.5, 5.0, 1e6, 1e30, np.nan, np.inf, 1e-40)


def any_scan(chance: Random) -> nib.Nifti1Image:
    kind, order = chance.choice(KINDS), chance.choice("<>")
    dtype = RGB if kind == "rgb" else np.dtype(kind)
    noise = np.random.default_rng(chance.randrange(1000)).integers(
        0, chance.choice((3, 100, 60_000)), SHAPE_XYZ
    )
    voxels = np.zeros(SHAPE_XYZ, dtype) if kind == "rgb" else noise.astype(dtype)
    if dtype.kind == "f" and chance.random() < 0.3:
        voxels.flat[chance.randrange(voxels.size)] = chance.choice((np.nan, np.inf, 0.5, 1e30))
    if chance.random() < 0.1:
        voxels = np.stack([voxels] * 2, -1)
    make = nib.Nifti2Image if chance.random() < 0.25 else nib.Nifti1Image
    header = make.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = make(voxels, chance.choice(AFFINES), header, dtype=dtype)
    if chance.random() < 0.1:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe" * 20))
    return image


def with_odd_fields(raw: bytes, header_class: type[Any], order: str, chance: Random) -> bytes:
    size = header_class.sizeof_hdr
    header = header_class(raw[:size], endianness=order, check=False)
    fields = header._structarr
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice((*FIELD_VALUES, *FLOAT_FIELDS, "srow_x", "srow_y", "srow_z"))
        value = chance.choice(FIELD_VALUES.get(name, FLOATS))
        with np.errstate(all="ignore"):
            try:
                if fields[name].shape:
                    fields[name][chance.randrange(fields[name].shape[0])] = value
                else:
                    fields[name] = value
            except (OverflowError, ValueError):  # does not fit into the field
                fields[name] = 0
    return bytes(header.binaryblock) + raw[size:]


def scan_bytes(chance: Random) -> bytes:
    """A file, damaged in its fields, its bytes or its gzip stream, or (one of ten) not at all."""
    image = any_scan(chance)
    raw = image.to_bytes()
    how = chance.randrange(10)
    if 1 <= how <= 5:
        raw = with_odd_fields(raw, type(image.header), image.header.endianness, chance)
    elif how <= 8:
        raw = damaged(raw, chance)
    if chance.random() < 0.5:
        raw = gzip.compress(raw, chance.choice((1, 9)), mtime=0)
        if how == 9 or chance.random() < 0.2:
            raw = damaged(raw, chance)
    if chance.random() < 0.02:
        raw = gzip.compress(raw[:352] + bytes(chance.choice((1, 64)) << 20), 9, mtime=0)
    return raw


def file_name(chance: Random) -> str:
    return chance.choice(
        (
            "scan.nii",
            "scan.nii.gz",
            "scan",
            "Leber groß 肝.nii.gz",
            "two words.nii",
            "a'b\"c;$x.nii.gz",
        )
    )


def reference(path: Path) -> nib.Nifti1Image:
    """nibabel's reading of the same bytes, whatever the name."""
    raw = path.read_bytes()
    while raw[:2] == b"\x1f\x8b":  # a member after the first is a part of the file
        raw = zlib_all(raw)
    make = nib.Nifti2Image if raw[4:7] == b"n+2" else nib.Nifti1Image
    size = make.header_class.sizeof_hdr
    raw = raw[:size] + bytes(4) + raw[size + 4 :]  # extensions are not looked at
    header = make.header_class(raw[:size], check=False)
    if (
        header["vox_offset"] == 0
    ):  # right behind the header, as NIfTI's own library has it; nibabel would read that
        header["vox_offset"] = make.header_class.single_vox_offset
        raw = header.binaryblock + raw[size:]
    return make.from_bytes(raw)


def zlib_all(raw: bytes) -> bytes:
    """Python's own inflate. Raises `Wrong` where it refuses what ours took."""
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise Wrong(f"Python's gzip refuses it: {error}") from None


def affine_by_nibabel(image: nib.Nifti1Image, codes: set[str]) -> np.ndarray:
    """nibabel's affine; with the two differences that our findings name: the unit, and an unusable sform."""
    affine = image.header.get_qform() if "sform_unusable" in codes else image.affine
    if "unit_not_mm" not in codes:
        return np.asarray(affine)
    scale = {1: 1e3, 3: 1e-3}[int(image.header["xyzt_units"]) & 7]
    return np.diag([scale, scale, scale, 1.0]) @ affine


class NiftiTarget:
    """`read_scan_file` as image and as label."""

    name = "nifti"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        (case / file_name(chance)).write_bytes(scan_bytes(chance))

    def check(self, case: Path) -> None:
        (path,) = case.iterdir()
        scan = read_scan_file(path)
        codes = {note.code for note in scan.notes}
        self._compare(scan.volume.voxels, scan.volume.affine, path, codes)
        try:
            label = read_scan_file(path, "label").volume
        except UserError as error:
            if getattr(error, "code", "").startswith("label"):
                return
            raise Wrong(f"read as an image, but as a label: {error}") from None
        if (
            not np.allclose(label.voxels, scan.volume.voxels, atol=1e-3)
            or label.grid != scan.volume.grid
        ):
            raise Wrong("as a label it has other voxels than as an image")

    def _compare(self, voxels: np.ndarray, affine: np.ndarray, path: Path, codes: set[str]) -> None:
        try:
            image = reference(path)
            expected = np.asarray(image.dataobj).T
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"nibabel refuses it: {type(error).__name__}: {error}") from None
        expected = expected.reshape(expected.shape[-3:]).astype(np.float32)
        if not np.allclose(
            voxels.astype(np.float32), expected, rtol=1e-5, atol=1e-5, equal_nan=True
        ):
            raise Wrong("nibabel reads other voxels")
        theirs = affine_by_nibabel(image, codes)
        if not np.allclose(affine, theirs, rtol=1e-5, atol=1e-4):
            raise Wrong(f"nibabel has another affine: {theirs.tolist()}, ours {affine.tolist()}")


class ScoreTarget:
    """Two folders of masks through `pair_masks` and `score_pair`: Dice as numpy counts nibabel's voxels."""

    name = "score"

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, case: Path, chance: Random) -> None:
        rng = np.random.default_rng(chance.randrange(1000))
        affine = chance.choice(AFFINES)
        name = chance.choice(
            ("liver_1.nii.gz", "liver_1.nii", "Leber 肝.nii.gz", "<b>.nii.gz", "volume-3.nii")
        )
        for side in ("prediction", "truth"):
            (case / side).mkdir()
            voxels = rng.choice([0, 0, 1, 2, *([255] if chance.random() < 0.2 else [])], SHAPE_XYZ)
            make = nib.Nifti2Image if chance.random() < 0.2 else nib.Nifti1Image
            kind = np.dtype(chance.choice(("u1", "i2", "f4", "i8", "f8")))
            image = make(voxels.astype(kind), affine, dtype=kind)
            raw = image.to_bytes()
            if chance.random() < 0.4:
                raw = with_odd_fields(raw, type(image.header), "<", chance)
            elif chance.random() < 0.4:
                raw = damaged(raw, chance)
            (case / side / name).write_bytes(
                gzip.compress(raw, 1) if chance.random() < 0.5 else raw
            )

    def check(self, case: Path) -> None:
        (pair,) = pair_masks(case / "prediction", case / "truth").pairs
        ledger = open_ledger(case / "ledger", 1, False)
        outcome = score_pair(pair, ScoreJob(ledger, read_mask))
        if outcome.error is not None:
            if not outcome.is_user_error:
                raise RuntimeError(f"not foreseen: {outcome.error}")
            raise UserError(outcome.error)
        scores = ledger.read(pair.case_id)
        if scores is None:
            raise RunFailed("scored, but not in the ledger")
        truth, prediction = (self._voxels(path) for path in (pair.truth, pair.prediction))
        if truth[0].shape != prediction[0].shape or truth[1] != prediction[1]:
            return  # turned or moved: the alignment has tests of its own
        a, b = prediction[0], truth[0]
        a = np.where(b == 255, 0, a)
        b = np.where(b == 255, 0, b)
        for structure, low in (("liver", 1), ("tumour", 2)):
            total = int((a >= low).sum() + (b >= low).sum())
            dice = 2 * int(((a >= low) & (b >= low)).sum()) / total if total else None
            ours = scores[structure]["dice"]
            if dice is not None and (ours is None or abs(ours - dice) > 1e-9):
                raise Wrong(f"Dice of the {structure} is {ours}, numpy says {dice}")

    def _voxels(self, path: Path) -> Any:
        image = reference(path)
        return np.rint(np.asarray(image.dataobj)), image.affine.tolist()
