"""A data set whose maker means ill, or told too much: patients' names in the headers, markup in names, and all commands
run over it, with a umask of 0. Run as a program it does the latter in one process."""

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from liverseg_dist.commands.main import main
from tests.data.mini_store import ct_like
from tests.data.sources import LPS

OWNED = "document.documentElement.dataset.owned=1"
EVIL_CASE = f"<img src=x onerror={OWNED}>"
EVIL_TEXT = f"</title></pre></script><script>{OWNED}</script>\"'><svg onload={OWNED}>`"
PATIENT = "SMITH^JOHN"
CLINIC = "clinic_of_dr_jones"
"""A folder on the way to the scans."""
TINY = (
    "data.patch_size=[16,32,32]", "data.workers=1", "model.features=[4,8]", "train.global_batch_size=2",
    "train.max_steps=2", "train.log_every_steps=1", "checkpoint.every_steps=1", "validation.every_steps=2",
    "validation.max_cases=2", "train.threads=1",
)  # fmt: skip


def write_scan(path: Path, voxels_zyx: np.ndarray) -> None:
    """A NIfTI file in which every free text of the header, and an extension, name the patient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels_zyx.T, LPS)
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = f"{PATIENT[:9]}_{field}"[:15].encode()
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", f"PatientName {PATIENT}".encode())
    )
    nib.save(image, path)


def write_hostile_source(folder: Path) -> Path:
    names = [f"liver_{n}" for n in range(3)] + [EVIL_CASE]
    for seed, name in enumerate(names):
        image, label = ct_like((70, 40, 44), seed)
        write_scan(folder / "imagesTr" / f"{name}.nii.gz", image)
        write_scan(folder / "labelsTr" / f"{name}.nii.gz", label)
    index = {
        "name": EVIL_TEXT,
        "description": f"{EVIL_TEXT} {PATIENT}",
        "reference": PATIENT,
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [
            {"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def all_commands(out: Path, source: Path) -> list[list[str]]:
    """Everything a user does with a data set, and with one file of it cut short on the way."""
    store, run = out / "s.zarr", out / f"run_{EVIL_CASE}"
    broken, evil = (
        source / "imagesTr" / "liver_1.nii.gz",
        source / "imagesTr" / f"{EVIL_CASE}.nii.gz",
    )
    return [
        ["convert", str(source), str(store), "convert.splits.folds=2", "convert.workers=1"],
        ["train", "--device", "cpu", f"data.store={store}", f"run.dir={run}", *TINY],
        ["cut", str(broken)],
        ["evaluate", str(run), "--device", "cpu", "--source", str(source), "--cases", f"liver_1,liver_2,{EVIL_CASE}"],
        ["predict", str(run), str(broken), str(evil), "--out", str(out / "masks"), "--device", "cpu"],
        ["copy", str(source / "labelsTr" / "liver_0.nii.gz"), str(out / "masks" / "liver_0.nii.gz")],
        ["copy", str(broken), str(out / "masks" / "liver_2.nii.gz")],
        ["score", str(out / "masks"), str(source / "labelsTr"), "--out", str(out / "scores"), "--workers", "1"],
        ["verify", str(store)],
    ]  # fmt: skip


def run_all(out: Path, source: Path) -> dict[str, int]:
    codes = {}
    for name, *arguments in all_commands(out, source):
        if name == "cut":
            path = Path(arguments[0])
            path.write_bytes(path.read_bytes()[:5000])
        elif name == "copy":
            Path(arguments[1]).write_bytes(Path(arguments[0]).read_bytes())
        else:
            print(f"== {name}", file=sys.stderr, flush=True)
            os.umask(0)
            codes[name] = main([name, *arguments])
    return codes


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), Path(sys.argv[2]))))
