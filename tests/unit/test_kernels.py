"""The kernel sets of this processor, and of an emulated ARM: `tests/native/kernels_test.cpp`.

Built by plain CMake, without MLX, into `build/`, where the next run finds it again. Where the
installed extension was built from these sources, its own objects are tested; `make parity` compiles
them once more, with all of the compiler's warnings.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.products import are_whole

ROOT = Path(__file__).parent.parent.parent
KERNELS = ("kernels", "layers", "ops")  # folders of native/
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")


def build(name: str, *options: str) -> Path:
    where = ROOT / "build" / "native-tests" / name
    configure = ["cmake", "-S", ROOT / "tests" / "native", "-B", where, *options]
    for command in (configure, ["cmake", "--build", where, "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout + done.stderr
    return where / "kernels_test"


def extension_objects() -> list[Path]:
    """The extension's objects of the kernels; none where they are older than a source."""
    native = ROOT / "native"
    sources = [path for path in native.rglob("*") if path.is_file()]
    for made in ROOT.glob("build/*/CMakeFiles/_native.dir/native"):
        objects = [path for folder in KERNELS for path in sorted((made / folder).glob("*.o"))]
        newest = max(path.stat().st_mtime for path in sources)
        if objects and min(path.stat().st_mtime for path in objects) > newest:
            return objects
    return []


def checked(*command: str | Path) -> list[str]:
    """Names of the sets that were checked, all of them right."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    assert all(result.startswith("ok, ") for _, result in lines)
    return [name for name, _ in lines]


def need(*programs: str) -> None:
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        pytest.skip(f"NOT CHECKED: {', '.join(missing)} not on this machine")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT CHECKED: built on Linux only")
def test_this_processors_kernels():
    need("cmake")
    objects = [] if are_whole() else extension_objects()
    listed = ";".join(map(str, objects))
    sets = checked(build(platform.machine(), f"-DCENACLE_KERNEL_OBJECTS={listed}"))
    assert sets[-1] == "portable"
    assert set(sets) <= {"vnni", "avx2", "neon", "portable"}


@pytest.fixture(scope="module")
def arm() -> Path:
    need("cmake", *CROSS)
    options = {
        "CMAKE_CXX_COMPILER": CROSS[0],
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    }
    return build("aarch64", *(f"-D{k}={v}" for k, v in options.items()))


def test_arm_with_dot_products(arm):
    assert checked(CROSS[1], arm) == ["neon", "portable"]


def test_arm_without_dot_products_gets_the_portable_kernels(arm):
    assert checked(CROSS[1], "-cpu", "cortex-a72", arm) == ["portable"]
