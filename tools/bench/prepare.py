"""CPU time and memory from a CT file to the network's voxels, compared with nnU-Net and MONAI in one run.

  python tools/bench/prepare.py [--image CT.nii.gz --label MASK.nii.gz] [--spacing 2.0 0.8 0.8] [--repeats 3]

Each system reads the image (and label), reorients it to RAS, and resamples both to the same voxel size: cubic images
with linear labels against scikit-image's `resize`, called as in nnU-Net v2; linear images with nearest labels against
MONAI's LoadImage, Orientation and Spacing. Without files a synthetic CT of 512 x 512 x 120 is used. Prints one JSON
line per comparison and a table: `ratio` is peer / this project in CPU seconds of one core, minimum of the repeats;
`peak_gib` is the memory that each system's process adds; `off_hu` is the mean difference of the results.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import ndimage

from liverseg_dist.config import CleaningConfig, ConvertConfig
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.data.preprocessing.pipeline import prepare_scan
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.volume import Float3, Grid

Prepared = tuple[np.ndarray, np.ndarray]
"""Image and label (z, y, x) in RAS."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path)
    parser.add_argument("--label", type=Path)
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=(2.0, 0.8, 0.8),
        metavar=("Z", "Y", "X"),
        help="mm",
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # inherited by the process of each system
    with tempfile.TemporaryDirectory() as folder:
        image, label = args.image, args.label
        if image is None or label is None:
            image, label = make_case(Path(folder))
        rows = [
            compare(vs, image, label, tuple(args.spacing), args.repeats)
            for vs in ("nnunet", "monai")
        ]
    for row in rows:
        print(json.dumps(row))
    print(
        f"\n{'against':8} {'own s':>8} {'peer s':>9} {'ratio':>7} {'own GiB':>9} {'peer GiB':>11} {'off HU':>8}"
    )
    for r in rows:
        print(
            f"{r['vs']:8} {r['ours_s']:8.2f} {r['theirs_s']:9.2f} {r['ratio']:7.1f}"
            f" {r['ours_peak_gib']:9.2f} {r['theirs_peak_gib']:11.2f} {r['off_hu']:8.2f}"
        )


def make_case(folder: Path) -> tuple[Path, Path]:
    """A body with noise like a CT's, and a liver with tumours; 120 slices of 512 x 512."""
    rng = np.random.default_rng(0)
    grid = Grid((120, 512, 512), np.diag([-0.75, -0.75, 2.0, 1]))
    z, y, x = np.ogrid[-1:1:120j, -1:1:512j, -1:1:512j]
    hu = np.where((y / 0.7) ** 2 + (x / 0.9) ** 2 < 1, 50, -1000) + np.zeros((120, 1, 1))
    label = ((z / 0.7) ** 2 + ((y + 0.1) / 0.4) ** 2 + ((x - 0.3) / 0.45) ** 2 < 1).astype(np.uint8)
    for _ in range(8):
        centre = rng.uniform((-0.3, -0.3, 0.1), (0.3, 0.1, 0.5))
        place = (
            ((z - centre[0]) / 0.1) ** 2
            + ((y - centre[1]) / 0.05) ** 2
            + ((x - centre[2]) / 0.05) ** 2
        )
        label[place < rng.uniform(0.2, 1)] = 2
    noise = np.stack(
        [
            ndimage.gaussian_filter(rng.normal(size=(512, 512)).astype(np.float32), 0.7)
            for _ in range(120)
        ]
    )
    hu = (hu + 60 * (label == 1) + 20 * (label == 2) + 30 * noise).astype(np.int16)
    write_image(folder / "image.nii.gz", hu, grid)
    write_mask(folder / "label.nii.gz", label, grid)
    return folder / "image.nii.gz", folder / "label.nii.gz"


def compare(
    vs: str, image: Path, label: Path, spacing_mm: Float3, repeats: int
) -> dict[str, object]:
    order = 3 if vs == "nnunet" else 1
    ours = in_own_process(f"ours_{order}", image, label, spacing_mm, repeats)
    theirs = in_own_process(vs, image, label, spacing_mm, repeats)
    shape = np.minimum(
        ours[2].shape, theirs[2].shape
    )  # MONAI rounds the number of voxels its own way
    box = tuple(slice(int(n)) for n in shape)
    off_hu = float(np.abs(ours[2][box].astype(np.float32) - theirs[2][box]).mean())
    return {
        "bench": "prepare", "case": "x".join(map(str, ours[2].shape)), "vs": vs, "order": order,
        "ratio": theirs[0] / ours[0], "ours_s": ours[0], "theirs_s": theirs[0],
        "ours_peak_gib": ours[1], "theirs_peak_gib": theirs[1], "off_hu": off_hu,
    }  # fmt: skip


def in_own_process(
    name: str, image: Path, label: Path, spacing_mm: Float3, repeats: int
) -> tuple[float, float, np.ndarray]:
    """Return (minimum CPU seconds, GiB added at the peak, image) of a system."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(timed, (name, image, label, spacing_mm, repeats))


def timed(
    name: str, image: Path, label: Path, spacing_mm: Float3, repeats: int
) -> tuple[float, float, np.ndarray]:
    warnings.simplefilter("ignore")
    contestant = {"ours_3": ours_cubic, "ours_1": ours_linear, "nnunet": nnunet, "monai": monai}[
        name
    ]
    contestant_modules(name)
    before_kib = memory_kib("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = contestant(image, label, spacing_mm)
        seconds.append(time.process_time() - start)
    return min(seconds), (memory_kib("VmHWM") - before_kib) / 2**20, result[0]


def memory_kib(field: str) -> int:
    """Of this process: VmRSS now, VmHWM at its peak (getrusage counts the parent's peak too)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def contestant_modules(name: str) -> None:
    """Imports count neither as time nor as memory."""
    for module in {"monai": ["monai.transforms"], "nnunet": ["nibabel", "skimage.transform"]}.get(
        name, []
    ):
        importlib.import_module(module)


def ours_cubic(image: Path, label: Path, spacing_mm: Float3) -> Prepared:
    return ours(image, label, spacing_mm, CleaningConfig())


def ours_linear(image: Path, label: Path, spacing_mm: Float3) -> Prepared:
    return ours(image, label, spacing_mm, CleaningConfig(order=1, antialias=False))


def ours(image: Path, label: Path, spacing_mm: Float3, cleaning: CleaningConfig) -> Prepared:
    prepared = prepare_scan(read_nifti(image), ConvertConfig(cleaning=cleaning), spacing_mm)
    return prepared.voxels, resample_to_grid(
        read_nifti(label, "label"), prepared.grid, "label"
    ).voxels


def nnunet(image: Path, label: Path, spacing_mm: Float3) -> Prepared:
    """Order 3 in plane and 0 across thick slices; a label is one linear resize per class, then 0.5."""
    import nibabel as nib
    from skimage.transform import resize

    def load(path: Path) -> tuple[np.ndarray, Float3]:
        canonical = nib.as_closest_canonical(nib.load(path))
        x, y, z = (float(mm) for mm in canonical.header.get_zooms()[:3])
        return np.asarray(canonical.dataobj).T, (z, y, x)

    voxels, own_mm = load(image)
    classes, _ = load(label)
    shape = [
        round(n * mm / wanted)
        for n, mm, wanted in zip(voxels.shape, own_mm, spacing_mm, strict=True)
    ]
    options = {"order": 3, "mode": "edge", "anti_aliasing": False}
    data = voxels.astype(np.float32)
    if max(own_mm) / min(own_mm) > 3 or max(spacing_mm) / min(spacing_mm) > 3:
        plane = np.stack([resize(s.astype(float), shape[1:], **options) for s in data])
        z = np.clip((np.arange(shape[0]) + 0.5) * len(data) / shape[0] - 0.5, 0, len(data) - 1)
        resampled = plane[np.floor(z + 0.5).astype(int)].astype(np.float32)
    else:
        resampled = resize(data.astype(float), shape, **options).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    for value in (0, 1, 2):
        share = resize(
            (classes == value).astype(float),
            shape,
            order=1,
            mode="edge",
            clip=True,
            anti_aliasing=False,
        )
        mask[share >= 0.5] = value
    return resampled, mask


def monai(image: Path, label: Path, spacing_mm: Float3) -> Prepared:
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

    keys = ("image", "label")
    chain = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, "RAS"),
            Spacingd(keys, spacing_mm[::-1], mode=("bilinear", "nearest")),
        ]
    )
    out = chain({"image": image, "label": label})
    return out["image"][0].numpy().T, out["label"][0].numpy().T.astype(np.uint8)


if __name__ == "__main__":
    guard_output_streams()
    main()
