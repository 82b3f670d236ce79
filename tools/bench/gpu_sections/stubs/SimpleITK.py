"""Stands in for SimpleITK on a GPU machine without it (50 MB), so that modules can import it.

nnU-Net and the registration of scans import it, but nothing that is measured uses it: nnU-Net then
reads files with nibabel. `tools/bench/gpu` puts it last on the path where SimpleITK is missing.
"""


class Image:
    """A name for annotations."""


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"SimpleITK.{name}: SimpleITK is not installed")
