"""CPU time and memory of converting a scan, compared with nnU-Net v2's preprocessing and MONAI's transforms.

  python tools/bench/convert.py [--shape 120 512 512] [--repeats 2]

The scan is synthetic: a body, a liver with tumours, noise; 2 x 0.8 x 0.8 mm, resampled to 2.5 x 1 x 1 mm. Each system
runs in its own process on one core, `--repeats` times; the minimum CPU time and the maximum memory count. Prints one
JSON line per comparison (`ratio` is peer / this project) and tables. `same` is the largest difference in HU where both
resample to the same voxels. Peers that are not installed are omitted with a message.

  scan to store     this project: read, audit, clean, cut the 64 slices, resample them, write Zarr, draw the thumbnail
  whole scan        the work of the peers: read, clean, resample image and label of the whole scan, scale to [0, 1], crop
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.conversion.convert_case import convert_case
from liverseg_dist.data.conversion.convert_dataset import Conversion
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.data.preprocessing.pipeline import clean_scan
from liverseg_dist.data.preprocessing.resample import Interpolation, resample_to_grid
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume

SOURCE_MM = (2.0, 0.8, 0.8)
TARGET_MM = (2.5, 1.0, 1.0)
CLIP_HU = (-17.0, 201.0)
MEAN_HU, STD_HU = 99.4, 39.4
CONTESTS = (
    # case, ours, theirs, name of theirs
    ("scan to store, order 3", "ours_store_3", "nnunet_save", "nnU-Net preprocessing, saved"),
    ("whole scan, order 3", "ours_scan_3", "nnunet", "nnU-Net preprocessing"),
    ("scan to store, order 1", "ours_store_1", "monai", "MONAI transforms"),
    ("whole scan, order 1", "ours_scan_1", "monai", "MONAI transforms"),
)
STAGES = (
    "source_hash", "read_scan_file", "audit_case", "hash_voxels", "clean_scan", "place_slabs", "resample",
    "foreground_samples", "write_case", "thumbnail", "coverage",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(120, 512, 512), metavar=("Z", "Y", "X")
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(measured(args.contestant, args.folder, args.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_scan(Path(folder), tuple(args.shape))
        names = dict.fromkeys(name for _, ours, theirs, _ in CONTESTS for name in (ours, theirs))
        results = {name: in_its_own_process(name, Path(folder), args.repeats) for name in names}
        report(args.shape, results, differences(Path(folder), results))


def report(
    shape: tuple[int, ...], results: dict[str, dict[str, Any]], same: dict[str, float]
) -> None:
    rows = []
    for case, ours, theirs, vs in CONTESTS:
        if "missing" in results[theirs]:
            print(f"omitted: {vs} ({results[theirs]['missing']})")
            continue
        mine, other = results[ours], results[theirs]
        row = {"bench": "convert", "shape": "x".join(map(str, shape)), "case": case, "vs": vs}
        row["ratio"] = round(other["cpu_s"] / mine["cpu_s"], 2)
        row |= {"ours_s": mine["cpu_s"], "theirs_s": other["cpu_s"]}
        row |= {
            "ours_peak_gib": mine["peak_gib"],
            "theirs_peak_gib": other["peak_gib"],
            "same": same.get(theirs),
        }
        rows.append(row)
        print(json.dumps(row))
    print(
        f"\n{'':24} {'against':30} {'own s':>7} {'peer s':>9} {'ratio':>6} {'GiB':>6} {'peer':>7}  difference"
    )
    for row in rows:
        difference = (
            ""
            if row["same"] is None or not row["case"].startswith("whole")
            else f"{row['same']:.2f} HU"
        )
        print(
            f"{row['case']:24} {row['vs']:30} {row['ours_s']:7.2f} {row['theirs_s']:9.2f} {row['ratio']:6.1f}"
            f" {row['ours_peak_gib']:6.2f} {row['theirs_peak_gib']:7.2f}  {difference}"
        )
    stages = results["ours_store_3"]["stages"]
    print("\nwhere our time goes (scan to store, order 3; CPU s, under the profiler):")
    print(
        "  "
        + ", ".join(
            f"{name} {seconds:.2f}" for name, seconds in sorted(stages.items(), key=lambda s: -s[1])
        )
    )


def make_scan(folder: Path, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    plane = (y[:, None] / 0.7) ** 2 + (x / 0.9) ** 2
    ball = (
        (z[:, None, None] / 0.75) ** 2 + ((y[:, None] + 0.1) / 0.4) ** 2 + ((x - 0.35) / 0.42) ** 2
    )
    label = (ball < 1).astype(np.uint8)
    for centre in rng.uniform([-0.4, -0.3, 0.15], [0.4, 0.1, 0.55], (8, 3)):
        near = ((z[:, None, None] - centre[0]) / 0.1) ** 2 + ((y[:, None] - centre[1]) / 0.06) ** 2
        label[(near + ((x - centre[2]) / 0.06) ** 2 < 1) & (label > 0)] = 2
    image = (
        np.where(plane < 1, 40.0, -1000.0).astype(np.float32)
        + np.array([0, 65, 20], np.float32)[label]
    )
    image += rng.standard_normal(shape, dtype=np.float32) * np.where(plane < 1, 14, 3).astype(
        np.float32
    )
    affine = np.diag([-SOURCE_MM[2], -SOURCE_MM[1], SOURCE_MM[0], 1.0])
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    voxels = np.clip(image, -1024, 3000).astype(np.int16)
    write_image(folder / "imagesTr" / "liver_0.nii.gz", voxels, Grid(shape, affine))
    write_mask(folder / "labelsTr" / "liver_0.nii.gz", label, Grid(shape, affine))
    (folder / "dataset.json").write_text(json.dumps(DATASET))


DATASET = {
    "name": "bench",
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "file_ending": ".nii.gz",
    "training": [{"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}],
    "test": [],
}


def in_its_own_process(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [
        sys.executable,
        __file__,
        "--contestant",
        name,
        "--folder",
        str(folder),
        "--repeats",
        str(repeats),
    ]
    done = subprocess.run(
        command, env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Return minimum CPU seconds and peak GiB (of the process, with imports) of a system."""
    warnings.simplefilter("ignore")
    try:
        work = CONTESTANTS[name](folder)
    except ImportError as error:
        return {"missing": f"{error.name} is not installed"}
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"cpu_s": round(min(times), 3), "peak_gib": round(peak_gib, 2)}
    return {**result, "stages": stages(work) if name.startswith("ours") else {}}


def stages(work: Callable[[], Any]) -> dict[str, float]:
    profile = cProfile.Profile(time.process_time)
    profile.runcall(work)
    found: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if function in STAGES and "liverseg_dist" in file:
            found[function] = found.get(function, 0) + cumulative
    return found


# --- systems: each function prepares, and returns the function that is timed -------------------------------------------------


def ours_store(order: int) -> Callable[[Path], Callable[[], Any]]:
    def prepare(folder: Path) -> Callable[[], Any]:
        cleaning = {"spacing_mm": TARGET_MM, "order": order}
        convert = ConvertConfig.model_validate({"cleaning": cleaning})

        def work() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as store:
                conversion = Conversion(read_dataset(folder), Path(store) / "s.zarr", convert)
                with conversion.opened(force=False):
                    record, _ = convert_case(conversion.jobs()[0])
                assert record.status == "kept", record.findings

        return work

    return prepare


def ours_scan(order: int) -> Callable[[Path], Callable[[], Any]]:
    def prepare(folder: Path) -> Callable[[], Any]:
        return lambda: our_scan(folder, order)

    return prepare


def our_scan(folder: Path, order: int, scale: bool = True) -> tuple[Volume, Volume]:
    """Image (scaled to [0, 1], or HU) and label at TARGET_MM, cropped to voxels that are not air."""
    convert = ConvertConfig()
    clean = clean_scan(read_nifti(folder / "imagesTr/liver_0.nii.gz"), convert.cleaning).volume
    label = read_nifti(folder / "labelsTr/liver_0.nii.gz", "label").reoriented(
        CANONICAL_ORIENTATION
    )
    grid = clean.grid.with_spacing(TARGET_MM)
    interpolation = Interpolation(3 if order == 3 else 1, 1, antialias=False)
    image, label = (
        resample_to_grid(clean, grid, "image", interpolation=interpolation),
        resample_to_grid(label, grid, "label"),
    )
    if not scale:
        return image, label
    low, high = CLIP_HU
    scaled = (np.clip(image.voxels, low, high).astype(np.float32) - low) / np.float32(high - low)
    used = [np.flatnonzero(scaled.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    start, shape = [int(u[0]) for u in used], [int(u[-1] - u[0] + 1) for u in used]
    return Volume(scaled, grid).cropped(start, shape), label.cropped(start, shape)


def nnunet_parts(folder: Path) -> tuple[Any, tuple[Any, ...]]:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    kwargs = {"force_separate_z": None, "is_seg": False, "order_z": 0}
    resampling = "resample_data_or_seg_to_shape"
    configuration = {
        "spacing": list(TARGET_MM), "patch_size": [64, 128, 128], "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False], "data_identifier": "bench", "preprocessor_name": "DefaultPreprocessor",
        "resampling_fn_data": resampling, "resampling_fn_data_kwargs": {**kwargs, "order": 3},
        "resampling_fn_seg": resampling, "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True, "order": 1},
        "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
    }  # fmt: skip
    properties = {
        "mean": MEAN_HU,
        "std": STD_HU,
        "percentile_00_5": CLIP_HU[0],
        "percentile_99_5": CLIP_HU[1],
    }
    plans = PlansManager(
        {
            "dataset_name": "bench", "plans_name": "bench", "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {"0": properties},
            "configurations": {"bench": configuration},
        }
    )  # fmt: skip
    files = ([str(folder / "imagesTr/liver_0.nii.gz")], str(folder / "labelsTr/liver_0.nii.gz"))
    preprocessor = DefaultPreprocessor(verbose=False)
    return preprocessor, (*files, plans, plans.get_configuration("bench"), DATASET)


def nnunet(folder: Path) -> Callable[[], Any]:
    preprocessor, arguments = nnunet_parts(folder)
    return lambda: preprocessor.run_case(*arguments)


def nnunet_save(folder: Path) -> Callable[[], Any]:
    preprocessor, arguments = nnunet_parts(folder)

    def work() -> None:
        for old in folder.glob("saved*"):
            old.unlink()
        preprocessor.run_case_save(str(folder / "saved"), *arguments)

    return work


def monai(folder: Path) -> Callable[[], Any]:
    chain = monai_chain()
    return lambda: chain(monai_files(folder))


def monai_files(folder: Path) -> dict[str, str]:
    return {
        "image": str(folder / "imagesTr/liver_0.nii.gz"),
        "label": str(folder / "labelsTr/liver_0.nii.gz"),
    }


def monai_chain(most: int = 5) -> Any:
    """Its Spleen and Liver tutorials' first transforms; `most`: how many of them."""
    import torch
    from monai import transforms

    torch.set_num_threads(1)
    both = ["image", "label"]
    low, high = CLIP_HU
    steps = [
        transforms.LoadImaged(keys=both, ensure_channel_first=True),
        transforms.Orientationd(keys=both, axcodes="RAS"),
        transforms.Spacingd(keys=both, pixdim=TARGET_MM[::-1], mode=("bilinear", "nearest")),
        transforms.ScaleIntensityRanged(
            keys=["image"], a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True
        ),
        transforms.CropForegroundd(keys=both, source_key="image"),
    ]
    return transforms.Compose(steps[:most])


CONTESTANTS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "ours_store_3": ours_store(3),
    "ours_store_1": ours_store(1),
    "ours_scan_3": ours_scan(3),
    "ours_scan_1": ours_scan(1),
    "nnunet": nnunet,
    "nnunet_save": nnunet_save,
    "monai": monai,
}


def differences(folder: Path, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest difference in HU between images resampled to the same voxels, those of the peer mapped back to HU."""
    found = {}
    low, high = CLIP_HU
    if "missing" not in results["nnunet"]:
        preprocessor, arguments = nnunet_parts(folder)
        theirs = preprocessor.run_case(*arguments)[0][0] * STD_HU + MEAN_HU
        # It clips before it resamples, and leaves the axes as SimpleITK reads them: LPS, as the file has them.
        image = read_nifti(folder / "imagesTr/liver_0.nii.gz")
        clipped = image.with_voxels(np.clip(image.voxels, low, high).astype(np.float32))
        cubic = Interpolation(antialias=False)
        mine = resample_to_grid(
            clipped, image.grid.with_spacing(TARGET_MM), "image", interpolation=cubic
        )
        found["nnunet"] = float(np.abs(np.asarray(theirs) - mine.voxels).max())
    if "missing" not in results["monai"]:
        theirs = monai_chain(most=3)(monai_files(folder))["image"]
        grid = Grid(tuple(theirs.shape[:0:-1]), np.asarray(theirs.affine))  # type: ignore[arg-type]
        image = read_nifti(folder / "imagesTr/liver_0.nii.gz")
        linear = Interpolation(1, 1, antialias=False)
        mine = resample_to_grid(
            image.with_voxels(image.voxels.astype(np.float32)), grid, "image", interpolation=linear
        )
        inner = (slice(1, -1),) * 3  # at the border MONAI repeats the edge where we have air
        found["monai"] = float(
            np.abs(np.asarray(theirs[0]).transpose(2, 1, 0) - mine.voxels)[inner].max()
        )
    return found


if __name__ == "__main__":
    guard_output_streams()
    main()
