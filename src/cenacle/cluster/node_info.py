"""What this machine is, as its agent reports it: memory, processor, versions, addresses.

Owns: asking the system.
Does not know: clusters, models.
Invariant: plain data (JSON); nothing here takes longer than about a second.
Next: `agent.py` sends it, `placing.py` decides by it.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from .. import native
from ..collective import mesh
from ..errors import CenacleError
from ..planning import catalog
from ..planning.plan_cost import LOCAL_MACHINE
from . import thunderbolt

PACKAGE = Path(__file__).parent.parent
READ_BYTES = 256 * 2**20  # more than caches hold
PIECES = 16
READS = 4


def versions() -> dict[str, str]:
    """Of what has to be the same on all nodes."""
    return {"cenacle": version("cenacle"), "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}


def facts() -> dict[str, Any]:
    """What stays as it is while the program runs."""
    import mlx.core as mx

    gpu = mx.default_device().type == mx.DeviceType.gpu
    return {
        **versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "macos": platform.mac_ver()[0],
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else None,
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "metal": mx.device_info() if gpu and mx.metal.is_available() else None,
        "cuda": gpu and not mx.metal.is_available(),
        "thunderbolt": _thunderbolt(),
        "calibrated": _calibrated(),
        "kernels": native.describe_kernels() if native.is_available() else "mlx",
        "read_bytes_s": _read_rate(gpu),
        "no_mesh": mesh.unavailable_reason(),
    }


def changing() -> dict[str, Any]:
    """What an agent reports once a second."""
    return {"available_bytes": psutil.virtual_memory().available}


def find(model: str, folders: list[Path]) -> Path | None:
    """The folder of a model of that name on this machine, if there is one.

    Args:
        model: a folder's or a hub repository's name, or a path.
        folders: where models are kept here, the first one first.
    """
    name = Path(model).name
    tried = [f / model.replace("/", "--") for f in folders] + [f / name for f in folders]
    tried += [PACKAGE / "demo" / name]
    if Path(model).is_absolute():
        tried.append(Path(model))
    return next((folder for folder in tried if (folder / "config.json").is_file()), None)


def digest(folder: Path) -> str:
    """What tells two checkpoints apart without reading their weights: config.json, the index, and
    the names, sizes and headers of the weight files."""
    seen = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("model*.safetensors")):
        if path.suffix == ".json" and path.name not in ("config.json", _INDEX):
            continue
        seen.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".json":
                seen.update(file.read())
                continue
            length = file.read(8)
            seen.update(length)
            # A part of a checkpoint has no more of a file than this for sure.
            seen.update(file.read(min(int.from_bytes(length, "little"), _HEADER_BYTES)))
    return seen.hexdigest()


_INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def _read_rate(gpu: bool) -> float:
    """Bytes a second of reading memory on the device that computes.

    The best piece of many counts: others on this machine disturb most of them.
    """
    import mlx.core as mx

    piece = READ_BYTES if gpu else READ_BYTES // PIECES  # a GPU needs much to be busy
    arrays = [mx.zeros(piece // 4, dtype=mx.float32) for _ in range(READ_BYTES // piece)]
    mx.eval(arrays)
    best = float("inf")
    for _ in range(READS):
        for array in arrays:  # in turn, so that no cache holds them
            began = time.perf_counter()
            if native.is_available() and not gpu:
                native.extension().read(array)
            else:
                mx.eval(mx.max(array))
            best = min(best, time.perf_counter() - began)
    return piece / best


def _calibrated() -> dict[str, float]:
    """What `cenacle calibrate` found here that does not depend on how many ranks share it."""
    try:
        found = catalog.load_catalog().machine(LOCAL_MACHINE)
    except CenacleError:
        return {}
    kept = ("efficiency", "compute", "overhead_us", "tflops")
    return {k: found[k] for k in kept if found.facts[k].confidence == "M"}


def _thunderbolt() -> list[dict[str, str]]:
    """Ports with RDMA and where they lead, see `rdma.ports`."""
    if sys.platform != "darwin":
        return []
    commands = (  # never run
        ["system_profiler", "SPThunderboltDataType", "-json"],
        ["networksetup", "-listallhardwareports"],
        ["ibv_devices"],
    )
    said = []
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return []
        said.append(done.stdout)
    return thunderbolt.ports(*said)


def _processor() -> str:
    if sys.platform == "darwin":  # never run
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
