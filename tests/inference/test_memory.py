"""Freed memory stays with the process, so that the next window does not make the kernel clear pages again."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from liverseg_dist.inference.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(20):
        arrays = [torch.zeros(12, 1 << 20) for _ in range(3)]  # 48 MiB each, as a window's activations
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_page_faults_end() -> None:
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, way],
                capture_output=True,
                text=True,
                check=True,
                env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"},
            ).stdout
        )
        for way in ("leave", "keep")
    }
    assert faults["leave"] > 100_000, faults
    assert faults["keep"] < 1000, faults
