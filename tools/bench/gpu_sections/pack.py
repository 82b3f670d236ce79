"""`--pack`: wheels to bring to a GPU machine without an index, for Python 3.12 on Linux x86-64.

The machine has torch, and what comes with it or is common beside it (`EXPECTED`). Brought along is
what this project and the benchmarked peers need beyond that. Versions are pinned, so that a table
can be repeated.
"""

import subprocess
import sys
from pathlib import Path

from .context import ROOT

WHEELS = (
    "zarr==3.1.6", "numcodecs==0.16.6", "donfig==0.8.1.post1", "google-crc32c==1.8.0",
    "pydantic==2.12.5", "pydantic-core==2.41.5", "annotated-types==0.7.0", "nibabel==5.4.2",
    "connected-components-3d==4.1.1", "edt==3.1.2", "isal==1.9.1",
)  # fmt: skip
"""For this project."""
PEER_WHEELS = (
    "nnunetv2==2.8.1", "batchgenerators==0.25.5", "batchgeneratorsv2==0.3.6",
    "acvl-utils==0.2.6", "dynamic-network-architectures==0.4.4", "blosc2==3.12.2",
    "ndindex==1.10.1", "numexpr==2.14.1", "platformdirs==4.5.1", "monai==1.6.1",
)  # fmt: skip
"""For the comparisons; `--without-peers` leaves them out."""
SDISTS = {"batchgenerators", "nnunetv2", "acvl-utils", "dynamic-network-architectures",
          "batchgeneratorsv2"}  # fmt: skip
"""Pure Python packages that have no wheel on the index: a wheel is built here."""
EXPECTED = (
    "torch", "numpy", "scipy", "pillow", "pyyaml", "rich", "jinja2", "safetensors", "tensorboard",
    "threadpoolctl", "fsspec", "requests", "msgpack", "tqdm", "pandas", "matplotlib", "seaborn",
    "scikit-image", "scikit-learn", "tifffile", "einops", "triton",
)  # fmt: skip
"""Must be on the machine; scipy alone would take half of the limit."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "manylinux_2_24_x86_64",
             "manylinux_2_26_x86_64", "manylinux_2_5_x86_64")  # fmt: skip
LIMIT_MIB = 64.0


def pack_wheels(folder: Path, *, with_peers: bool) -> str:
    """Download the wheels; returns a message with the size and the command for the GPU machine.

    Raises:
        SystemExit: pip failed, or wheels and source exceed the limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for requirement in (*WHEELS, *(PEER_WHEELS if with_peers else ())):
        name = requirement.partition("==")[0]
        if name in SDISTS:
            run_pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, requirement)
        else:
            platforms = [f"--platform={platform}" for platform in PLATFORMS]
            run_pip(
                "download", "--no-deps", "--only-binary=:all:", "--python-version=3.12",
                "--implementation=cp", *platforms, "-d", folder, requirement,
            )  # fmt: skip
    wheels_mib = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    source_mib = measure_source_mib()
    total = wheels_mib + source_mib
    if total > LIMIT_MIB:
        sys.exit(
            f"gpu --pack: {wheels_mib:.1f} MiB of wheels and {source_mib:.1f} MiB of source exceed "
            f"{LIMIT_MIB:g} MiB; --without-peers leaves nnU-Net and MONAI out"
        )
    return (
        f"{folder}: {wheels_mib:.1f} MiB of wheels; with the source {total:.1f} of {LIMIT_MIB:g} "
        "MiB. On the GPU machine, in the project's folder:\n"
        f"  python3 -m pip install -q --no-index --no-deps --target /tmp/site {folder}/*.whl\n"
        "  PYTHONPATH=/tmp/site:. python3 tools/bench/gpu --out gpu.jsonl\n"
        f"It must have: {', '.join(EXPECTED)}"
    )


def run_pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *map(str, words)], check=False)
    if done.returncode:
        sys.exit(f"gpu --pack: pip failed for {words[-1]}; its reason is above")


def measure_source_mib() -> float:
    """Size of the tracked files."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    sizes = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            sizes.append(path.stat().st_size)
    return sum(sizes) / 2**20
