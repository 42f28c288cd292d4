"""The lock files have every dependency of the program, in a version that fits, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def read_locked(text: str) -> dict[str, str]:
    """Version of every package."""
    entries = re.split(r"\n(?=[a-z])", text)
    locked: dict[str, str] = {}
    for entry in entries:
        if (match := re.match(r"([a-z0-9][a-z0-9._-]*)==([^ ]+)", entry)) is not None:
            locked[match[1]] = match[2]
            assert "--hash=sha256:" in entry, match[1]
    return locked


@pytest.mark.parametrize(
    ("file", "extras"),
    [("requirements.lock", ["otel"]), ("requirements-vlm.lock", ["otel", "vlm"])],
)
def test_every_dependency_is_locked_with_hashes(file: str, extras: list[str]) -> None:
    text = (ROOT / file).read_text()
    locked = read_locked(text)
    assert len(locked) > 40
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"]
    for extra in extras:
        lines = lines + project["optional-dependencies"][extra]
    for line in lines:
        requirement = Requirement(line)
        version = locked[requirement.name.lower()]
        assert requirement.specifier.contains(version), line
    assert "://" not in text, "no address of a package index"


def test_both_files_have_the_same_versions() -> None:
    base, extended = (
        read_locked((ROOT / file).read_text())
        for file in ("requirements.lock", "requirements-vlm.lock")
    )
    assert base.items() <= extended.items()
