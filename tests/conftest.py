"""For all tests: nothing of the user is touched, nothing is timed, and files run side by side."""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# As ranks have it on CPUs: MLX would run a C++ compiler for a hundred functions.
os.environ["MLX_DISABLE_COMPILE"] = "1"
# MLX hands each operation of a tiny model to a thread, and on a busy machine Linux changes to that
# thread and back for each: a quarter of the tests' processor time. As a batch a thread goes on
# until it waits or its time is over. The programs that tests start inherit it.
if hasattr(os, "SCHED_BATCH"):
    with contextlib.suppress(OSError):  # not allowed here: slower
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@pytest.fixture(scope="session", autouse=True)
def config_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cenacle-home-") as folder:
        os.environ["CENACLE_HOME"] = folder  # the programs that tests start inherit it
        yield Path(folder)
        del os.environ["CENACLE_HOME"]


@pytest.fixture(autouse=True)
def no_write_before_an_array() -> Iterator[None]:
    """MLX keeps an array's size before its bytes: a write before them makes its sums absurd.

    Later tests of the process would then wait for each other's arrays, without a reason to see.
    """
    yield
    if (mx := sys.modules.get("mlx.core")) is not None:
        assert mx.get_active_memory() < 1 << 44, "something wrote before the bytes of an array"


def pytest_collection_finish() -> None:
    """What was imported stays: garbage is not looked for in it, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# Where several pytest processes share the files, those that take longest begin first.
FOLDERS = ("hosts", "ranks", "browser", "mlx", "unit", "clients", "smollm")
LONGEST_FILES = (
    "test_batching.py",
    "test_resumed_requests.py",
    "test_cli.py",
    "test_family_table.py",
    "test_joining.py",
    "test_native.py",
    "test_formats.py",
    "test_families.py",
    "test_recovery.py",
    "test_safety.py",
    "test_long_prompts.py",
    "test_decoding.py",
    "test_hostile_requests.py",
    "test_models_cluster.py",
    "test_cluster_fuzz.py",
    "test_bench.py",
    "test_server.py",
    "test_prefix_cache_disk.py",
    "test_prefix_cache.py",
    "test_clients.py",
    "test_distribution.py",
    "test_supervisor.py",
    "test_calibrate.py",
    "test_download.py",
    "test_page.py",
    "test_chat.py",
    "test_vision.py",
    "test_images.py",
    "test_mtp_layers.py",
    "test_models.py",
    "test_group.py",
    "test_damaged_checkpoints.py",
    "test_command_line.py",
    "test_extras.py",
    "test_loader.py",
    "test_mesh.py",
    "test_published_layouts.py",
    "test_load_memory.py",
    "test_slice_consumers.py",
    "test_load.py",
    "test_kernels.py",
    "test_private_temp_dir.py",
    "test_operations.py",
    "test_hub.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> tuple[int, int]:
        folder, name = item.path.parent.name, item.path.name
        files = LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)
        return files, FOLDERS.index(folder)

    items.sort(key=rank)
