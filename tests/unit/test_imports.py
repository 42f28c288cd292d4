"""Imports point downward only, no two files import each other, and some modules never need MLX."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cenacle

ROOT = Path(cenacle.__file__).parent

# Packages and top-level modules, bottom first. Each imports only itself and what stands before it.
ORDER = (
    "errors",
    "logs",
    "extras",
    "message",
    "worker_process",
    "paths",
    "net",
    "machine",
    "open_files",
    "import_hooks",
    "deferred_transformers",
    "native",
    "core",
    "gguf",
    "collective",
    "text",
    "images",
    "scheduler",
    "planning",
    "model",
    "engine",
    "load_options",
    "ranks",
    "cluster",
    "verification",
    "runtime",
    "api",
    "calibration",
    "bench",
    "research",
    "demo",
    "server",
    "cli",
    "__main__",
)
# The package itself hands on names of `errors`, `api` and `runtime`; nothing below may need it.
PACKAGE = ""

WITHOUT_MLX = (
    PACKAGE,
    "cluster.discovery",
    "cluster.doctor",
    "cluster.framing",
    "cluster.hostsfile",
    "cluster.link_probe",
    "cluster.membership",
    "cluster.security",
    "cluster.thunderbolt",
    "core",
    "engine.cache.disk_store",
    "engine.sampling.grammar",
    "engine.speculative.ngram",
    "errors",
    "extras",
    "gguf",
    "images",
    "machine",
    "message",
    "model.byte_ranges",
    "net",
    "paths",
    "planning",
    "ranks.channel",
    "ranks.exit_reason",
    "ranks.rank_group",
    "ranks.step_timings",
    "scheduler",
    "server.api",
    "server.auth",
    "server.expected_speed",
    "server.metrics",
    "server.middleware",
    "server.plan_info",
    "server.tls",
    "text",
)


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted names below the package ("" is the package itself) and their files."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(module: str, modules: dict[str, Path], *, for_types: bool) -> set[str]:
    """The package's own modules that a file imports anywhere in it.

    `for_types`: also what it imports for type checkers only.
    """
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == "cenacle")
        if isinstance(node, ast.ImportFrom):
            full = ["cenacle", *package.split(".")] if package else ["cenacle"]
            base = full[: len(full) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source.split(".")[0] == "cenacle":
                for alias in node.names:
                    inner = f"{source}.{alias.name}".removeprefix("cenacle.")
                    found.add(f"cenacle.{inner}" if inner in modules else source)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name.removeprefix("cenacle").removeprefix(".") for name in found}


def find_upward_imports(order: tuple[str, ...], modules: dict[str, Path]) -> list[str]:
    """One sentence for each import that points upward, each unknown and each missing entry."""
    tops = {module.split(".")[0] for module in modules} - {PACKAGE}
    wrong = [f"{name} is listed in ORDER and does not exist" for name in order if name not in tops]
    wrong += [f"{name} is not listed in ORDER" for name in sorted(tops - set(order))]
    for module in modules:
        top = module.split(".")[0]
        if top not in order:
            continue
        for name in sorted(find_imports(module, modules, for_types=True)):
            source = name.split(".")[0]
            if source in order and order.index(source) > order.index(top):
                wrong.append(f"{module} imports {name}, which is above it")
    return wrong


def find_cycle(modules: dict[str, Path]) -> list[str]:
    """Files that import each other, in order; empty if there are none."""
    graph = {m: find_imports(m, modules, for_types=True) & set(modules) for m in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


MODULES = find_modules(ROOT)


def test_imports_point_downward():
    assert find_upward_imports(ORDER, MODULES) == []


def test_no_two_files_import_each_other():
    assert find_cycle(MODULES) == []


def write_package(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return find_modules(root)


def test_an_upward_import_is_found(tmp_path):
    modules = write_package(tmp_path, {"low.py": "from . import high\n", "high.py": ""})
    assert find_upward_imports(("low", "high"), modules) == [
        "low imports high, which is above it",
    ]


def test_an_upward_import_for_type_checkers_is_found(tmp_path):
    text = "if TYPE_CHECKING:\n    from .high import Name\n"
    modules = write_package(tmp_path, {"low.py": text, "high.py": ""})
    assert len(find_upward_imports(("low", "high"), modules)) == 1


def test_files_that_import_each_other_are_found(tmp_path):
    files = {"pkg/a.py": "from .b import x\n", "pkg/b.py": "def f():\n    from . import a\n"}
    assert set(find_cycle(write_package(tmp_path, files))) == {"pkg.a", "pkg.b"}


def test_missing_and_unlisted_modules_are_found(tmp_path):
    modules = write_package(tmp_path, {"new.py": ""})
    assert find_upward_imports(("gone",), modules) == [
        "gone is listed in ORDER and does not exist",
        "new is not listed in ORDER",
    ]


@pytest.mark.parametrize("entry", WITHOUT_MLX)
def test_imports_no_mlx(entry):
    modules = [m for m in MODULES if m == entry or (entry and m.startswith(entry + "."))]
    assert modules, f"{entry} does not exist"
    names = ", ".join(f"cenacle.{m}" if m else "cenacle" for m in modules)
    program = f"import sys, {names}; print([m for m in sys.modules if m.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_supervisor_imports_little():
    """It is there all the time, and the server starts after it."""
    program = """
import sys
from cenacle.cli import inference
from cenacle.cli.options import ServerArguments
from cenacle.server import supervisor
supervisor.supervise = lambda sock, report: 0
try:
    with inference.open_server(ServerArguments(port=0)):
        pass
except inference.typer.Exit:
    heavy = {"mlx", "numpy", "starlette", "transformers", "uvicorn", "cryptography"}
    print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("program", "heavy"),
    [
        (
            "from cenacle import deferred_transformers\n"
            "deferred_transformers.defer()\n"
            "from cenacle.ranks import worker\n"
            "worker.import_libraries()",
            ("httpx2", "huggingface_hub.hf_api", "jsonschema", "pydantic", "tokenizers"),
        ),
        (
            "from cenacle.text.text_worker import TextWorker\nTextWorker()",
            ("huggingface_hub.hf_api", "mlx", "pydantic", "transformers.models"),
        ),
        (
            "from cenacle import load_options\nfrom cenacle.ranks import local_ranks",
            ("mlx_lm", "numpy", "pydantic", "transformers"),
        ),
        (
            "from cenacle import deferred_transformers\n"
            "deferred_transformers.defer()\n"
            "import cenacle.api",
            (
                "cenacle.cluster.messages",
                "huggingface_hub.hf_api",
                "jsonschema",
                "pydantic",
                "tokenizers",
            ),
        ),
    ],
    ids=["rank", "text worker", "before ranks start", "before ranks load"],
)
def test_a_start_imports_little(program, heavy):
    """Each of these takes a tenth of a second of processor time, or more."""
    program += f"\nimport sys\nprint(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_all_is_sorted_and_complete():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    offered = {a.asname or a.name for n in relative for a in n.names} - {"api", "import_hooks"}
    assert cenacle.__all__ == sorted(cenacle.__all__)
    assert set(cenacle.__all__) == offered
    for name in cenacle.__all__:
        assert getattr(cenacle, name) is not None
    errors = {n for n, v in vars(cenacle.errors).items() if isinstance(v, type)}
    assert errors <= set(cenacle.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cenacle.nonsense
