"""Plans of `liverseg plan` and of nnU-Net v2's planner for the same scans and the same memory.

  python tools/bench/plan.py --nnunet-python /tmp/nnenv/bin/python
  python tools/bench/plan.py --data DIR [--data DIR ...] --gpu-memory-gib 24

Without --data: phantoms of five geometries, made by resampling `liverseg phantom`. nnU-Net is run
in an interpreter that has nnunetv2 (--nnunet-python); where it has not, only this project's plan
is printed. One JSON line per data set: `ratio` is the volume in mm^3 of this project's patch
divided by that of nnU-Net's. The table shows both plans. Not compared here: Dice.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.files import write_json
from liverseg_dist.planning.experiment_memory import GpuBudget
from liverseg_dist.planning.experiment_plan import plan_experiment
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.fingerprint_read import read_fingerprint
from liverseg_dist.planning.plan_settings import ExperimentPlan
from liverseg_dist.tracking.terminal_table import print_table
from liverseg_dist.volume import Float3

JOB = Path(__file__).with_name("nnunet_plan_job.py")
SEED = 11


@dataclass(frozen=True)
class Geometry:
    """A set of phantoms with the voxel sizes of its cases."""

    name: str
    channel: str
    spacings_mm: tuple[Float3, ...]


GEOMETRIES = (
    Geometry("ct_isotropic", "CT", ((2.0, 2.0, 2.0),) * 4),
    Geometry("ct_thin", "CT", ((1.0, 1.5, 1.5), (1.25, 1.5, 1.5), (0.8, 1.6, 1.6))),
    Geometry("ct_thick", "CT", ((5.0, 1.4, 1.4), (5.0, 1.6, 1.6), (7.5, 1.5, 1.5))),
    Geometry("mr_anisotropic", "MRI", ((8.0, 1.25, 1.25), (7.0, 1.25, 1.25), (9.0, 1.4, 1.4))),
    Geometry("ct_coarse", "CT", ((5.0, 4.0, 4.0), (4.0, 4.0, 4.0), (6.0, 4.5, 4.5))),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--gpu-memory-gib", type=float, default=8.0, help="default: nnU-Net's 8")
    parser.add_argument(
        "--nnunet-python", default=sys.executable, help="interpreter that has nnunetv2"
    )
    args = parser.parse_args()
    has_nnunet = check_nnunet(args.nnunet_python)
    if not has_nnunet:
        print(
            f"{args.nnunet_python} has no nnunetv2: nnU-Net's planner is skipped "
            "(pip install nnunetv2, or give --nnunet-python)",
            file=sys.stderr,
        )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = args.data or make_phantoms(Path(folder))
        for source in sources:
            python = args.nnunet_python if has_nnunet else None
            rows += compare(source, args.gpu_memory_gib, python, Path(folder))
    print_table(
        ("data", "planner", "voxel mm", "slab", "patch", "patch mm", "batch", "levels", "norm"),
        rows,
    )


def check_nnunet(python: str) -> bool:
    """Return whether an interpreter can run nnU-Net's planner."""
    code = (
        "import nnunetv2.experiment_planning.experiment_planners.default_experiment_planner,"
        "nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor"
    )
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def make_phantoms(folder: Path) -> list[Path]:
    """Write one data set per geometry: phantoms resampled to its voxel sizes."""
    original = folder / "original"
    cases = max(len(geometry.spacings_mm) for geometry in GEOMETRIES)
    command = [sys.executable, "-m", "liverseg_dist", "phantom", str(original)]
    command += ["--cases", str(cases), "--seed", str(SEED)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    images = sorted((original / "imagesTr").glob("*.nii.gz"))
    made = []
    for geometry in GEOMETRIES:
        target = folder / geometry.name
        entries = []
        for name in ("imagesTr", "labelsTr"):
            (target / name).mkdir(parents=True)
        for image_file, spacing_mm in zip(images, geometry.spacings_mm, strict=False):
            image = read_nifti(image_file)
            label = read_nifti(original / "labelsTr" / image_file.name, "label")
            grid = image.grid.with_spacing(spacing_mm)
            image = resample_to_grid(image, grid, "image")
            label = resample_to_grid(label, grid, "label")
            write_image(target / "imagesTr" / image_file.name, image.voxels, grid)
            write_mask(target / "labelsTr" / image_file.name, label.voxels, grid)
            names = {
                "image": f"imagesTr/{image_file.name}",
                "label": f"labelsTr/{image_file.name}",
            }
            entries.append(names)
        index = {
            "name": geometry.name,
            "modality": {"0": geometry.channel},
            "labels": {"0": "background", "1": "liver", "2": "tumour"},
            "numTraining": len(entries),
            "training": entries,
            "test": [],
        }
        write_json(target / "dataset.json", index)
        made.append(target)
    return made


def compare(
    source: Path, memory_gib: float, python: str | None, folder: Path
) -> list[tuple[str, ...]]:
    """Print the JSON line of a data set; return the rows of the table."""
    started = time.perf_counter()
    fingerprint = read_fingerprint(source, workers=2)
    fingerprint_s = time.perf_counter() - started
    plan = plan_experiment(fingerprint, GpuBudget(memory_gib))
    plan_s = time.perf_counter() - started - fingerprint_s
    own = describe_own(plan, fingerprint) | {
        "fingerprint_s": round(fingerprint_s, 2),
        "plan_s": round(plan_s, 2),
    }
    line: dict[str, Any] = {"bench": "plan", "case": source.name, "gpu_memory_gib": memory_gib}
    rows = [format_row(source.name, "liverseg", own)]
    if python is None:
        print(json.dumps(line | {"vs": None, "liverseg": own}))
        return rows
    peer = plan_with_nnunet(source, fingerprint, memory_gib, python, folder)
    ratio = patch_volume_mm3(own) / patch_volume_mm3(peer)
    print(
        json.dumps(
            line | {"vs": "nnunet", "ratio": round(ratio, 3), "liverseg": own, "nnunet": peer}
        )
    )
    return [*rows, format_row("", "nnU-Net", peer)]


def describe_own(plan: ExperimentPlan, fingerprint: DatasetFingerprint) -> dict[str, Any]:
    """Return the plan with the keys of `nnunet_plan_job.py`."""
    model = plan.settings.model
    assert model.features
    assert model.strides
    assert model.kernels
    return {
        "spacing_mm": plan.value("convert.cleaning.spacing_mm"),
        "slab": plan.value("convert.slab.policy"),
        "patch": list(plan.settings.data.patch_size),
        "batch": plan.settings.train.global_batch_size,
        "micro_batch": plan.settings.train.micro_batch_size,
        "recomputed_levels": list(plan.settings.train.activation_checkpointing),
        "normalisation": [channel.intensity for channel in fingerprint.channels],
        "features": list(model.features),
        "strides": [list(stride) for stride in model.strides],
        "kernels": [list(kernel) for kernel in model.kernels],
        "need_gib": plan.summary["need_gib"],
        "cases": len(fingerprint.cases),
    }


def plan_with_nnunet(
    source: Path, fingerprint: DatasetFingerprint, memory_gib: float, python: str, folder: Path
) -> dict[str, Any]:
    """Run nnU-Net's fingerprint extraction and planner on links to the same files."""
    dataset_id = len(list(folder.glob("nnunet_*"))) + 1
    root = folder / f"nnunet_{dataset_id}"
    raw = root / "raw" / f"Dataset{dataset_id:03d}_{source.name}"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    index = read_dataset(source)
    readable = {case.case_id for case in fingerprint.cases}
    for case in index.training:
        if case.case_id not in readable or case.label is None:
            continue
        for channel, image in enumerate(case.images):
            if image is not None:
                link = raw / "imagesTr" / f"{case.case_id}_{channel:04d}.nii.gz"
                link.symlink_to(image.resolve())
        (raw / "labelsTr" / f"{case.case_id}.nii.gz").symlink_to(case.label.resolve())
    labels = {}
    # The values in the files, not the class values of a store.
    for value, name in index.sources[0].scheme.values:
        if name != "ignore":
            labels[name] = value
    channels = {str(n): channel.name for n, channel in enumerate(fingerprint.channels)}
    content = {
        "channel_names": channels,
        "labels": labels,
        "numTraining": len(readable),
        "file_ending": ".nii.gz",
    }
    write_json(raw / "dataset.json", content)
    environment = os.environ | {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
    }
    # The peer's interpreter must not import this project's packages.
    environment.pop("PYTHONPATH", None)
    command = [python, str(JOB), str(dataset_id), str(memory_gib)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"nnU-Net's planner failed on {source.name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def patch_volume_mm3(plan: dict[str, Any]) -> float:
    """Return the volume of a plan's patch."""
    return math.prod(plan["patch"]) * math.prod(plan["spacing_mm"])


def format_row(data: str, planner: str, plan: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of a plan."""
    edges = [n * mm for n, mm in zip(plan["patch"], plan["spacing_mm"], strict=True)]
    return (
        data,
        planner,
        " ".join(f"{mm:.3g}" for mm in plan["spacing_mm"]),
        plan.get("slab", "none"),
        "x".join(map(str, plan["patch"])),
        "x".join(f"{mm:.0f}" for mm in edges),
        str(plan["batch"]),
        str(len(plan["features"])),
        ", ".join(plan["normalisation"]),
    )


if __name__ == "__main__":
    main()
