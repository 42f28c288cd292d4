"""requirements.lock has every dependency of the program, in a version that fits, with hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_every_dependency_is_locked_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z])", text)
    locked: dict[str, str] = {}
    for entry in entries:
        if (match := re.match(r"([a-z0-9][a-z0-9._-]*)==([^ ]+)", entry)) is not None:
            locked[match[1]] = match[2]
            assert "--hash=sha256:" in entry, match[1]
    assert len(locked) > 40
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        version = locked[requirement.name.lower()]
        assert requirement.specifier.contains(version), line
    assert "http" not in re.sub(r"^#.*|httpcore\w*|httpx[\w-]*", "", text, flags=re.MULTILINE)
