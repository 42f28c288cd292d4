"""For all tests: the user's own keys and certificates are not touched."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def config_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cenacle-home-") as folder:
        os.environ["CENACLE_HOME"] = folder  # the programs that tests start inherit it
        yield Path(folder)
        del os.environ["CENACLE_HOME"]
