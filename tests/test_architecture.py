"""The layers of the package, as in the README. A test keeps description and code equal."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "liverseg_dist"

FLOORS = {
    "errors": 0, "cores": 0, "files": 0, "locks": 0, "labels": 0, "label_scheme": 0, "volume": 0, "workers": 0, "texts": 0,
    "streams": 0, "console": 0, "config": 0, "tracking": 0, "pages": 0, "interrupts": 0, "precision": 0, "logging_setup": 0,
    "optional_packages": 0, "__init__": 0,
    "data": 1, "model": 1, "distributed": 1, "evaluation": 1, "clinical": 1,
    "phantom": 2, "inference": 2, "planning": 2,
    "training": 3, "api": 3,
    "commands": 4, "__main__": 5,
}  # fmt: skip
FACTS_ORDER = (
    "errors",
    "optional_packages",
    "cores",
    "streams",
    "console",
    "interrupts",
    "logging_setup",
    "files",
    "locks",
    "labels",
    "volume",
    "workers",
    "texts",
    "label_scheme",
    "config",
    "precision",
    "tracking",
    "pages",
)
MAX_LINES = 400


def python_files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "launch").rglob("*.py")])


def package_of(path_or_module: str) -> str:
    parts = path_or_module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute_name(path: Path, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names.

    Only `launch` imports its own modules relatively: a wheel installs it under another name (launch/__init__.py).
    """
    where = f"{path.relative_to(ROOT)}: line {node.lineno}"
    module = node.module or ""
    in_launch = path.relative_to(ROOT).parts[0] == "launch"
    if not node.level:
        assert not (in_launch and module.split(".")[0] == "launch"), (
            f"{where}: import it relatively"
        )
        return module
    assert in_launch, f"{where}: relative import"
    package = path.relative_to(ROOT).parent.parts
    parts = [*package[: len(package) - node.level + 1], *module.split(".")]
    if not module:  # from . import NAME
        name = node.names[0].name
        parts = [*package[: len(package) - node.level + 1]]
        if (ROOT.joinpath(*parts) / f"{name}.py").exists():
            parts.append(name)
    return ".".join(parts)


def own_imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, imported module, whether it stands inside a function) for imports of our own packages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [absolute_name(path, node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [
            (node.lineno, n, id(node) in inside)
            for n in names
            if n.split(".")[0] in (PACKAGE, "launch")
        ]
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards_only(path: Path) -> None:
    here = module_name(path)
    for line, imported, inside_function in own_imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {imported}"
        assert not inside_function, f"{where} inside a function"
        if here.startswith("launch"):
            continue
        assert not imported.startswith("launch"), f"{where}: nothing imports launch"
        package, imported_package = package_of(here), package_of(imported)
        if package == imported_package or imported_package == "__init__":
            continue
        assert FLOORS[imported_package] <= FLOORS[package], f"{where}: it imports a higher layer"
        if FLOORS[imported_package] == FLOORS[package]:
            assert FLOORS[package] == 0, f"{where}: packages of one layer do not import each other"
            assert FACTS_ORDER.index(imported_package) < FACTS_ORDER.index(package), (
                f"{where}: the order of the lowest layer is {FACTS_ORDER}"
            )


COMMANDS_ENTRY_POINT = f"{PACKAGE}.commands.main"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_entry_point_of_the_command_line_is_imported(path: Path) -> None:
    """Logic that other packages need belongs below commands/; what they may use of it is `main.py`."""
    if module_name(path).startswith(f"{PACKAGE}.commands"):
        return
    for line, imported, _ in own_imports(path):
        if imported.startswith(f"{PACKAGE}.commands"):
            where = f"{path.relative_to(ROOT)}:{line} imports {imported}"
            assert imported == COMMANDS_ENTRY_POINT, f"{where}; import {COMMANDS_ENTRY_POINT}"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_there_are_no_import_cycles() -> None:
    modules = {module_name(path): path for path in python_files()}
    graph = {
        name: {target for _, target, _ in own_imports(path) if target in modules and target != name}
        for name, path in modules.items()
    }
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"import cycle: {' -> '.join([*trail, name])}"
        if state.get(name) == 2:
            return
        state[name] = 1
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        state[name] = 2

    for name in sorted(graph):
        visit(name, ())


RANK_QUESTION_RE = re.compile(r"\bis_main\b|global_rank\s*==\s*0|rank\(\)\s*==\s*0")
POINTER_FILE = f"{PACKAGE}/training/checkpoint.py"


def test_only_distributed_and_the_pointer_file_ask_for_rank_0() -> None:
    """Others use `start_rank`, `share_from_rank0`, `World.call_on_rank0` or log records."""
    asking = []
    for path in python_files():
        if package_of(module_name(path)) != "distributed":
            name = path.relative_to(ROOT).as_posix()
            if RANK_QUESTION_RE.search(path.read_text(encoding="utf-8")):
                asking.append(name)
    assert asking == [POINTER_FILE]


def test_commands_write_through_the_console() -> None:
    """One place decides on streams, flushing, `--quiet` and ranks."""
    for path in sorted((ROOT / PACKAGE / "commands").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_print = isinstance(node, ast.Name) and node.id == "print"
            assert not is_print, (
                f"{path.relative_to(ROOT)}:{node.lineno}: use liverseg_dist.console"
            )


def test_lower_packages_do_not_use_torch_distributed() -> None:
    """Data, model, evaluation and inference get integers and functions, never a process group."""
    for path in python_files():
        if package_of(module_name(path)) in (
            "data",
            "model",
            "evaluation",
            "inference",
            "clinical",
            "config",
            "precision",
            "tracking",
        ):
            text = path.read_text(encoding="utf-8")
            assert "torch.distributed" not in text, (
                f"{path.relative_to(ROOT)} uses torch.distributed"
            )


def test_top_level_is_as_the_owner_fixed_it() -> None:
    allowed = {
        PACKAGE,
        "launch",
        "slurm",
        "configs",
        "tests",
        "tools",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    made = {"build", "dist", "runs", "demo"}
    found = {
        p.name
        for p in ROOT.iterdir()
        if not p.name.startswith(".") and not p.name.endswith(".egg-info")
    }
    assert found - allowed - made == set()


STRUCTURE_WORD = re.compile(r"(?<![a-z])(liver|tumou?r)s?(?![a-z])")
MAY_NAME_STRUCTURES = {
    "labels.py": "the scheme of LiTS",
    "data/io/source_labels.py": "names of LiTS in Task03's dataset.json",
    "data/store/metadata_checks.py": "stores of schema 1",
    "data/conversion/slab_stage.py": "the code of a finding in stores",
    "config/aliases.py": "settings keys of earlier versions",
    "data/audit/anatomy.py": "plausible sizes of organs",
    "data/audit/case_audit.py": "codes of findings of earlier versions",
    "data/audit/image_audit.py": "plausible intensities of organs",
    "inference/scan_checks.py": "plausible intensities of organs",
}
"""Files that name a structure in code, and why. All other code works for any label scheme."""


def structure_names_in(path: Path) -> set[str]:
    """Identifiers, and texts that are one word, that name a structure of LiTS."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A message may give an example; a text of one word is a key or a name.
            text = node.value if len(node.value.split()) == 1 else ""
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, (ast.arg, ast.keyword)):
            text = node.arg or ""
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = node.name
        if STRUCTURE_WORD.search(text.lower()):
            found.add(text)
    return found


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_only_few_files_name_a_structure(path: Path) -> None:
    name = path.relative_to(ROOT / PACKAGE if path.is_relative_to(ROOT / PACKAGE) else ROOT)
    is_phantom = name.parts[0] == "phantom" or name.name.startswith("phantom")
    if is_phantom or name.as_posix() in MAY_NAME_STRUCTURES:
        return
    assert structure_names_in(path) == set()
