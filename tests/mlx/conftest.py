"""What several tests of models share: kernels, and a core for each process of tests."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cenacle import native

KERNELS = native.extension().available_kernels() if native.is_available() else ["none"]
LOCKS = Path(tempfile.gettempdir()) / f"cenacle-test-cores-{os.getuid()}"


def use_cores(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


@pytest.fixture(scope="module", autouse=True)
def own_core() -> Iterator[None]:
    """All threads on one core, if there is one that no other tests took: a quarter less time.

    MLX hands each operation of a tiny model to another thread. On another core that wakes for each;
    on the same core it finds many when the first thread waits.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    for core in sorted(before):
        with (LOCKS / str(core)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            use_cores({core})
            yield
            use_cores(before)
            return
    yield


@pytest.fixture(params=KERNELS)
def kernels(request):
    """The extension, with each set of kernels that this processor has."""
    if not native.is_available():
        pytest.skip(native.unavailable_reason())
    module = native.extension()
    before = module.selected_kernels()
    module.select_kernels(request.param)
    yield module
    module.select_kernels(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the kernels' number of threads, until the test ends."""
    module = native.extension()
    before = module.threads()
    yield module.set_threads
    module.set_threads(before)
