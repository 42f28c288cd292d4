"""For all tests: the user's own keys and certificates are not touched, and none is timed."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def config_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cenacle-home-") as folder:
        os.environ["CENACLE_HOME"] = folder  # the programs that tests start inherit it
        yield Path(folder)
        del os.environ["CENACLE_HOME"]
