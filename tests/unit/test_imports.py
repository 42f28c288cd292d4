"""The rooms of the package: imports run one way, and the nouns know no MLX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cenacle

ROOT = Path(cenacle.__file__).parent

# From the ground up; a module may import from its own room and from those above this line.
# The longest name that fits decides: engine.scheduler is not in the room of engine.
ROOMS = (
    ("errors", "spec", "plan", "request", "dialogue"),
    (
        *("native", "collective", "engine.scheduler", "engine.terms", "engine.channel"),
        *("engine.drafts", "engine.pages"),
        *(
            "engine.prefixes",
            "cluster.supervisor",
            "cluster.fate",
            "server.fields",
            "server.exchange",
            "server.grammars",
            "server.openai",
        ),
        *("server.responses", "server.anthropic", "server.description", "demo_tasks", "cost"),
    ),
    ("model",),
    ("engine",),
    ("cluster",),
    (
        "api",
        "demo",
        "tracing",
        "selftest",
        "cost.probe",
        "cost.calibrate",
        "cost.runs",
        "",
    ),  # "" is the package itself, which passes on what api has
    ("bench",),
    ("server",),
    ("cli", "cli_chat", "cli_cluster", "cli_doctor", "cli_keys", "cli_plan", "__main__"),
)
WITHOUT_MLX = (
    *("", "errors", "spec", "plan", "request"),
    *("engine.scheduler", "engine.terms", "engine.channel", "dialogue"),
    *("server.openai", "server.responses", "server.anthropic", "server.description"),
    *("server.auth", "server.guard", "server.metrics", "server.tls"),
    *("cluster.supervisor", "engine.lockstep"),
    *("server.auth", "server.guard", "server.tls"),
    *("cluster.supervisor", "cluster.doctor", "engine.lockstep"),
    *("engine.grammar", "engine.text", "engine.prefixes", "engine.drafts"),
    *("engine.pages", "engine.disk"),
    *("model.balance", "model.ranges", "model.residency"),
    *("cost.shapes", "cost.catalog", "cost.routing", "cost.cost", "cost.planner", "cost.report"),
    *("cost.validate", "cost.here", "server.predicted"),
    *("cluster.state", "cluster.pairing", "cluster.wire", "cluster.links", "cluster.fate"),
    *("cluster.discovery", "cluster.rdma", "cluster.hostsfile", "cost.dealt"),
)


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def room(module: str) -> int | None:
    """The index of a module's room; None: it has no room yet."""
    fits = [
        (len(name), index)
        for index, names in enumerate(ROOMS)
        for name in names
        if module == name or (name and module.startswith(name + "."))
    ]
    return max(fits)[1] if fits else None


def imported(path: Path, module: str) -> set[str]:
    """The package's own modules that a file imports anywhere but for type checkers only."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
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
                    found.add(f"cenacle.{inner}" if inner in MODULES else source)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name.removeprefix("cenacle").removeprefix(".") for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = room(module)
    if module in ("server", "engine", "collective", "model", "cluster", "bench", "cost"):
        assert not imported(MODULES[module], module), "a package's own file imports nothing"
        return
    assert own is not None, f"{module} is in no room: give it one in ROOMS"
    wrong = [name for name in imported(MODULES[module], module) if room(name) > own]
    assert not wrong, f"{module} imports {wrong}, which are above it"


@pytest.mark.parametrize("module", [m for m in WITHOUT_MLX if m in MODULES])
def test_imports_no_mlx(module):
    name = f"cenacle.{module}" if module else "cenacle"
    program = f"import sys, {name}; print([m for m in sys.modules if m.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_all_is_sorted_and_complete():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    offered = {a.asname or a.name for n in relative for a in n.names} - {"api"}
    assert cenacle.__all__ == sorted(cenacle.__all__)
    assert set(cenacle.__all__) == offered
    for name in cenacle.__all__:
        assert getattr(cenacle, name) is not None
    errors = {n for n, v in vars(cenacle.errors).items() if isinstance(v, type)}
    assert errors <= set(cenacle.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cenacle.nonsense
