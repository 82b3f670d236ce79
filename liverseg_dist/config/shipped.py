"""The config files that come with the program.

They are found from any working directory, in a checkout and in a wheel. A checkout has them in the
top-level folder `configs`; a wheel installs that folder as `liverseg_dist/configs`
(pyproject.toml). The README calls them `configs/NAME.yaml`, so they are looked up by that path. A
file of the user with the same path takes precedence.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_CANDIDATES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_PREFIX = "configs"


def shipped_configs_folder() -> Path | None:
    """Return the folder of shipped config files; None in a copy of the code without them."""
    for folder in _CANDIDATES:
        # Another project may have installed a folder named `configs` beside this package.
        if (folder / "demo_cpu.yaml").is_file():
            return folder
    return None


def list_shipped_configs() -> list[Path]:
    """Return the shipped YAML files, sorted by name."""
    folder = shipped_configs_folder()
    return sorted(folder.glob("*.yaml")) if folder is not None else []


def find_config(path: Path) -> Path:
    """Resolve `configs/NAME` to the shipped file when the working directory has no such file.

    Returns:
        An existing shipped file, or `path` unchanged: the caller reports a missing file.
    """
    folder = shipped_configs_folder()
    if folder is None or path.exists() or path.parent != Path(_PREFIX):
        return path
    shipped = folder / path.name
    return shipped if shipped.is_file() else path


def describe_shipped_configs() -> str:
    """List the names for an error message, e.g. `configs/demo_cpu.yaml, configs/sweep.yaml`."""
    return ", ".join(f"{_PREFIX}/{path.name}" for path in list_shipped_configs())
