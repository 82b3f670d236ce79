"""Every odd kind of scan file through the real commands: read to the plain file's voxels, or named and left out."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from liverseg_dist.commands.main import main
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.model import build_model
from tests.data.mini_store import ct_like
from tests.data.sources import run, write_index
from tests.fuzz.targets.small import small_settings

SHAPE = (66, 24, 28)
AFFINE = np.diag([-1.5, -1.5, 2.0, 1.0])
Write = Callable[[Path, np.ndarray], None]


def stored(
    dtype: str = "i2",
    order: str = "<",
    inter: float = 0,
    affine: np.ndarray = AFFINE,
    make: type = nib.Nifti1Image,
) -> Write:
    """Voxels of another type, byte order, scaling, place or version of NIfTI."""

    def write(path: Path, voxels_zyx: np.ndarray) -> None:
        header = make.header_class(endianness=order)
        header.set_data_dtype(np.dtype(dtype))
        image = make((voxels_zyx.T - inter).astype(dtype), affine, header, dtype=np.dtype(dtype))
        raw = bytearray(image.to_bytes())
        fields = make.header_class(bytes(raw[: header.sizeof_hdr]), endianness=order, check=False)
        fields["scl_slope"], fields["scl_inter"] = 1, inter
        raw[: header.sizeof_hdr] = fields.binaryblock
        path.write_bytes(gzip.compress(bytes(raw), 1) if path.suffix == ".gz" else bytes(raw))

    return write


def with_fields(**fields: object) -> Write:
    def write(path: Path, voxels_zyx: np.ndarray) -> None:
        stored()(path, voxels_zyx)
        raw = gzip.decompress(path.read_bytes())
        header = nib.Nifti1Header(raw[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(gzip.compress(header.binaryblock + raw[348:], 1))

    return write


def of_shape_and_type(change: Callable[[np.ndarray], np.ndarray]) -> Write:
    def write(path: Path, voxels_zyx: np.ndarray) -> None:
        voxels = change(voxels_zyx.T)
        nib.save(nib.Nifti1Image(voxels, AFFINE, dtype=voxels.dtype), path)

    return write


def plain_bytes(path: Path, voxels_zyx: np.ndarray) -> None:
    stored()(path, voxels_zyx)
    path.write_bytes(gzip.decompress(path.read_bytes()))


def read_only(path: Path, voxels_zyx: np.ndarray) -> None:
    stored()(path, voxels_zyx)
    path.chmod(0o400)


def linked(path: Path, voxels_zyx: np.ndarray) -> None:
    stored()(path.with_name(f"elsewhere-{path.name}"), voxels_zyx)
    path.symlink_to(path.with_name(f"elsewhere-{path.name}"))


def link_loop(path: Path, voxels_zyx: np.ndarray) -> None:
    path.symlink_to(path.name)


def bomb(path: Path, voxels_zyx: np.ndarray) -> None:
    """64 MB of zeros in 64 KB, said to be a volume of 4 GB."""
    header = nib.Nifti1Header()
    header.set_data_shape((1024, 1024, 1000))
    header.set_zooms((1, 1, 1))
    header["magic"] = b"n+1"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(64 << 20), 6))


SHEARED = AFFINE.copy()
SHEARED[1, 2] = 0.3
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
GOOD: dict[str, Write] = {
    "plain": stored(),
    "big-endian": stored(order=">"),
    "nifti-2": stored(make=nib.Nifti2Image),
    "int64": stored("i8"),
    "float64": stored("f8"),
    "scaled": stored("u2", inter=-2000),
    "sheared": stored(affine=SHEARED),
    "qform and sform disagree": with_fields(qform_code=1, qoffset_x=40.0),
    "no gzip though so called": plain_bytes,
    "read-only": read_only,
    "a link": linked,
    "Leber groß 肝臓": stored(),
    " <b>&amp; 'two' words": stored(),
}
BAD: dict[str, tuple[Write, str]] = {
    "4D": (of_shape_and_type(lambda v: np.stack([v] * 2, -1)), "in 4 dimensions"),
    "RGB": (of_shape_and_type(lambda v: np.zeros(v.shape, RGB)), "voxels are RGB"),
    "complex": (of_shape_and_type(lambda v: v.astype(np.complex64)), "voxels are complex"),
    "float16": (with_fields(datatype=15), "of unknown type 15"),
    "zero spacing": (
        with_fields(sform_code=0, pixdim=[1, 1.5, 0, 2, 0, 0, 0, 0]),
        "voxels of 1.5 x 0 x 2 mm",
    ),
    "NaN affine": (with_fields(srow_x=[np.nan] * 4), "an affine is a finite"),
    "claims 10^13 voxels": (
        with_fields(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        "the header claims",
    ),
    "gzip bomb": (bomb, "shorter than its header states"),
    "link loop": (link_loop, "which does not exist"),
    "text": (lambda path, _: path.write_text("no scan") and None, "not a NIfTI file"),  # type: ignore[func-returns-value]
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them with the same voxels, and labels. One is an uncompressed file, called .nii, that is gzip."""
    folder = tmp_path_factory.mktemp("odd") / "Task03 with spaces"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    image, label = ct_like(SHAPE, 0)
    for name, write in {**GOOD, **{name: bad for name, (bad, _) in BAD.items()}}.items():
        write(folder / "imagesTr" / f"{name}.nii.gz", image)
        (write if name in GOOD else stored())(
            folder / "labelsTr" / f"{name}.nii.gz", label.astype(np.int16)
        )
    write_index(folder, [*GOOD, *BAD])
    for part, voxels in (("imagesTr", image), ("labelsTr", label)):
        stored()(folder / part / "g.nii.gz", voxels)
        (folder / part / "g.nii.gz").rename(folder / part / "gzip named nii.nii")
    index = json.loads((folder / "dataset.json").read_text())
    name = "gzip named nii.nii"
    index["training"].append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def test_convert_reads_what_is_a_scan_and_names_what_is_none(source: Path, tmp_path: Path) -> None:
    code, result = run("convert", source, tmp_path / "store", "convert.workers=1")
    assert code == 1  # some scans could not be read; the rest is done
    # Scan ids have no spaces at their ends.
    good = {*(name.strip() for name in GOOD), "gzip named nii"}
    audit = result["audit"]
    assert {name for name, entry in audit.items() if entry["stored_as"]} == good
    for name, (_, said) in BAD.items():
        assert audit[name]["status"] == "quarantined"
        assert any(said in finding["message"] for finding in audit[name]["findings"]), audit[name]
    codes = {name: {finding["code"] for finding in audit[name]["findings"]} for name in good}
    assert "sheared" in codes["sheared"]
    assert "qform_sform_disagree" in codes["qform and sform disagree"]
    store = CaseStore.open(tmp_path / "store")
    for name in good:
        np.testing.assert_array_equal(store.image(name), store.image("plain"), err_msg=name)
        np.testing.assert_array_equal(
            store.source_label(name), store.source_label("plain"), err_msg=name
        )
    assert "<b>" not in (tmp_path / "store" / "audit.html").read_text()
    assert run("verify", tmp_path / "store")[0] == 0


def test_score_and_predict_do_likewise(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    prediction = tmp_path / "prediction"
    prediction.mkdir()
    _, label = ct_like(SHAPE, 0)
    for name, write in {**GOOD, **{name: bad for name, (bad, _) in BAD.items()}}.items():
        write(prediction / f"{name}.nii.gz", label.astype(np.int16))
        shutil.copyfile(source / "labelsTr" / f"{name}.nii.gz", truth / f"{name}.nii.gz")
    code, result = run(
        "score", prediction, truth, "--out", tmp_path / "scores", "--workers", 1, "--no-pictures"
    )
    assert (code, result["n_cases"], sorted(result["failed"])) == (2, len(GOOD), sorted(BAD))
    assert result["liver"]["dice_per_case"] == result["tumour"]["dice_per_case"] == 1

    weights = tmp_path / "run"
    weights.mkdir()
    settings = small_settings()
    torch.manual_seed(0)
    save_file(build_model(settings.model).state_dict(), weights / "model.safetensors")
    (weights / "config.yaml").write_text(settings.to_yaml())
    threads = torch.get_num_threads()
    assert (
        main(["predict", str(weights), str(source / "imagesTr"), "--out", str(tmp_path / "masks")])
        == 1
    )
    torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for name, (_, said) in BAD.items():
        assert f"/{name}.nii.gz: " in error
        assert said in error or name == "link loop"
    plain = np.asarray(nib.load(tmp_path / "masks" / "plain.nii.gz").dataobj)
    for name in GOOD:
        mask = nib.load(tmp_path / "masks" / f"{name.strip()}.nii.gz")
        np.testing.assert_allclose(mask.affine, SHEARED if name == "sheared" else AFFINE, atol=1e-5)
        if name != "sheared":
            np.testing.assert_array_equal(np.asarray(mask.dataobj), plain, err_msg=name)
