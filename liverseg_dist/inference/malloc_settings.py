"""Keep freed memory in the process instead of returning it to the system after each layer.

By default glibc maps every large array when it is allocated and unmaps it when it is freed; the
kernel then clears each page again. For a small U-Net on a CPU this took half of a window's time
(64x128x128, `tiny`: 1.17 -> 0.62 CPU s; `S`, 32x96x96: 0.74 -> 0.55). Arrays of about a scan's size
are still returned to the system. Used by the commands that run a network on a CPU.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Option numbers of glibc's mallopt(3)."""
MAPPED_BYTES = 256 << 20
"""Arrays of this size or more keep a mapping of their own."""


def keep_freed_memory() -> bool:
    """Change the allocator's settings for the rest of the process.

    Returns:
        False where the C library has no such settings (macOS, musl).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = (
        (M_MMAP_THRESHOLD, MAPPED_BYTES),
        (M_TRIM_THRESHOLD, -1),
        # One heap for all threads: memory that one thread frees can be reused by the others.
        (M_ARENA_MAX, 1),
    )
    return all(mallopt(option, value) for option, value in options)
