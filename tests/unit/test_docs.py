"""README and docs: short enough, links lead somewhere, and the tree is the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "cenacle"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_readme_and_the_architecture_page_are_short():
    assert count_lines(ROOT / "README.md") <= 150
    assert count_lines(ROOT / "docs" / "architecture.md") <= 70


def test_the_annotated_tree_names_every_package_and_nothing_else():
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text[text.index("src/cenacle/") : text.index("native/  ")]
    named, parent = set(), ""
    for line in tree.splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"^\s*((?:\w+(?:/|\.py) ?)+)", line)[0].split():
            full = parent + name if indent > 2 else name
            named.add(full)
        if indent == 2 and line.strip().split()[0].endswith("/"):
            parent = line.strip().split()[0]
    folders = {
        f"{p.relative_to(PACKAGE)}/"
        for p in PACKAGE.rglob("*")
        if p.is_dir() and (p / "__init__.py").exists()
    }
    modules = {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    # Folders that a line names within its parent's description.
    nested = {f for f in folders if f.count("/") > 1 and f not in named}
    assert named - folders - modules == set()
    assert folders - named - nested == set()
    assert modules - named == set()
    for folder in nested:
        parent, name = folder.rstrip("/").split("/")
        (line,) = (row for row in tree.splitlines() if row.strip().startswith(f"{parent}/"))
        assert f"{name}/" in line, f"{folder} is not in the tree of docs/architecture.md"


def test_paths_in_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in re.findall(r"`([a-z_]+/[a-z_/]+(?:\.py)?)`", text):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


BRITISH = re.compile(
    r"colour|behaviour|neighbour|catalogue|centre[ds]?\b|modelled|(?:quant|normal|synchron|recogn|"
    r"optim|vector|central|author|initial|serial|token|general|special|summar|parallel)is(?:e|ing|at)",
    re.IGNORECASE,
)
WEB = "src/cenacle/server/web"
# Texts of their own time, data that a trained model knows, other programs.
AS_WRITTEN = (
    "docs/devlog.md",
    "CHANGELOG.md",
    "src/cenacle/demo/",
    f"{WEB}/mermaid/mermaid.min.js",
)


def test_the_spelling_is_american():
    suffixes = {".py", ".md", ".js", ".html", ".css", ".toml", ".h", ".cpp"}
    folders = [ROOT / name for name in ("src", "docs", "native", "benchmarks")]
    files = [p for f in folders for p in f.rglob("*") if p.suffix in suffixes]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in [*files, *ROOT.glob("*.md")]
        if not str(path.relative_to(ROOT)).startswith(AS_WRITTEN)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := BRITISH.search(line))
    ]
    assert not found, "British spelling; the rest of the text is American:\n" + "\n".join(found)
