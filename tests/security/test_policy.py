"""What no file of ours may do, as a test: run, unpickle or evaluate what it reads, or hand it to a shell.

Not held by it, and inherent: Python hands jobs to its own worker processes by pickle, and torch the small objects that
ranks of one job send each other (`distributed/collectives.py` alone does). launch gives submitit a batch file instead
of a pickled function; the pickles that submitit itself keeps in a job's folder are read by nobody here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = "liverseg_dist/distributed/collectives.py"
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "tempfile.mktemp", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "torch.hub.load", "torch.jit.load", "numpy.core.records.load",
}  # fmt: skip
UNPICKLING_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
}
UNPICKLING_CHECKPOINTS = {"FileSystemReader", "FsspecReader", "dcp_to_torch_save"}


def sources() -> list[Path]:
    files = [
        path
        for folder in ("liverseg_dist", "launch", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ]
    scripts = [
        p
        for p in (ROOT / "tools").iterdir()
        if p.is_file() and p.read_bytes().startswith(b"#!/usr/bin/env py")
    ]
    return sorted([*files, *scripts])


def broken_rules(tree: ast.AST) -> Iterator[str]:
    """What a source does that it must not, with its line."""
    for node in ast.walk(tree):
        for what in _imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            yield f"line {node.lineno}: {what}"
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {what}" for what in _call(node))


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    modules = (
        [node.module or ""]
        if isinstance(node, ast.ImportFrom)
        else [alias.name for alias in node.names]
    )
    yield from (f"imports {name}" for name in modules if name.split(".")[0] in PICKLERS)
    names = {alias.name for alias in node.names}
    yield from (f"uses {name}" for name in sorted(names & UNPICKLING_CHECKPOINTS))
    if isinstance(node, ast.ImportFrom) and node.module in ("os", "subprocess", "tempfile", "yaml"):
        yield from (
            f"imports {node.module}.{n}" for n in names if f"{node.module}.{n}" in FORBIDDEN_CALLS
        )
    if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
        yield from (f"imports {node.module}.load by its bare name" for n in names if n == "load")


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func).replace("np.", "numpy.")
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "numpy.load" and options.get("allow_pickle") != "False":
        yield "numpy.load without allow_pickle=False"
    elif options.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    if options.get("shell", "False") != "False":
        yield "a shell"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_read_is_run(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    assert list(broken_rules(ast.parse(text))) == []
    if name != COLLECTIVES:
        assert not [word for word in UNPICKLING_COLLECTIVES if word in text], (
            f"objects go through {COLLECTIVES}"
        )


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import joblib", "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)", "np.load(f, allow_pickle=True)", "numpy.savez(f, allow_pickle=1)", "yaml.load(f, Loader=x)",
        "eval(x)", "exec(x)", "subprocess.run(x, shell=True)", "os.system(x)", "tempfile.mktemp()",
        "from tempfile import mktemp", "from torch import load",
        "from torch.distributed.checkpoint import FileSystemReader",
    ],
)  # fmt: skip
def test_the_policy_sees_what_it_forbids(text: str) -> None:
    assert len(list(broken_rules(ast.parse(text)))) == 1


def test_the_policy_lets_the_safe_ways_pass() -> None:
    safe = "torch.load(f, 'cpu', weights_only=True); np.load(f, allow_pickle=False); yaml.safe_load(f); model.eval()"
    assert list(broken_rules(ast.parse(safe))) == []
