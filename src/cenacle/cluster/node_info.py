"""What a node is: memory, processor, versions, and the models it has.

Owns: asking the system.
Does not know: clusters.
Invariant: nothing here takes longer than about a second.
Next: `agent.py` sends it, `placement.py` decides by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from .. import native
from ..collective import mesh
from ..errors import CenacleError, printable
from ..machine import processor_name, usable_cores
from ..model.weight_files import GGUF_INDEX, config_file, index_path, weight_files
from ..paths import BUNDLED_MODELS
from ..planning import catalog
from ..planning.plan_cost import LOCAL_MACHINE
from . import thunderbolt
from .messages import NodeInfo

READ_BYTES = 256 * 2**20  # more than caches hold
READ_PIECES = 16
READ_ROUNDS = 4
COMMAND_TIMEOUT_S = 10.0
CALIBRATED_CONSTANTS = ("efficiency", "compute", "overhead_us", "tflops")
MAX_HEADER_BYTES = 100_000_000  # of the safetensors format


def versions() -> dict[str, str]:
    """The packages whose versions must be equal on all nodes; see `membership.VERSIONS`."""
    packages = {"cenacle": version("cenacle"), "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
    with contextlib.suppress(PackageNotFoundError):
        packages["mlx_vlm"] = version("mlx-vlm")
    return packages


def describe_node() -> NodeInfo:
    """This node, with a measurement of how fast it reads memory."""
    import mlx.core as mx

    gpu = mx.default_device().type == mx.DeviceType.gpu
    metal = gpu and mx.metal.is_available()
    memory = psutil.virtual_memory()
    reason = mesh.unavailable_reason()
    return NodeInfo(
        system=printable(f"{platform.system()} {platform.release()} {platform.machine()}"),
        macos=platform.mac_ver()[0],
        python=platform.python_version(),
        processor=printable(processor_name())[:500],
        cores=len(usable_cores()) if sys.platform == "linux" else None,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        gpu=gpu,
        metal=mx.device_info() if metal else None,
        cuda=gpu and not metal,
        thunderbolt=tuple(_thunderbolt_ports()),
        calibration=_calibration(),
        kernels=native.describe_kernels() if native.is_available() else "mlx",
        read_bytes_per_s=_measure_read_rate(gpu),
        mesh_unavailable_reason=reason and printable(reason)[:500],
    )


def available_bytes() -> int:
    """Memory that is available now."""
    available: int = psutil.virtual_memory().available
    return available


def find_model(model: str, folders: list[Path]) -> Path | None:
    """The folder of a model on this node, if there is one.

    Args:
        model: name of a folder or of a Hub repository, or a path.
        folders: where to look, in this order.
    """
    name = Path(model).name
    candidates = [f / model.replace("/", "--") for f in folders] + [f / name for f in folders]
    candidates += [BUNDLED_MODELS / name]
    if Path(model).is_absolute():
        candidates.append(Path(model))
    return next((folder for folder in candidates if config_file(folder).is_file()), None)


def checkpoint_digest(folder: Path) -> str:
    """What tells two checkpoints apart without reading their weights: config.json, the index, and
    the names, sizes and headers of the weight files."""
    digest = hashlib.sha256()
    paths = config_file(folder), index_path(folder), folder / GGUF_INDEX
    described = [path for path in paths if path.exists()]
    for path in described + [file for file in weight_files(folder) if file.exists()]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".json":
                digest.update(file.read())
                continue
            if path.suffix == ".gguf":  # its index is in the digest
                continue
            header_length = file.read(8)
            digest.update(header_length)
            # A partial download has at least the header of each file.
            digest.update(file.read(min(int.from_bytes(header_length, "little"), MAX_HEADER_BYTES)))
    return digest.hexdigest()


def _measure_read_rate(gpu: bool) -> float:
    """Bytes per second of reading memory on the device that computes.

    The fastest of many pieces counts: other programs disturb most of them.
    """
    import mlx.core as mx

    piece_bytes = READ_BYTES if gpu else READ_BYTES // READ_PIECES  # a GPU needs large pieces
    arrays = [
        mx.zeros(piece_bytes // 4, dtype=mx.float32) for _ in range(READ_BYTES // piece_bytes)
    ]
    mx.eval(arrays)
    fastest_s = float("inf")
    for _ in range(READ_ROUNDS):
        for array in arrays:  # in turn, so that no cache holds them
            started_s = time.perf_counter()
            if native.is_available() and not gpu:
                native.extension().read(array)
            else:
                mx.eval(mx.max(array))
            fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return piece_bytes / fastest_s


def _calibration() -> dict[str, float]:
    """What `cenacle calibrate` measured here, without what depends on how many ranks share the
    machine."""
    try:
        machine = catalog.load_catalog().machine(LOCAL_MACHINE)
    except CenacleError:
        return {}
    return {k: machine[k] for k in CALIBRATED_CONSTANTS if machine.facts[k].confidence == "M"}


def _thunderbolt_ports() -> list[dict[str, str]]:
    if sys.platform != "darwin":
        return []
    commands = (  # never run
        ["system_profiler", "SPThunderboltDataType", "-json"],
        ["networksetup", "-listallhardwareports"],
        ["ibv_devices"],
    )
    outputs = []
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return []
        outputs.append(done.stdout)
    return thunderbolt.rdma_ports(*outputs)
